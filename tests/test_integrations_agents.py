"""The programs of docs/agents.md with the real packages, in environments of their own: their pins are others'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.server_process import running
from m3e import Encoder
from tests.environments import ROOT, TORCH, python_with, run_python

pytestmark = [pytest.mark.frameworks, pytest.mark.checkout, pytest.mark.timeout(1200)]
RUNTIME = ("onnxruntime>=1.23", "tokenizers>=0.21,<1", "tqdm>=4.60")
SEMANTIC_KERNEL = ("semantic-kernel>=1.30", "transformers>=4.48", TORCH, *RUNTIME)
GUIDANCE = ("guidance>=0.2", *RUNTIME)
COMPARE = """
import numpy as np
from m3e import Encoder
expected = Encoder("bundles/m3e-base").encode(["今天天气真好", "我想退货"], normalize_embeddings=True)
np.testing.assert_allclose(np.asarray(vectors), expected, atol=1e-6)
"""
# The mock says what it is given to say, if that begins with the very prompt that it gets.
ASK = """
told = f"Context: {notes[1]}\\nQuestion: I forgot my password\\nAnswer: the account page"
lm = guidance.models.Mock(b"<s>" + told.encode())
assert (lm + answer("I forgot my password"))["answer"] == "the account page"
"""


@pytest.fixture
def place(minilm_encoder: Encoder, tmp_path: Path) -> Path:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "m3e-base").symlink_to(minilm_encoder._folder)
    return tmp_path


def program(heading: str) -> str:
    page = (ROOT / "docs" / "agents.md").read_text("utf-8")
    (found,) = re.findall(rf"^## {heading}\n.*?```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return str(found)


def test_semantic_kernel_with_the_service(place: Path) -> None:
    with running(f"m3e-base={place / 'bundles' / 'm3e-base'}") as server:
        asked = program("semantic-kernel with the service").replace("http://127.0.0.1:8080", server.url)
        run_python(python_with(*SEMANTIC_KERNEL), asked + COMPARE, place)


def test_semantic_kernel_in_process(place: Path) -> None:
    run_python(python_with(*SEMANTIC_KERNEL), program("semantic-kernel in process") + COMPARE, place)


def test_guidance(place: Path) -> None:
    run_python(python_with(*GUIDANCE), program("guidance") + ASK, place)


def test_the_page_has_no_other_program() -> None:
    assert (ROOT / "docs" / "agents.md").read_text("utf-8").count("```python") == 3
