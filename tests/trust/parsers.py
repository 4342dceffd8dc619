"""Readers of foreign bytes under mutated bytes: by our own mutations anywhere, and guided by coverage with atheris.

Each target runs in a process of its own: a crash of orjson or tokenizers is a finding too.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from m3e.bundle import Bundle
from tests.environments import ROOT, python_with
from tests.trust import Figure, Outcome, counted
from tests.trust.children import Died, in_child
from tests.trust.models import tiny_bundle
from tests.trust.targets import BUNDLE_VARIABLE, CONTROLS, TARGETS
from tests.trust.texts import mutations

_LONGEST_SEED = 20_000
_HOSTILE = (
    b"null", b"true", b"-1", b"1e400", b"NaN", b"Infinity", b"18446744073709551616", b"[" * 40, b"{" * 40, b'"\\ud800"',
    b'"\\u0000"', b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"\0", b'"":', b"[]", b"{}", b"//", b"'", b"1.5", b'"' * 3,
)  # fmt: skip


@functools.cache
def seeds(name: str) -> list[bytes]:
    """Valid bytes of a target, short enough that a mutation hits something."""
    if "manifest" in name:
        content = json.loads((tiny_bundle() / "manifest.json").read_bytes())
        content["golden"], content["embedding_ranges"] = content["golden"][:1], ""
        for graph in content["graphs"]:
            graph["golden_embeddings"] = ""
        return [(tiny_bundle() / "manifest.json").read_bytes(), json.dumps(content).encode()]
    if "graph" in name:
        return [_small_graph()]
    if "tokenizer" in name:
        return [json.dumps(content).encode() for content in _small_tokenizers()]
    if name in ("tokenize", "careless_text"):
        return [text.encode("utf-8", "surrogatepass")[:_LONGEST_SEED] for text in mutations(3, 200)]
    bodies: list[object] = [
        {"input": "今天天气真好"}, {"input": ["a", "b"], "model": "m", "encoding_format": "base64", "dimensions": 8},
        {"input": [1, 2, 3]}, {"input": [[1], [2, 3]]}, {"input": []}, {"input": ""}, {"input": None}, [],
        {"inputs": 1},
    ]  # fmt: skip
    return [json.dumps(body, ensure_ascii=i % 2 == 0).encode() for i, body in enumerate(bodies)]


def _small_graph() -> bytes:
    """The tiny bundle's graph with a few of its nodes and weights of one value, short enough to be hit."""
    bundle = Bundle(tiny_bundle())
    model = onnx.load_from_string(bundle.read(bundle.manifest.graphs[0].file))
    del model.graph.node[20:], model.graph.initializer[10:]
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).flatten()[:1], tensor.name))
    data = bytes(model.SerializeToString())
    assert len(data) < _LONGEST_SEED
    return data


def _small_tokenizers() -> list[dict[str, Any]]:
    """WordPiece, and the steps of XLM-R's and of GPT-2's families."""
    content = json.loads((tiny_bundle() / "tokenizer.json").read_bytes())
    content["model"]["vocab"] = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"))}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    squeezed = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    words = {
        "type": "Split",
        "pattern": {"Regex": r"'s| ?\p{L}+|\s+(?!\S)|\s+"},
        "behavior": "Isolated",
        "invert": False,
    }
    unigram = {
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}, {"type": "NFKC"}, squeezed]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "model": {"type": "Unigram", "unk_id": 1, "vocab": [["[PAD]", 0.0], ["[UNK]", 0.0], ["[CLS]", 0.0],
                                                           ["[SEP]", 0.0], ["▁a", -1.5]]},
    }  # fmt: skip
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bpe = {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, levels]},
        "model": {"type": "BPE", "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "ab": 6},
                  "merges": [["a", "b"]]},
    }  # fmt: skip
    return [content, content | unigram, content | bpe]


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Change some bytes, or put in what JSON and UTF-8 break at."""
    mutated = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 16))):
        place = rng.randint(0, len(mutated))
        length = rng.choice((1, 1, 2, 8, 100))
        kind = rng.randrange(5)
        if kind == 0 and mutated:
            mutated[place - 1] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutated[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            del mutated[place : place + length]
        elif kind == 3:
            mutated[place:place] = mutated[rng.randint(0, len(mutated)) :][: length * 10]
        else:
            mutated[place : place + rng.choice((0, length))] = rng.choice(_HOSTILE)
    return bytes(mutated)


def fuzz(name: str, count: int) -> str:
    """Run a target on mutated seeds; the first failure, or nothing. In a child."""
    rng, target = random.Random(0), {**TARGETS, **CONTROLS}[name]
    for _ in counted(count):
        data = mutate(rng, rng.choice(seeds(name)))
        try:
            target(data)
        except BaseException as error:
            return f"{name} on {data[:200]!r}: {error!r:.300}"
    return ""


def measure_mutations(count: int) -> Outcome:
    """Our own mutations, so many for each target."""
    os.environ[BUNDLE_VARIABLE] = str(tiny_bundle())

    def findings(names: list[str]) -> list[str]:
        found = []
        for name in names:
            try:
                found.append(in_child(fuzz, name, count if name in TARGETS else 500, timeout_s=1e5))
            except Died as error:
                found.append(f"{name}: {error}")
        return [finding for finding in found if finding]

    found = findings(list(TARGETS))
    caught = {name: bool(findings([name])) for name in CONTROLS}
    return Outcome(_summary(found, count), not found, caught)


def measure_atheris(count: int) -> Outcome:
    """Coverage-guided, so many executions for each target, in an environment with atheris."""
    requirements = [f"{name}=={metadata.version(name)}" for name in ("numpy", "tokenizers", "tqdm", "orjson")]
    python = python_with("atheris==3.0.0", *requirements)
    found = [failure for name in TARGETS if (failure := _guided(python, name, count))]
    caught = {name: bool(_guided(python, name, 1_000_000)) for name in CONTROLS}
    return Outcome(_summary(found, count), not found, caught)


def _guided(python: Path, name: str, count: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for i, seed in enumerate(seeds(name)):
            (corpus / str(i)).write_bytes(seed)
        roots = os.pathsep.join(str(ROOT / root) for root in ("runtime", "."))
        done = subprocess.run(
            [str(python), "-m", "tests.trust.guided", name, f"-runs={count}", "-seed=1", "-max_len=20000",
             "-timeout=60", f"-artifact_prefix={folder}/", str(corpus)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": roots, BUNDLE_VARIABLE: str(tiny_bundle())},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode == 0 and re.search(rf"Done {count} ", done.stderr):
        return ""
    return f"{name}: exit status {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}"


def _summary(found: list[str], count: int) -> str:
    return f"{len(found)} of {len(TARGETS)} targets, {count:,} each" + (f"; first: {found[0]}" if found else "")


FIGURES = (
    Figure(
        "A3", "readers that fail on mutated bytes: manifest, request, tokenizer", "0 of 10,000,000 each",
        measure_mutations, quick=300, long=2000, soak=50_000,
    ),
    Figure("A3b", "the same, guided by coverage (atheris)", "0 of 10,000,000 each", measure_atheris, soak=10_000_000),
)  # fmt: skip
