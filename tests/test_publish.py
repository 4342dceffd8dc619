"""A bundle appears whole or not at all: every way in which a conversion can end, and what it leaves behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.checkpoints import write_json
from m3e import CertificateError, Encoder, ExportError
from m3e.bundle import Bundle
from m3e_export import certify, layout, publish
from m3e_export.pipeline import convert
from m3e_export.publish import check_target, staged
from m3e_export.reference import reference_embeddings


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def alone(target: Path) -> bool:
    return list(target.parent.iterdir()) == [target]


def bundle(target: Path) -> Path:
    write_json(target / "onnx" / "model", [])
    write_json(target / "manifest.json", {"format_version": 1, "files": {"onnx/model": {}}})
    return target


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a bundle is to be; nothing else is beside it."""
    return tmp_path / "bundles" / "tiny"


@pytest.fixture
def older(target: Path) -> dict[str, bytes]:
    """An older bundle at the target."""
    target.mkdir(parents=True)
    return contents(bundle(target))


def write_newer(target: Path) -> None:
    with staged(target, 0) as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model").write_bytes(b"newer")


def test_a_folder_appears_whole_when_the_block_ends(target: Path) -> None:
    with staged(target, 0) as folder:
        (folder / "model").write_bytes(b"newer")
        assert not target.exists()
        assert folder.parent == target.parent
    assert contents(target.parent) == {"tiny/model": b"newer"}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "no exchange"])
def test_an_older_bundle_is_replaced(
    target: Path, older: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    write_newer(target)
    assert contents(target.parent) == {"tiny/onnx/model": b"newer"}


def test_a_relative_target_lies_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_newer(Path("tiny"))
    assert contents(tmp_path) == {"tiny/onnx/model": b"newer"}


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        pytest.param(OSError(errno.ENOSPC, "no space"), ExportError, "disk of .* is full; nothing was", id="full"),
        pytest.param(OSError(errno.EDQUOT, "quota"), ExportError, "disk of .* is full; nothing was", id="quota"),
        pytest.param(OSError(errno.EIO, "broken disk"), ExportError, "cannot write .*broken disk", id="broken"),
        pytest.param(KeyboardInterrupt("ctrl-c"), KeyboardInterrupt, "ctrl-c", id="interrupted"),
        pytest.param(CertificateError("differs"), CertificateError, "differs", id="refused"),
    ],
)
def test_an_exception_leaves_the_older_bundle_and_nothing_else(
    target: Path, older: dict[str, bytes], raised: BaseException, expected: type[BaseException], message: str
) -> None:
    def fail() -> None:
        with staged(target, 0) as folder:
            (folder / "model").write_bytes(b"newer")
            raise raised

    with pytest.raises(expected, match=message):
        fail()
    assert alone(target)
    assert contents(target) == older


def test_a_failure_while_replacing_brings_the_older_bundle_back(
    target: Path, older: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail_to_publish(self: Path, to: Path) -> Path:
        if self != target and not self.name.endswith("-older"):
            raise OSError(errno.EIO, "broken disk")
        return rename(self, to)

    monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", fail_to_publish)
    with pytest.raises(ExportError, match="broken disk"):
        write_newer(target)
    assert alone(target)
    assert contents(target) == older


@pytest.mark.parametrize("name", ["tiny", "m3e[v1]"])
def test_leftovers_of_a_dead_process_are_removed(tmp_path: Path, name: str) -> None:
    code = f"import os, pathlib, sys; sys.path[:] = {sys.path!r}; from m3e_export.publish import staged"
    code += f"\nwith staged(pathlib.Path({str(tmp_path / name)!r}), 0) as f: (f / 'x').touch(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    dead = leftover.name.removeprefix(f".{name}")
    kept = [f".{name}.tmp-{owner}" for owner in (f"{os.getpid()}-ab", "1-ab", "notes")]
    kept += [f".other{dead}", f"{name}{dead}", dead.split("-")[1]]
    for folder in kept:
        (tmp_path / folder).mkdir()
    write_newer(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, *kept])


ALREADY, NEVER, NO_FOLDER = "--force replaces it", "is never replaced", "is no folder"


@pytest.mark.parametrize(
    ("make", "refused", "refused_with_force"),
    [
        pytest.param(lambda t: t.rmdir(), None, None, id="nothing"),
        pytest.param(lambda t: None, None, None, id="empty folder"),
        pytest.param(bundle, ALREADY, None, id="bundle"),
        pytest.param(lambda t: (bundle(t) / "onnx" / "model").unlink(), ALREADY, None, id="damaged bundle"),
        pytest.param(lambda t: (bundle(t) / "onnx" / "notes").touch(), NEVER, NEVER, id="bundle and a note"),
        pytest.param(lambda t: (t / "thesis.tex").touch(), NEVER, NEVER, id="other files"),
        pytest.param(lambda t: write_json(t / "manifest.json", {"name": "app"}), NEVER, NEVER, id="other manifest"),
        pytest.param(lambda t: (t.rmdir(), t.touch()), NO_FOLDER, NO_FOLDER, id="file"),
        pytest.param(lambda t: (t.rmdir(), t.symlink_to(t.parent)), NO_FOLDER, NO_FOLDER, id="link"),
        pytest.param(lambda t: (t.rmdir(), t.symlink_to("nowhere")), NO_FOLDER, NO_FOLDER, id="dangling link"),
    ],
)
def test_what_may_be_replaced(
    target: Path, make: Callable[[Path], object], refused: str | None, refused_with_force: str | None
) -> None:
    target.mkdir(parents=True)
    make(target)
    for force, message in ((False, refused), (True, refused_with_force)):
        if message is None:
            check_target(target, force)
        else:
            with pytest.raises(ExportError, match=message):
                check_target(target, force)


def test_a_conversion_replaces_a_bundle_only_with_force(
    tiny_checkpoint: Path, tiny_bundle: Path, target: Path, older: dict[str, bytes]
) -> None:
    with pytest.raises(ExportError, match=ALREADY):
        convert(str(tiny_checkpoint), target)
    assert contents(target) == older
    convert(str(tiny_checkpoint), target, force=True)
    assert alone(target)
    assert contents(target) == contents(tiny_bundle)  # and two conversions are the same to the last byte


def too_small(path: object) -> Any:
    return SimpleNamespace(free=1_000_000)


def write_to_full_disk(path: Path, data: bytes) -> None:
    Path("/dev/full").write_bytes(data)


@pytest.mark.parametrize(
    ("module", "name", "replacement", "message"),
    [
        pytest.param(shutil, "disk_usage", too_small, "1 MB free and the bundle needs about 15 MB", id="too small"),
        pytest.param(layout, "write", write_to_full_disk, "is full; nothing was published", id="full"),
    ],
)
def test_a_full_disk(
    tiny_checkpoint: Path, target: Path, older: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    module: Any, name: str, replacement: Callable[..., Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, name, replacement)
    with pytest.raises(ExportError, match=message):
        convert(str(tiny_checkpoint), target, force=True)
    assert alone(target)
    assert contents(target) == older


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda vector: vector * (1 + 1e-4), id="other length"),
        pytest.param(lambda vector: vector + 1e-4 * np.arange(len(vector)), id="a little off"),
        pytest.param(lambda vector: vector * np.nan, id="NaN"),
    ],
)
def test_a_bundle_that_differs_from_its_reference_is_not_published(
    tiny_checkpoint: Path, target: Path, older: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[Any], Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(certify, "reference_embeddings", lambda *given: map(wrong, reference_embeddings(*given)))
    with pytest.raises(CertificateError, match=r"does not agree with torch .* Nothing was published"):
        convert(str(tiny_checkpoint), target, force=True)
    assert alone(target)
    assert contents(target) == older


def test_a_checkpoint_with_a_default_prompt_is_certified(tiny_checkpoint: Path, tmp_path: Path, target: Path) -> None:
    folder = tmp_path / "m3e-prompted"
    shutil.copytree(tiny_checkpoint, folder)
    prompts = {"prompts": {"query": "查询："}, "default_prompt_name": "query"}
    write_json(folder / "config_sentence_transformers.json", prompts)
    convert(str(folder), target)
    encoder = Encoder(target)
    np.testing.assert_array_equal(encoder.encode("好"), encoder.encode("查询：好", prompt=""))


@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")  # the threads share Python's list of warning filters
def test_concurrent_conversions_leave_one_valid_bundle(tiny_checkpoint: Path, tiny_bundle: Path, target: Path) -> None:
    together, ends = threading.Barrier(3), Counter[str]()

    def wait(step: str) -> None:
        if step.startswith("publishing"):
            together.wait(60)

    def run() -> None:
        try:
            convert(str(tiny_checkpoint), target, report=wait)
            ends["published"] += 1
        except ExportError as error:  # another one came first
            ends[str(error)] += 1

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends.total() == 3
    assert ends["published"] >= 1
    assert alone(target)
    Bundle(target).verify()
    assert contents(target) == contents(tiny_bundle)
