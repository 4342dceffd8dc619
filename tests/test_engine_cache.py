from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3e import Encoder, InferenceError, StartError, backends
from m3e.cli.main import main
from m3e.engine_cache import EngineCache, EngineKey
from m3e.plan import plan_sorted
from m3e.tensorrt_session import EngineBuild, TensorrtSession, edges, profiles
from tests.gpu_standin import CARD, StandInSession, standin

__all__ = ["standin"]

KEY = EngineKey(
    graph_sha256="ab" * 32,
    card="Stand-in 1",
    compute_capability="9.0",
    tensorrt="10.16.1",
    cuda="13.0, driver 13.0",
    onnxruntime="1.31.1",
    profiles=("1-4x1-512",),
)


def put(cache: EngineCache, key: EngineKey = KEY, content: bytes = b"engine") -> Path:
    with cache.building(key) as folder:
        (folder / "engine_1").mkdir()
        (folder / "engine_1" / "a.engine").write_bytes(content)
    found = cache.find(key)
    assert found is not None
    return found


def test_the_folder_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert EngineCache().root == tmp_path / "m3e" / "engines"
    assert EngineCache().root.stat().st_mode & 0o777 == 0o700


def test_what_was_built_is_found(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    assert cache.find(KEY) is None
    assert (put(cache) / "engine_1" / "a.engine").read_bytes() == b"engine"
    assert EngineCache(tmp_path / "cache").find(KEY) is not None
    assert [path.stat().st_mode & 0o777 for path in (cache.root, cache.root / KEY.digest())] == [0o700, 0o700]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineKey)])
def test_everything_that_an_engine_depends_on_is_in_its_key(tmp_path: Path, field: str) -> None:
    changed: dict[str, Any] = {field: ("2-4x1-512",) if field == "profiles" else "other"}
    other = dataclasses.replace(KEY, **changed)
    cache = EngineCache(tmp_path)
    tmp_path.chmod(0o700)
    put(cache)
    assert cache.find(other) is None
    assert KEY.digest() != other.digest()


def alter(folder: Path) -> None:
    (folder / "engine_1" / "a.engine").write_bytes(b"evil!!")


def add(folder: Path) -> None:
    (folder / "engine_1" / "b.engine").write_bytes(b"more")


def remove(folder: Path) -> None:
    (folder / "engine_1" / "a.engine").unlink()


def link(folder: Path) -> None:
    (folder / "engine_1" / "a.engine").unlink()
    (folder / "engine_1" / "a.engine").symlink_to("/etc/hostname")


def unlist(folder: Path) -> None:
    (folder / "engines.json").unlink()


def garble(folder: Path) -> None:
    (folder / "engines.json").write_text("[]")


def rekey(folder: Path) -> None:
    path = folder / "engines.json"
    path.write_text(path.read_text().replace("Stand-in 1", "Stand-in 2"))


@pytest.mark.parametrize("damage", [alter, add, remove, link, unlist, garble, rekey])
def test_engines_that_are_not_what_was_written_are_never_used(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache = EngineCache(tmp_path / "cache")
    damage(put(cache))
    with pytest.warns(RuntimeWarning, match="are rebuilt"):
        assert cache.find(KEY) is None
    assert cache.find(KEY) is None  # silently: they are gone
    put(cache, content=b"again")


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")

    def build() -> None:
        with cache.building(KEY) as folder:
            (folder / "half").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build()
    assert list(cache.root.iterdir()) == []


def test_the_first_of_two_builders_stays(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    with cache.building(KEY) as folder:
        (folder / "a.engine").write_bytes(b"slow")
        put(cache, content=b"fast")
    assert (cache.root / KEY.digest() / "engine_1" / "a.engine").read_bytes() == b"fast"
    assert len(list(cache.root.iterdir())) == 1


def test_what_killed_builders_left_is_removed(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    left, building = (cache.root / f".{name}.tmp-1-ab" for name in ("ab" * 16, "cd" * 16))
    for folder in (left, building):
        folder.mkdir(mode=0o700)
        (folder / "half").write_bytes(b"half")
    os.utime(left, times=(0, time.time() - 90000))
    found = put(cache)
    assert sorted(cache.root.iterdir()) == sorted([building, found])


def test_engines_that_cannot_be_put_in_place_are_an_error(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    (cache.root / KEY.digest()).write_text("no folder")
    with pytest.raises(StartError, match=r"cannot be written: .*Not a directory"):
        put(cache)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_cache_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(StartError, match=f"open to others \\(mode {mode:o}\\)"):
        EngineCache(tmp_path / "cache")


def test_a_cache_of_somebody_else_or_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="cannot be made"):
        EngineCache(tmp_path / "file")
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    with pytest.raises(StartError, match="no folder of its own"):
        EngineCache(tmp_path / "link")
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(StartError, match="belongs to user"):
        EngineCache(tmp_path / "own")


@pytest.mark.parametrize("longest", [16, 63, 128, 512])
@pytest.mark.parametrize("budget", [512, 4096, 16384])
def test_every_planned_batch_has_a_profile(longest: int, budget: int) -> None:
    found = profiles(budget, longest)
    rng = np.random.default_rng(longest + budget)
    for _ in range(20):
        lengths = rng.integers(1, longest + 1, rng.integers(1, 900))
        for rows in plan_sorted(lengths, budget, None, edges(longest)):
            shape = len(rows), int(lengths[rows].max())
            assert any(profile.takes(*shape) for profile in found), (shape, [str(profile) for profile in found])
    for profile in found:
        assert profile.rows[0] <= profile.rows[1] <= profile.rows[2]
        assert profile.seq_len[0] <= profile.seq_len[1] <= profile.seq_len[2]
        assert profile.rows[2] * profile.seq_len[2] <= max(budget, longest)


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_cuda_serves_until_the_engines_are_built(
    gpu_bundle: Path,
    standin: list[StandInSession],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sentences: list[str],
) -> None:
    texts = [text for text in sentences if len(text) < 200][::25]
    exact = unit(Encoder(gpu_bundle).encode(texts))
    may_build = threading.Event()
    build = backends.Engines.build
    monkeypatch.setattr(backends.Engines, "build", lambda self: may_build.wait(60) and build(self))
    encoder = Encoder(gpu_bundle, device="tensorrt", engine_cache=tmp_path / "cache")
    assert (encoder.device, encoder.engine_build and encoder.engine_build.state) == ("cuda", "building")
    assert np.abs(unit(encoder.encode(texts)) - exact).max() < 2e-3
    may_build.set()
    assert encoder.engine_build is not None
    encoder.engine_build.wait(100)
    assert (encoder.device, encoder.precision, encoder.engine_build.state) == ("tensorrt", "fp16", "ready")
    assert np.abs(unit(encoder.encode(texts)) - exact).max() < 2e-3
    assert np.abs(unit(encoder.encode(texts[0])) - exact[0]).max() < 2e-3
    # The next time they are there from the start.
    opened = len(standin)
    again = Encoder(gpu_bundle, device="tensorrt", engine_cache=tmp_path / "cache")
    assert (again.device, again.engine_build) == ("tensorrt", None)
    assert {session.provider for session in standin[opened:]} == {"TensorrtExecutionProvider"}
    assert np.abs(unit(again.encode(texts)) - exact).max() < 2e-3


@pytest.mark.parametrize("how", ["build", "canary"])
def test_cuda_stays_where_the_engines_fail(
    gpu_bundle: Path, standin: list[StandInSession], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "build":
        monkeypatch.setattr(TensorrtSession, "run_profile", lambda *_: 1 / 0)
    else:
        run = TensorrtSession.run
        monkeypatch.setattr(TensorrtSession, "run", lambda self, ids: run(self, ids)[::-1])
    encoder = Encoder(gpu_bundle, device="tensorrt", engine_cache=tmp_path / "cache")
    assert encoder.engine_build is not None
    with pytest.raises(StartError, match="could not be built" if how == "build" else "gives other vectors"):
        encoder.engine_build.wait(100)
    assert (encoder.device, encoder.engine_build.state) == ("cuda", "failed")
    assert encoder.encode("你好").shape == (64,)
    if how == "build":
        assert list((tmp_path / "cache").iterdir()) == []


def test_tensorrt_that_does_not_take_the_graph_is_an_error(
    gpu_bundle: Path, standin: list[StandInSession], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandInSession, "builds", False)
    encoder = Encoder(gpu_bundle, device="tensorrt", engine_cache=tmp_path / "cache")
    assert encoder.engine_build is not None
    with pytest.raises(StartError, match="left no engine"):
        encoder.engine_build.wait(100)


def test_waiting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = threading.Event()
    swapped: list[Any] = []
    build = EngineBuild(lambda: finish.wait(60), lambda session: None, swapped.append)
    with pytest.raises(StartError, match=r"not built after 0\.01 s"):
        build.wait(0.01)
    finish.set()
    build.wait(60)
    assert (swapped, build.state) == ([True], "ready")


def test_a_shape_without_engine_is_named() -> None:
    session = object.__new__(TensorrtSession)
    session._sessions = [(profile, None) for profile in profiles(512, 64)]
    with pytest.raises(InferenceError, match="no engine serves 1 texts of 65 tokens; there are 1-4x1-64"):
        session.run([[1] * 65])


def test_m3e_engine_build(
    gpu_bundle: Path, standin: list[StandInSession], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["engine", "build", str(gpu_bundle), "--cache", str(tmp_path / "cache")]
    assert main(command) == 0
    first = capsys.readouterr()
    assert f"onnx/model_fp16_plain.onnx on {CARD.name}: golden texts differ by" in first.out
    assert "engine 1 of 4: 1-4x1-512" in first.err
    assert main(command) == 0
    assert capsys.readouterr() == (first.out, "")
    assert Encoder(gpu_bundle, device="tensorrt", engine_cache=tmp_path / "cache").device == "tensorrt"


def test_m3e_engine_build_without_a_graph(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", "build", str(tiny_bundle)]) == 1
    assert "--precision fp16 --target tensorrt" in capsys.readouterr().err
