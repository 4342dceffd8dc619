"""How far vectors are from FP32 PyTorch's, and what that does to ranking."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3e import M3EError
from m3e_bench.models import Model
from m3e_bench.peers import REFERENCE, Engine
from m3e_bench.record import Series
from m3e_bench.runner import OpenEngine, Run
from m3e_bench.workloads import accuracy_texts, labelled_pairs
from m3e_export.evaluate import neighbour_overlap, spearman

Array = np.ndarray[Any, Any]
_TOP = 10


def ask(run: Run, model: Model) -> None:
    """Compare every engine's vectors with the reference's on the same texts.

    Without the reference (a quick run where PyTorch is not installed) ours in FP32 takes its place, and the record's
    parameters say so.
    """
    sets = labelled_pairs(run.data, model.language, run.budget.accuracy_texts) if model.weights == "trained" else []
    texts = {"corpus": accuracy_texts(model.language, run.budget.accuracy_texts)}
    texts |= {pairs.name: pairs.left + pairs.right for pairs in sets}
    scores = {pairs.name: pairs.scores for pairs in sets}
    reference = _reference(run, model)
    if reference is None:
        return
    for name, some in texts.items():
        steps = {f"accuracy {name}/{model.name}/{engine.name}/0": engine for engine in run.engines}
        steps = {step: engine for step, engine in steps.items() if step not in run.journal}
        if not steps:
            continue
        expected = _vectors(run.open(reference, model), name, some)
        for step, engine in steps.items():
            measure = functools.partial(
                _measure, model=model, name=name, texts=some, scores=scores.get(name), expected=expected,
                reference=reference,
            )  # fmt: skip
            run.once(step, engine, model, measure)


def _reference(run: Run, model: Model) -> Engine | None:
    """The engine that the others are compared with; what keeps PyTorch from it becomes its problem."""
    for name in (REFERENCE, "m3e-fp32"):
        engine = next((engine for engine in run.engines if engine.name == name), None)
        if engine is not None and run.problem(engine, model) is None:
            try:
                run.open(engine, model)
            except M3EError as error:
                run.note_problem(engine, model, f"accuracy: {error}")
            else:
                return engine
    return None


def _measure(
    opened: OpenEngine, *, model: Model, name: str, texts: Sequence[str], scores: Sequence[float] | None,
    expected: Array, reference: Engine,
) -> list[Series]:  # fmt: skip
    vectors = expected if opened.engine == reference else _vectors(opened, name, texts)
    found = compare_vectors(vectors, expected)
    if scores is not None:
        found |= rank(vectors, np.asarray(scores), name)
    parameters = {"set": name, "reference": reference.name}
    return [
        Series("accuracy", metric, "1", "higher", model.name, opened.engine.name, ((value,),), parameters)
        for metric, value in found.items()
    ]


def _vectors(opened: OpenEngine, name: str, texts: Sequence[str]) -> Array:
    """An engine's vectors, scaled to unit length."""
    opened.give(f"accuracy {name}", texts)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "vectors.npy"
        opened.process.request("vectors", name=f"accuracy {name}", path=str(path))
        return _unit(np.load(path))


def _unit(vectors: Array) -> Array:
    rows: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return rows


def compare_vectors(vectors: Array, expected: Array) -> dict[str, float]:
    """Cosines of each vector to the expected one, and how many of the ten nearest neighbours are the same.

    Args:
        vectors: (n, dim).
        expected: (n, dim), the reference's.
    """
    vectors, expected = (_unit(x.astype(np.float64)) for x in (vectors, expected))
    cosines = (vectors * expected).sum(axis=1)
    return {
        "cosine_mean": float(cosines.mean()),
        "cosine_p1": float(np.percentile(cosines, 1)),
        "cosine_min": float(cosines.min()),
        "top10_overlap": neighbour_overlap(vectors, expected),
    }


def rank(vectors: Array, scores: Array, name: str) -> dict[str, float]:
    """Spearman's correlation of cosines and labels; and retrieval of each right sentence by its left one.

    Args:
        vectors: Unit length, first all left sentences, then all right ones: (2 n, dim).
        scores: Labels, (n,).
        name: Of the set; the labels of STS-B go to 5 and those of LCQMC to 1.
    """
    n = len(scores)
    left, right = vectors[:n], vectors[n:]
    alike = scores >= (4 if "stsb" in name else 1)
    return {
        "spearman": spearman((left * right).sum(axis=1), scores),
        "ndcg_at_10": float(np.mean(_ndcg(left[alike] @ right.T, np.flatnonzero(alike)))),
    }


def _ndcg(scores: Array, relevant: Array) -> Array:
    """nDCG@10 with one relevant candidate a query: 1 / log2(1 + rank), 0 beyond ten (Jarvelin and Kekalainen 2002)."""
    own = scores[np.arange(len(relevant)), relevant]
    ranks = 1 + (scores > own[:, None]).sum(axis=1)
    gains: Array = np.where(ranks <= _TOP, 1 / np.log2(1 + ranks), 0.0)
    return gains
