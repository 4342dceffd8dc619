"""Bundles while they are written, damaged or made by somebody hostile: whole, or refused by name."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

from m3e import BundleError, CheckpointError, ExportError
from m3e.bundle import Bundle
from m3e_export.pipeline import convert
from tests.trust import Figure, Outcome, counted, flips, hostile, hostile_checkpoints, kills
from tests.trust.children import in_child
from tests.trust.models import tiny_bundle, tiny_checkpoint

_FAULTS = ("ENOSPC", "EIO")
_CASES = {"no bundle before": (False, True), "older bundle": (True, True), "no exchange": (True, False)}

Read = Callable[[Path], dict[str, bytes]]


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder in memory where there is one: a process is killed here and not the machine, so no disk matters."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="m3e-artefacts-", dir=memory) as folder:
        yield Path(folder) / "work"


def measure_kills(count: int) -> Outcome:
    """Kills at every file operation, and so many at random moments."""
    old, new = (kills.bundle_of(tiny_bundle(), word) for word in (b"older", b"newer"))
    with working_folder() as folder:
        n, failures = _every_operation(("SIGKILL",), folder)
        failures += kills.at_random_moments(old, new, folder, count)
        in_place = kills.at_random_moments(old, new, folder, 20, publisher=kills.publish_in_place)
    caught = {**_in_place(("SIGKILL",)), "an exporter that writes in place, at random moments": bool(in_place)}
    return Outcome(summary(failures, n + count), not failures, caught)


def measure_errors(count: int) -> Outcome:
    """A full disk and a broken one at every file operation; `count` passes."""
    with working_folder() as folder:
        runs = [_every_operation(_FAULTS, folder) for _ in counted(count)]
    failures = [failure for _, found in runs for failure in found]
    return Outcome(summary(failures, sum(n for n, _ in runs)), not failures, _in_place(_FAULTS))


def _every_operation(faults: tuple[str, ...], folder: Path) -> tuple[int, list[str]]:
    old, new = (kills.bundle_of(tiny_bundle(), word) for word in (b"older", b"newer"))
    runs = [
        kills.at_every_operation(old if before else None, new, folder, fault=fault, exchange=exchange)
        for fault in faults
        for before, exchange in _CASES.values()
    ]
    return sum(n for n, _ in runs), [failure for _, found in runs for failure in found]


def _in_place(faults: tuple[str, ...]) -> dict[str, bool]:
    """The negative control: at more than a quarter of its operations the bundle is neither."""
    old, new = (kills.bundle_of(tiny_bundle(), word) for word in (b"older", b"newer"))
    caught = {}
    for fault in faults:
        with working_folder() as folder:
            n, failures = kills.at_every_operation(old, new, folder, fault=fault, publisher=kills.publish_in_place)
        caught[f"an exporter that writes in place, {fault}"] = len(failures) > n // 4
    return caught


def measure_damage(count: int) -> Outcome:
    """So many flipped bytes, and a quarter as many cuts, over all files."""
    with working_folder() as folder:
        shutil.copytree(tiny_bundle(), folder)
        survivors = flips.flip(folder, count) + flips.truncate(folder, max(1, count // 4))
        without = flips.flip(folder, 20, load=flips.without_hashes)
        Bundle(folder).verify()
    return Outcome(summary(survivors, count + count // 4), not survivors, {"a loader without hashes": bool(without)})


def measure_hostile(count: int) -> Outcome:
    """Every hostile graph, manifest, tokenizer and checkpoint; `count` passes."""
    survivors = [name for _ in counted(count) for name in hostile_survivors(_open)]
    without = hostile_survivors(lambda folder: Bundle(folder).verify())
    n = len(hostile.GRAPHS) + len(hostile.MANIFESTS) + len(hostile.TOKENIZERS) + len(hostile_checkpoints.CHECKPOINTS)
    return Outcome(summary(survivors, n * count), not survivors, {"a loader that verifies hashes alone": bool(without)})


def _open(folder: Path) -> None:
    bundle = Bundle(folder)
    bundle.read_tokenizer()
    for graph in bundle.manifest.graphs:
        bundle.read_graph(graph)


def hostile_survivors(load: flips.Load) -> list[str]:
    """Names of hostile bundles that a loader takes, and of checkpoints that are converted or touch something."""
    survivors = []
    made: list[tuple[str, Callable[[Path], object]]] = [
        *((f"graph: {name}", lambda folder, change=change: hostile.replace_graph(folder, change))
          for name, (change, _) in hostile.GRAPHS.items()),
        *((f"manifest: {name}", lambda folder, change=change: hostile.replace_manifest(folder, change))
          for name, (change, _) in hostile.MANIFESTS.items()),
        *((f"tokenizer: {name}", lambda folder, change=change: hostile.replace_tokenizer(folder, change))
          for name, (change, _) in hostile.TOKENIZERS.items()),
    ]  # fmt: skip
    for name, change in made:
        with working_folder() as folder:
            shutil.copytree(tiny_bundle(), folder)
            change(folder)
            try:
                load(folder)
            except BundleError:
                continue
        survivors.append(name)
    for name, (change_checkpoint, _) in hostile_checkpoints.CHECKPOINTS.items():
        with working_folder() as work:
            folder, secret = work / "case" / "m3e-tiny", work / "outside" / "secret"
            shutil.copytree(tiny_checkpoint(), folder)
            kills.write_file(secret, b"secret")
            change_checkpoint(folder, secret)
            try:
                convert(str(folder), work / "bundle")
            except CheckpointError:
                if [*secret.parent.iterdir()] == [secret] and not [*work.rglob("canary")]:
                    continue
        survivors.append(f"checkpoint: {name}")
    return survivors


def measure_exporters(count: int) -> Outcome:
    """So many loads beside two exporters that replace one bundle in turn."""
    loads, swaps, mixed = beside_exporters(count, kills.publish_files, _read)
    *_, in_place = beside_exporters(max(count, 50_000), kills.publish_in_place, kills.contents)  # the first mix ends it
    measured = f"{int(mixed)} of {loads:,} loads during {swaps:,} swaps"
    return Outcome(measured, loads == count and swaps > 1 and not mixed, {"an exporter that writes in place": in_place})


def measure_repeats(count: int) -> Outcome:
    """So many more exports of one checkpoint, each by a process of its own; and of one with another last bit.

    All with one thread of OpenBLAS: with another number of them it sums in another order, and INT8 levels may differ.
    """
    with working_folder() as folder:
        expected = _export(tiny_checkpoint(), folder)
        different = sum(_export(tiny_checkpoint(), folder) != expected for _ in counted(count))
        other = shutil.copytree(tiny_checkpoint(), folder / "m3e-tiny")
        weights = (other / "model.safetensors").read_bytes()
        (other / "model.safetensors").write_bytes(weights[:-4] + bytes([weights[-4] ^ 1]) + weights[-3:])
        caught = {"a weight with another last bit": _export(other, folder) != expected}
    return Outcome(f"{different} of {count}", different == 0, caught)


def _export(checkpoint: Path, folder: Path) -> dict[str, bytes]:
    target = folder / "bundle"
    shutil.rmtree(target, ignore_errors=True)
    in_child(_convert, str(checkpoint), target)
    return kills.contents(target)


def _convert(checkpoint: str, target: Path) -> None:
    convert(checkpoint, target, precisions=("fp32", "int8"))


def _read(folder: Path) -> dict[str, bytes]:
    bundle = Bundle(folder)
    return {name: bundle.read(name) for name in bundle.manifest.files}


def beside_exporters(count: int, publisher: kills.Publisher, read: Read) -> tuple[int, int, bool]:
    """Load a bundle beside two exporters of its name, until a load holds files of both.

    Args:
        count: Loads that have to come through.
        publisher: What the exporters call.
        read: How the bundle is loaded; what it refuses is tried again.

    Returns:
        Loads that came through, swaps meanwhile, and whether the last load was a mixture.
    """
    old, new = (kills.bundle_of(tiny_bundle(), word) for word in (b"older", b"newer"))
    context = multiprocessing.get_context("fork")
    ended, swaps = context.Event(), context.Value("q", 0)
    loads, mixed = 0, False
    with working_folder() as folder:
        target = folder / "bundle"
        for name, data in old.items():
            kills.write_file(target / name, data)
        exporters = [
            context.Process(target=_publish_until, args=(publisher, files, target, ended, swaps))
            for files in (old, new)
        ]
        for process in exporters:
            process.start()
        while loads < count and not mixed and all(process.is_alive() for process in exporters):
            try:
                found = read(target)
            except (BundleError, OSError):
                continue
            loads += 1
            mixed = not any(found.items() <= files.items() for files in (old, new))
        ended.set()
        for process in exporters:
            process.join()
    return loads, swaps.value, mixed


def _publish_until(
    publisher: kills.Publisher, files: dict[str, bytes], target: Path, ended: Event, swaps: Synchronized[int]
) -> None:
    while not ended.is_set():
        try:
            publisher(files, target)
            with swaps.get_lock():
                swaps.value += 1
        except ExportError as error:  # another exporter came between
            if publisher is kills.publish_files and "nothing was published" not in str(error):
                raise
        time.sleep(0.01)  # several loads fit between two swaps


def summary(failures: list[str], count: int) -> str:
    """How many of how many, and the first."""
    return f"{len(failures)} of {count:,}" + (f"; first: {failures[0]}" if failures else "")


FIGURES = (
    Figure("E1", "exports killed: neither the older bundle nor the newer", "0", measure_kills, long=200),
    Figure("E2", "ENOSPC and EIO while exporting: target touched", "0", measure_errors, long=1),
    Figure("E3", "flipped bytes and cuts that are not refused by name", "0", measure_damage, long=1000),
    Figure("E4", "hostile bundles and checkpoints that are not refused", "0", measure_hostile, long=1),
    Figure("E5", "exports of one input that differ in a byte", "0", measure_repeats, long=1, soak=5),
    Figure("E7", "loads beside exporters that mix bundles", "0", measure_exporters, long=500, soak=10_000),
)
