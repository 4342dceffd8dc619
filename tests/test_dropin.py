"""Programs written for sentence-transformers, with the import swapped and nothing else, beside the real package."""

from __future__ import annotations

import contextlib
import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch

from m3e import Encoder, InputError
from m3e.sentence_transformers import SentenceTransformer
from tests.trust import models

# moka-ai/m3e-base, README.md, section "How to use".
M3E_README = """
from sentence_transformers import SentenceTransformer

model = SentenceTransformer('moka-ai/m3e-base')

#Our sentences we like to encode
sentences = [
    '* Moka 此文本嵌入模型由 MokaAI 训练并开源，训练脚本使用 uniem',
    '* Massive 此文本嵌入模型通过**千万级**的中文句对数据集进行训练',
    '* Mixed 此文本嵌入模型支持中英双语的同质文本相似度计算，异质文本检索等功能，未来还会支持代码检索，ALL in one'
]

#Sentences are encoded by calling model.encode()
embeddings = model.encode(sentences)

#Print the embeddings
for sentence, embedding in zip(sentences, embeddings):
    print("Sentence:", sentence)
    print("Embedding:", [round(float(x), 4) for x in embedding[:5]])
    print("")
"""
CORPUS = """
corpus = ["今天天气真好", "我想退货", "怎么重置密码", "How do I reset my password?", "The weather is lovely today.",
          "How can I return a product?", "一只猫在睡觉", "A cat is sleeping.", "今天天气很好"]
"""
PROGRAMS = {
    "m3e_readme": M3E_README,
    "semantic_search": CORPUS + '''
from sentence_transformers import SentenceTransformer, util
import torch

embedder = SentenceTransformer("moka-ai/m3e-base")
corpus_embeddings = embedder.encode(corpus, convert_to_tensor=True)
for query in ["忘记密码", "weather"]:
    query_embedding = embedder.encode(query, convert_to_tensor=True)
    similarity_scores = embedder.similarity(query_embedding, corpus_embeddings)[0]
    scores, indices = torch.topk(similarity_scores, k=3)
    for score, idx in zip(scores, indices):
        print(corpus[idx], f"(Score: {score:.4f})")
    hits = util.semantic_search(query_embedding, corpus_embeddings, top_k=3)[0]
    print([(hit["corpus_id"], round(hit["score"], 4)) for hit in hits])
''',
    "clustering": CORPUS + '''
from sentence_transformers import SentenceTransformer
from sklearn.cluster import AgglomerativeClustering, KMeans

embedder = SentenceTransformer("moka-ai/m3e-base")
corpus_embeddings = embedder.encode(corpus)
print(KMeans(n_clusters=3, n_init=5, random_state=0).fit(corpus_embeddings).labels_.tolist())
normalized = corpus_embeddings / np.linalg.norm(corpus_embeddings, axis=1, keepdims=True)
print(AgglomerativeClustering(n_clusters=None, distance_threshold=1.0).fit(normalized).labels_.tolist())
''',
    "paraphrase_mining": CORPUS + '''
from sentence_transformers import SentenceTransformer, util

model = SentenceTransformer("moka-ai/m3e-base")
for score, i, j in util.paraphrase_mining(model, corpus)[:6]:
    print(f"{corpus[i]} \\t {corpus[j]} \\t {score:.4f}")
''',
    "community_detection": CORPUS + '''
from sentence_transformers import SentenceTransformer, util

model = SentenceTransformer("moka-ai/m3e-base")
embeddings = model.encode(corpus, batch_size=64, show_progress_bar=False, convert_to_tensor=True)
for cluster in util.community_detection(embeddings, min_community_size=2, threshold=0.6):
    print([corpus[i] for i in cluster])
''',
    "retrieve_and_rank": CORPUS + '''
from sentence_transformers import SentenceTransformer, util

model = SentenceTransformer("moka-ai/m3e-base")
model.max_seq_length = 256
passages = model.encode_document(corpus, convert_to_tensor=True, normalize_embeddings=True)
question = model.encode_query("怎样退货？", convert_to_tensor=True, normalize_embeddings=True)
hits = util.semantic_search(question, passages, top_k=5, score_function=util.dot_score)[0]
best = [corpus[hit["corpus_id"]] for hit in hits]
pairs = model.similarity_pairwise(model.encode(["怎样退货？"] * 5), model.encode(best))
for rank in torch.argsort(pairs, descending=True):
    print(best[rank], f"{float(pairs[rank]):.4f}")
print(util.cos_sim(question, passages).shape, model.get_sentence_embedding_dimension(), model.device)
''',
}  # fmt: skip


@pytest.fixture(scope="module")
def real(minilm_checkpoint: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(minilm_checkpoint), device="cpu")


@pytest.fixture(scope="module")
def ours(minilm_encoder: Encoder) -> SentenceTransformer:
    return SentenceTransformer(str(minilm_encoder._folder))


def printed(program: str, names: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "program", "exec"), {"np": np, "torch": torch, **names})
    return out.getvalue()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the real class has renamed a method that programs call
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run_unchanged_and_print_the_same(
    minilm_encoder: Encoder, minilm_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    program = PROGRAMS[name]
    outputs = {}
    swapped = re.sub(r"from sentence_transformers import SentenceTransformer(, util)?", lambda found: (
        "from m3e.sentence_transformers import SentenceTransformer"
        + ("; from sentence_transformers import util" if found[1] else "")), program)  # fmt: skip
    assert swapped != program
    for who, folder, text in (("real", minilm_checkpoint, program), ("ours", minilm_encoder._folder, swapped)):
        (tmp_path / who / "moka-ai").mkdir(parents=True)
        (tmp_path / who / "moka-ai" / "m3e-base").symlink_to(folder)
        monkeypatch.chdir(tmp_path / who)
        outputs[who] = printed(text, {})
    assert outputs["real"].count("\n") >= 2
    numbers = r"-?\d+\.\d{4}"
    assert re.sub(numbers, "#", outputs["ours"]) == re.sub(numbers, "#", outputs["real"])
    np.testing.assert_allclose(
        [float(x) for x in re.findall(numbers, outputs["ours"])],
        [float(x) for x in re.findall(numbers, outputs["real"])], atol=2e-4,
    )  # fmt: skip


ARGUMENTS: dict[str, dict[str, Any]] = {
    "numpy": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "normalized": {"normalize_embeddings": True, "truncate_dim": 100},
    "prompt": {"prompt": "query: "},
    "ubinary": {"precision": "ubinary"},
    "positional": {"batch_size": 2, "show_progress_bar": False, "device": "cpu"},
}


@pytest.mark.parametrize("given", ["你好", ["你好", "a longer text"], []], ids=["str", "list", "empty"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_types_shapes_and_values(ours: SentenceTransformer, real: Any, name: str, given: Any) -> None:
    if not len(given) and name not in ("numpy", "tensor", "list"):
        return
    found, expected = ours.encode(given, **ARGUMENTS[name]), real.encode(given, **ARGUMENTS[name])
    assert type(found) is type(expected)
    if not len(given):
        assert len(found) == 0  # the real class forgets the dimension of an empty result
        return
    if isinstance(expected, list):
        found, expected = torch.stack(found), torch.stack(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if name == "ubinary":
        assert np.unpackbits(found ^ expected).mean() < 0.01
    else:
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=2e-5)


def test_every_argument_of_the_real_encode_is_known() -> None:
    import inspect

    expected = [*inspect.signature(sentence_transformers.SentenceTransformer.encode).parameters][1:-1]
    found = [*inspect.signature(SentenceTransformer.encode).parameters][1:]
    # The first was named sentences until version 6; both names work.
    assert (found[0], found[-1], found[1:-1]) == ("sentences", "inputs", expected[1:])


def test_similarities(ours: SentenceTransformer, real: Any) -> None:
    texts = ["今天天气真好", "How are you?", "你好吗"]
    a, b = ours.encode(texts), ours.encode(texts[::-1], convert_to_tensor=True)
    for mine, theirs in ((ours.similarity, real.similarity), (ours.similarity_pairwise, real.similarity_pairwise)):
        found = mine(a, b)
        assert isinstance(found, torch.Tensor)
        np.testing.assert_allclose(found, theirs(a, b), atol=1e-6)
    with pytest.raises(InputError, match="pairs need equal shapes"):
        ours.similarity_pairwise(a, b[:2])


def test_settings(ours: SentenceTransformer, minilm_encoder: Encoder) -> None:
    with ours.truncate_sentence_embeddings(16):
        assert ours.encode("a").shape == (16,) == (ours.get_sentence_embedding_dimension(),)
    assert ours.encode("a").shape == (384,) == (ours.get_embedding_dimension(),)
    prompted = SentenceTransformer(str(minilm_encoder._folder), prompts={"query": "q: "}, default_prompt_name="query")
    np.testing.assert_array_equal(prompted.encode("a"), ours.encode("q: a"))
    np.testing.assert_array_equal(prompted.encode("a", prompt=""), ours.encode("a"))
    np.testing.assert_array_equal(ours.encode_query("a"), ours.encode("a"))
    pool = ours.start_multi_process_pool()
    np.testing.assert_array_equal(ours.encode_multi_process(["a", "b"], pool), ours.encode(["a", "b"], pool=pool))
    assert ours.eval().train(False).cpu().to("cpu") is ours
    with pytest.raises(InputError, match="cannot be trained"):
        ours.train()
    np.testing.assert_array_equal(ours.encode(inputs=["a"]), ours.encode(sentences=["a"]))
    assert ours.tokenize(["a"])["input_ids"].tolist() == [[101, 1037, 102]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules": [1]}, "modules cannot be used here"),
        ({"revision": "main"}, "revision cannot be used here"),
        ({"model_kwargs": {"provider": "x"}}, r"model_kwargs\['provider'\] cannot be used here"),
        ({"backend": "tpu"}, "backend is 'tpu'"),
        ({"default_prompt_name": "query"}, "no prompt named 'query'"),
        ({"device": "tpu"}, "device is 'tpu'"),
    ],
)
def test_what_it_cannot_do_is_an_error(minilm_encoder: Encoder, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SentenceTransformer(str(minilm_encoder._folder), **arguments)


def test_a_graph_is_chosen_by_its_file_as_sentence_transformers_does() -> None:
    bundle = str(models.tiny_bundle())
    exact, fastest = SentenceTransformer(bundle, model_kwargs={"file_name": "model.onnx"}), SentenceTransformer(bundle)
    assert (exact.encoder.precision, fastest.encoder.precision) == ("fp32", "int8")
    np.testing.assert_array_equal(exact.encode("a"), Encoder(bundle, precision="fp32").encode("a"))


def test_calls_that_cannot_be(ours: SentenceTransformer) -> None:
    for arguments in ({"device": "cuda:0"}, {"output_value": "token_embeddings"}, {"prompt_name": "q"}):
        with pytest.raises(InputError):
            ours.encode("a", **arguments)  # type: ignore[arg-type]


def test_random_texts_agree(ours: SentenceTransformer, real: Any) -> None:
    rng = random.Random(0)
    texts = ["".join(chr(rng.randrange(32, 0x9FFF)) for _ in range(rng.randint(0, 40))) for _ in range(40)]
    np.testing.assert_allclose(ours.encode(texts), real.encode(texts), atol=2e-5)
