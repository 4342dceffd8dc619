"""A bundle's publishing, killed and failed wherever it touches the disk: the older bundle is there, or the newer."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3e import ExportError
from m3e.bundle import Bundle
from m3e.errors import BundleError
from tests.trust.kills import (
    FAULTS,
    at_every_operation,
    at_random_moments,
    bundle_of,
    contents,
    publish_files,
    publish_in_place,
    write_file,
)


@pytest.fixture
def older(tiny_bundle: Path) -> dict[str, bytes]:
    return bundle_of(tiny_bundle, b"older")


@pytest.fixture
def newer(tiny_bundle: Path) -> dict[str, bytes]:
    return bundle_of(tiny_bundle, b"newer")


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder in memory where there is one: a process is killed here and not the machine, so no disk matters."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="m3e-publishing-", dir=memory) as folder:
        yield Path(folder) / "work"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", ["no bundle before", "older bundle", "older bundle, no exchange"])
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_fault_at_every_file_operation(
    work: Path, older: dict[str, bytes], newer: dict[str, bytes], fault: str, case: str, step: int
) -> None:
    before = None if case == "no bundle before" else older
    n, failures = at_every_operation(before, newer, work, fault=fault, exchange="no exchange" not in case, step=step)
    assert failures == []
    assert n * step > 20


@pytest.mark.parametrize("fault", FAULTS)
def test_an_exporter_that_writes_in_place_is_caught(
    work: Path, older: dict[str, bytes], newer: dict[str, bytes], fault: str
) -> None:
    n, failures = at_every_operation(older, newer, work, fault=fault, step=1, publisher=publish_in_place)
    assert len(failures) > n // 4  # the others are errors while it removes the older bundle, which it ignores
    assert "neither the older nor the newer" in failures[-1] or "not the older one" in failures[-1]


@pytest.mark.parametrize("n_kills", [20, pytest.param(200, marks=pytest.mark.long)])
def test_kills_at_random_moments(work: Path, older: dict[str, bytes], newer: dict[str, bytes], n_kills: int) -> None:
    assert at_random_moments(older, newer, work, n_kills) == []
    assert at_random_moments(older, newer, work, 10, publisher=publish_in_place)  # the control


def publish_often(files: dict[str, bytes], target: Path, n: int) -> None:
    for _ in range(n):
        try:
            publish_files(files, target)
        except ExportError as error:  # another exporter came between
            if "nothing was published" not in str(error):
                raise


@pytest.mark.parametrize("n", [20, pytest.param(300, marks=pytest.mark.long)])
def test_exporters_at_once_do_not_mix(work: Path, older: dict[str, bytes], newer: dict[str, bytes], n: int) -> None:
    """A reader beside them sees one bundle or the other, or is refused; never files of both."""
    target = work / "bundle"
    for name, data in older.items():
        write_file(target / name, data)
    context = multiprocessing.get_context("fork")
    exporters = [context.Process(target=publish_often, args=(files, target, n)) for files in (older, newer) * 2]
    for process in exporters:
        process.start()
    seen = 0
    while any(process.is_alive() for process in exporters):
        try:
            bundle = Bundle(target)
            read = {name: bundle.read(name) for name in bundle.manifest.files}
        except BundleError:
            continue
        seen += 1
        assert any(read.items() <= files.items() for files in (older, newer))
    for process in exporters:
        process.join()
        assert process.exitcode == 0
    assert seen
    assert list(target.parent.iterdir()) == [target]
    assert contents(target) in (older, newer)
