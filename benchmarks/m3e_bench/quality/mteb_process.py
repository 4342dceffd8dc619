"""Runs MTEB tasks for one engine, in the environment that has mteb; the engine answers from a process of its own.

Run by path with a file that says what to do; the scores are written where that file says. Only mteb and what it brings
is imported here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

# The tasks of M3E's own table that C-MTEB has under the same name, and those that it has not:
# name, dataset, configuration, split that is scored, column with the text (uniem: mteb-zh/mteb_zh/tasks.py).
_IN_CMTEB = {"TNews": "TNews", "IFlyTek": "IFlyTek"}
_CLASSIFICATION = (
    ("TYQSentiment", "tyqiangz/multilingual-sentiments", "chinese", "validation", "text"),
    ("JDIphone", "kuroneko5943/jd21", "iPhone", "validation", "sentence"),
    ("StockComSentiment", "kuroneko5943/stock11", "communication", "validation", "sentence"),
    ("GubaEastmony", "Fearao/guba_eastmoney", None, "test", "text"),
)
_T2RANKING_PASSAGES = 10_000


class EngineEncoder(mteb.models.abs_encoder.AbsEncoder):
    """mteb's view of an engine: texts go to its process, vectors come back as a file."""

    def __init__(self, command: dict[str, Any], place: Path) -> None:
        self.model = None
        self.mteb_model_meta = mteb.models.ModelMeta.create_empty({"name": f"local/{command['name']}"})
        self._path = place / "vectors.npy"
        self._process = subprocess.Popen(
            command["command"], env=os.environ | command["environment"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._ask(operation="load", **command["load"])

    def encode(self, inputs: Iterable[dict[str, Any]], **_: Any) -> Any:
        """Embed the texts of all batches at once: the engine makes its own batches."""
        texts = [text for batch in inputs for text in batch["text"]]
        self._ask(operation="texts", name="mteb", texts=texts)
        self._ask(operation="vectors", name="mteb", path=str(self._path))
        return np.load(self._path)

    def close(self) -> None:
        """End the engine's process."""
        self._process.kill()
        self._process.wait()

    def _ask(self, **request: Any) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the engine has gone"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])


def describe(name: str, kind: str, language: str, split: str, score: str, path: str = "local") -> TaskMetadata:
    """What mteb wants to know of a task."""
    return TaskMetadata(
        name=name, description=name, type=kind, category="t2t", modalities=["text"],
        dataset={"path": path, "revision": "main"}, eval_splits=[split],
        eval_langs=["cmn-Hans" if language == "zh" else "eng-Latn"], main_score=score,
    )  # fmt: skip


def similarity_task(task: dict[str, Any]) -> Any:
    """Labelled pairs as an STS task."""

    class Local(AbsTaskSTS):
        metadata = describe(task["name"], "STS", task["language"], "test", "cosine_spearman")
        min_score, max_score = 0, int(max(task["scores"]))

        def load_data(self, **_: Any) -> None:
            rows = {"sentence1": task["left"], "sentence2": task["right"], "score": task["scores"]}
            self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_dict(rows))
            self.data_loaded = True

    return Local()


def retrieval_task(task: dict[str, Any], load: Any = None) -> Any:
    """Queries, passages and which belong together; ``load`` fetches them when the task begins."""

    class Local(AbsTaskRetrieval):
        metadata = describe(task["name"], "Retrieval", task["language"], "test", "ndcg_at_10")

        def load_data(self, **_: Any) -> None:
            content = task if load is None else load()
            tables = {
                name: datasets.Dataset.from_dict({"id": list(content[name]), "text": list(content[name].values())})
                for name in ("queries", "corpus")
            }
            split = {**tables, "relevant_docs": content["relevant"], "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Local()


def classification_task(name: str, path: str, config: str | None, split: str, column: str) -> Any:
    """A task of M3E's table that C-MTEB does not have."""

    class Hub(AbsTaskClassification):
        metadata = describe(name, "Classification", "zh", split, "accuracy", path)
        samples_per_label = 32

        def load_data(self, **_: Any) -> None:
            loaded = datasets.load_dataset(path, config)
            self.dataset = loaded if column == "text" else loaded.rename_column(column, "text")
            self.data_loaded = True

    return Hub()


def t2ranking() -> dict[str, Any]:
    """T2Ranking 1W: the first ten thousand passages, and the queries that one of them answers."""
    sets = {
        name: datasets.load_dataset("THUIR/T2Ranking", name)["train"]
        for name in ("collection", "queries.dev", "qrels.dev")
    }
    kept = [row for row in sets["qrels.dev"] if row["pid"] <= _T2RANKING_PASSAGES]
    relevant: dict[str, dict[str, int]] = {}
    for row in kept:
        relevant.setdefault(str(row["qid"]), {})[str(row["pid"])] = row["rel"]
    relevant = {query: found for query, found in relevant.items() if any(found.values())}
    passages = sets["collection"].select(range(_T2RANKING_PASSAGES + 1))
    return {
        "corpus": {str(row["pid"]): row["text"] for row in passages},
        "queries": {str(row["qid"]): row["text"] for row in sets["queries.dev"] if str(row["qid"]) in relevant},
        "relevant": relevant,
    }


def find_tasks(names: list[str], local: list[dict[str, Any]]) -> list[Any]:
    """Tasks by name: ``m3e``, ``cmteb``, ``local``, or mteb's own names."""
    tasks: list[Any] = []
    for name in names:
        if name == "local":
            tasks += [similarity_task(task) if task["kind"] == "sts" else retrieval_task(task) for task in local]
        elif name == "m3e":
            tasks += [mteb.get_task(known) for known in _IN_CMTEB.values()]
            tasks += [classification_task(*row) for row in _CLASSIFICATION]
            tasks.append(retrieval_task({"name": "T2Ranking1W", "language": "zh"}, t2ranking))
        elif name == "cmteb":
            tasks += list(mteb.get_benchmark("MTEB(cmn, v1)").tasks)
        else:
            tasks.append(mteb.get_task(name))
    return tasks


def main() -> None:
    """Do what the file says; a task that fails (its set cannot be fetched) is reported, and the others go on."""
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        encoder = EngineEncoder(order["engine"], Path(place))
        try:
            for task in find_tasks(order["tasks"], order["local"]):
                print(f"{order['engine']['name']}: {task.metadata.name}", file=sys.stderr)
                try:
                    result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
                    scores[task.metadata.name] = {
                        "metric": task.metadata.main_score, "score": float(result.task_results[0].get_score())
                    }  # fmt: skip
                except Exception as error:  # hubs, sets and mteb fail in ways of their own
                    scores[task.metadata.name] = {"problem": f"{type(error).__name__}: {error}"[:300]}
        finally:
            encoder.close()
    Path(order["output"]).write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main()
