"""Each with the real package: index, query, persist, reopen, and another bundle's vectors refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3e import Encoder, InputError
from m3e_export.pipeline import convert

pytestmark = [
    pytest.mark.frameworks,
    # What these packages warn of is theirs to mend.
    pytest.mark.filterwarnings("ignore"),
]
DOCUMENTS = ["A cat is sleeping on the sofa.", "How to reset a forgotten password.", "The weather is lovely today.",
             "Returning a product within thirty days.", "Stock prices fell sharply."]  # fmt: skip
QUESTIONS = {"I cannot remember my password": 1, "is it sunny outside": 2, "send an item back": 3}


@pytest.fixture(scope="session")
def bundle(minilm_encoder: Encoder) -> Path:
    return minilm_encoder._folder


@pytest.fixture(scope="session")
def other(minilm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape and another space: without unit length in the graph."""
    target = tmp_path_factory.mktemp("bundles") / "other"
    convert(str(minilm_checkpoint), target, normalize=False)
    return target


class Chroma:
    def __init__(self, folder: Path, bundle: Path) -> None:
        import chromadb

        from m3e.integrations.chroma import open_collection

        self.client = chromadb.PersistentClient(str(folder), chromadb.Settings(anonymized_telemetry=False))
        self.collection = open_collection(self.client, "notes", str(bundle))

    def add(self) -> None:
        self.collection.add(ids=[str(i) for i in range(len(DOCUMENTS))], documents=DOCUMENTS)

    def ask(self, question: str) -> int:
        return int(self.collection.query(query_texts=[question], n_results=1)["ids"][0][0])

    def close(self) -> None:
        import chromadb.api.shared_system_client as shared

        shared.SharedSystemClient.clear_system_cache()


class Qdrant:
    def __init__(self, folder: Path, bundle: Path) -> None:
        from qdrant_client import QdrantClient

        from m3e.integrations.qdrant import open_collection

        self.client, self.encoder = QdrantClient(path=str(folder)), Encoder(bundle)
        try:
            open_collection(self.client, "c", self.encoder)
        except InputError:
            self.client.close()
            raise

    def add(self) -> None:
        from qdrant_client.models import PointStruct

        vectors = self.encoder.encode_document(DOCUMENTS)
        self.client.upsert("c", [PointStruct(id=i, vector=v.tolist()) for i, v in enumerate(vectors)])

    def ask(self, question: str) -> int:
        found = self.client.query_points("c", query=self.encoder.encode_query(question).tolist(), limit=1)
        return int(found.points[0].id)

    def close(self) -> None:
        self.client.close()


class LanceDB:
    def __init__(self, folder: Path, bundle: Path) -> None:
        import lancedb
        from lancedb.pydantic import LanceModel, Vector

        from m3e.integrations.lancedb import open_embeddings, open_table

        embeddings = open_embeddings(str(bundle))

        class Row(LanceModel):  # type: ignore[misc, unused-ignore]
            id: int
            text: str = embeddings.SourceField()
            vector: Vector(embeddings.ndims()) = embeddings.VectorField()  # type: ignore[valid-type]

        self.table = open_table(lancedb.connect(folder), "c", Row)

    def add(self) -> None:
        self.table.add([{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)])

    def ask(self, question: str) -> int:
        return int(self.table.search(question).limit(1).to_list()[0]["id"])

    def close(self) -> None:
        pass


class Milvus:
    def __init__(self, folder: Path, bundle: Path) -> None:
        from pymilvus import MilvusClient

        from m3e.integrations.milvus import open_collection

        folder.mkdir(exist_ok=True)
        self.client, self.encoder = MilvusClient(str(folder / "milvus.db")), Encoder(bundle)
        try:
            open_collection(self.client, "c", self.encoder)
        except InputError:
            self.client.close()
            raise

    def add(self) -> None:
        vectors = self.encoder.encode_document(DOCUMENTS)
        self.client.insert("c", [{"id": i, "embedding": v.tolist()} for i, v in enumerate(vectors)])
        self.client.flush("c")

    def ask(self, question: str) -> int:
        return int(self.client.search("c", [self.encoder.encode_query(question).tolist()], limit=1)[0][0]["id"])

    def close(self) -> None:
        self.client.close()


class Faiss:
    def __init__(self, folder: Path, bundle: Path) -> None:
        from m3e.integrations.faiss import new_index, read_index

        folder.mkdir(exist_ok=True)
        self.path, self.encoder = folder / "index", Encoder(bundle)
        self.index = read_index(self.path, self.encoder) if self.path.exists() else new_index(self.encoder)

    def add(self) -> None:
        from m3e.integrations.faiss import write_index

        self.index.add(self.encoder.encode_document(DOCUMENTS, normalize_embeddings=True))
        write_index(self.index, self.path, self.encoder)

    def ask(self, question: str) -> int:
        return int(self.index.search(self.encoder.encode_query([question], normalize_embeddings=True), 1)[1][0, 0])

    def close(self) -> None:
        pass


class SqliteVec:
    def __init__(self, folder: Path, bundle: Path) -> None:
        from m3e.integrations.sqlite_vec import connect, open_table

        folder.mkdir(exist_ok=True)
        self.connection, self.encoder = connect(folder / "db"), Encoder(bundle)
        try:
            open_table(self.connection, "c", self.encoder)
        except InputError:
            self.connection.close()
            raise

    def add(self) -> None:
        from m3e.integrations.sqlite_vec import serialize

        rows = [(i, serialize(vector)) for i, vector in enumerate(self.encoder.encode_document(DOCUMENTS))]
        with self.connection:
            self.connection.executemany("INSERT INTO c(rowid, embedding) VALUES (?, ?)", rows)

    def ask(self, question: str) -> int:
        from m3e.integrations.sqlite_vec import serialize

        query = "SELECT rowid FROM c WHERE embedding MATCH ? ORDER BY distance LIMIT 1"
        return int(self.connection.execute(query, [serialize(self.encoder.encode_query(question))]).fetchone()[0])

    def close(self) -> None:
        self.connection.close()


STORES: list[Callable[[Path, Path], Any]] = [Chroma, Qdrant, LanceDB, Milvus, Faiss, SqliteVec]


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)
def test_a_store(store: Callable[[Path, Path], Any], bundle: Path, other: Path, tmp_path: Path) -> None:
    opened = store(tmp_path / "data", bundle)
    opened.add()
    for question, answer in QUESTIONS.items():
        assert opened.ask(question) == answer
    opened.close()
    again = store(tmp_path / "data", bundle)
    for question, answer in QUESTIONS.items():
        assert again.ask(question) == answer
    again.close()
    with pytest.raises(InputError, match=r"holds vectors of the space [0-9a-f]+, the bundle's are "):
        store(tmp_path / "data", other)


def test_chroma_builds_the_function_from_what_it_stored(bundle: Path, other: Path, tmp_path: Path) -> None:
    import chromadb

    from m3e.integrations.chroma import M3EEmbeddingFunction

    opened = Chroma(tmp_path, bundle)
    opened.add()
    opened.close()
    collection = chromadb.PersistentClient(str(tmp_path), chromadb.Settings(anonymized_telemetry=False)).get_collection(
        "notes"
    )
    assert collection.query(query_texts=["sunny weather"], n_results=1)["ids"] == [["2"]]
    function = M3EEmbeddingFunction(str(bundle))
    config = function.get_config()
    assert not function.is_legacy()
    assert M3EEmbeddingFunction.build_from_config(config).get_config() == config
    assert function.default_space() == "cosine"
    M3EEmbeddingFunction.validate_config(config)
    function.validate_config_update(config, config | {"bundle": "moved"})
    elsewhere = M3EEmbeddingFunction(str(other)).get_config()
    with pytest.raises(InputError, match="make another collection"):
        function.validate_config_update(config, elsewhere)
    with pytest.raises(InputError, match="cannot be compared"):
        M3EEmbeddingFunction.build_from_config(config | {"bundle": str(other)})
    with pytest.raises(InputError, match="has the fields"):
        M3EEmbeddingFunction.validate_config({})


def test_an_index_of_somebody_else_is_refused(bundle: Path, tmp_path: Path) -> None:
    import faiss

    from m3e.integrations.faiss import read_index
    from m3e.integrations.sqlite_vec import connect, open_table

    faiss.write_index(faiss.IndexFlatIP(384), str(tmp_path / "index"))
    with pytest.raises(InputError, match="does not say which vectors it holds"):
        read_index(tmp_path / "index", Encoder(bundle))
    connection = connect(":memory:")
    connection.execute("CREATE TABLE c (x)")
    with pytest.raises(InputError, match="does not say which vectors it holds"):
        open_table(connection, "c", Encoder(bundle))
    with pytest.raises(InputError, match="expected letters"):
        open_table(connection, "c; DROP TABLE x", Encoder(bundle))
    connection.close()


def test_langchain(bundle: Path) -> None:
    from langchain_core.vectorstores import InMemoryVectorStore

    from m3e.integrations.langchain import M3EEmbeddings

    embeddings = M3EEmbeddings(bundle)
    store = InMemoryVectorStore.from_texts(DOCUMENTS, embeddings)
    for question, answer in QUESTIONS.items():
        assert store.similarity_search(question, k=1)[0].page_content == DOCUMENTS[answer]
    assert asyncio.run(embeddings.aembed_query("a")) == embeddings.embed_query("a")
    assert embeddings.embed_documents([]) == []
    np.testing.assert_allclose(embeddings.embed_query("a"), Encoder(bundle).encode("a"), atol=1e-6)


def test_llama_index(bundle: Path, tmp_path: Path) -> None:
    from llama_index.core import Document, StorageContext, VectorStoreIndex, load_index_from_storage

    from m3e.integrations.llama_index import M3EEmbedding

    model = M3EEmbedding(str(bundle))
    index = VectorStoreIndex.from_documents([Document(text=text) for text in DOCUMENTS], embed_model=model)
    index.storage_context.persist(str(tmp_path))
    again = load_index_from_storage(StorageContext.from_defaults(persist_dir=str(tmp_path)), embed_model=model)
    for question, answer in QUESTIONS.items():
        assert again.as_retriever(similarity_top_k=1).retrieve(question)[0].text == DOCUMENTS[answer]
    assert asyncio.run(model.aget_text_embedding_batch(["a", "b"])) == model.get_text_embedding_batch(["a", "b"])


def test_haystack(bundle: Path) -> None:
    from haystack import Document, Pipeline
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    from m3e.integrations.haystack import M3EDocumentEmbedder, M3ETextEmbedder

    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    documents = M3EDocumentEmbedder(str(bundle)).run([Document(content=text) for text in DOCUMENTS])["documents"]
    store.write_documents(documents)
    pipeline = Pipeline()
    pipeline.add_component("embed", M3ETextEmbedder(str(bundle)))
    pipeline.add_component("retrieve", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("embed.embedding", "retrieve.query_embedding")
    for question, answer in QUESTIONS.items():
        found = pipeline.run({"embed": {"text": question}})["retrieve"]["documents"]
        assert found[0].content == DOCUMENTS[answer]
    embedder = M3EDocumentEmbedder(str(bundle), meta_fields_to_embed=["title"])
    titled = embedder.run([Document(content="b", meta={"title": "a"})])["documents"][0]
    np.testing.assert_allclose(titled.embedding, Encoder(bundle).encode("a\nb"), atol=1e-6)
    assert M3EDocumentEmbedder.from_dict(embedder.to_dict()).meta_fields_to_embed == ["title"]
    assert M3ETextEmbedder.from_dict(M3ETextEmbedder(str(bundle)).to_dict()).bundle == str(bundle)
    with pytest.raises(InputError, match="has no content"):
        embedder.run([Document(content=None)])


def test_mteb(bundle: Path, tmp_path: Path) -> None:
    import mteb
    from datasets import Dataset
    from mteb.abstasks.sts import AbsTaskSTS

    from m3e.integrations.mteb import M3EModel

    left, right = DOCUMENTS, [DOCUMENTS[0], *QUESTIONS, "a dog"]
    rows = {
        "sentence1": left,
        "sentence2": right,
        "score": [5.0, 4.0, 4.0, 4.0, 0.0],
    }

    class Local(AbsTaskSTS):  # type: ignore[misc, unused-ignore]
        metadata = mteb.get_task("STSBenchmark").metadata.model_copy(update={"name": "LocalSTS"})
        min_score, max_score = 0, 5

        def load_data(self, **_: Any) -> None:
            self.dataset = {"test": Dataset.from_dict(rows)}
            self.data_loaded = True

    model = M3EModel(bundle)
    result = mteb.evaluate(model, Local(), cache=None)
    score = result.task_results[0].scores["test"][0]["cosine_spearman"]
    encoder = Encoder(bundle)
    cosines = [encoder.similarity(encoder.encode(a), encoder.encode(b))[0, 0]
               for a, b in zip(left, right, strict=True)]  # fmt: skip
    from scipy.stats import spearmanr

    assert score == pytest.approx(spearmanr(cosines, rows["score"]).statistic, abs=1e-6)


def test_sklearn(bundle: Path) -> None:
    import pickle

    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from m3e.integrations.sklearn import M3EVectorizer

    animals = ["a cat", "a dog", "a horse", "a small bird", "two cows", "the sheep"]
    money = ["a bank", "stock prices", "interest rates", "a loan", "the dollar", "taxes"]
    pipeline = make_pipeline(M3EVectorizer(str(bundle)), LogisticRegression())
    pipeline.fit(animals + money, [0] * 6 + [1] * 6)
    assert pipeline.predict(np.array(["a pig", "mortgage"])).tolist() == [0, 1]
    again = pickle.loads(pickle.dumps(pipeline))
    assert again.predict(["a pig"]).tolist() == [0]
    step = clone(pipeline[0])
    assert step.get_params() == {"bundle": str(bundle), "normalize": True, "precision": "auto"}
    assert step.set_output(transform="default").fit_transform(animals).shape == (6, 384)
    assert len(pipeline[0].get_feature_names_out()) == 384
