"""Hub ids as bundles: `Encoder(ID)`, ``m3e pull``, and what they leave in the cache."""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import m3e
from m3e import BundleError, DependencyError, Encoder, ExportError
from m3e.cache import bundle_folder, cache_folder, find_cached, is_hub_id, locate, obtain, reference_file
from m3e.cli.main import main
from m3e_export import pull as pull_module
from m3e_export.sources import LocalCheckpoint
from tests.hubs import MAIN, NEWER, OLDER, REPO, Hub, run

COMMAND = "from m3e.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
ENCODE = "from m3e import Encoder; e = Encoder(sys.argv[1]); print(e.manifest.source.revision, e.encode('天气')[0])"

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a working folder without other folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "xdg" / "m3e"


def put(bundle: Path, hub_id: str, commit: str, *precisions: str, revision: str | None = None) -> Path:
    target = bundle_folder(hub_id, commit, precisions)
    shutil.copytree(bundle, target)
    reference = reference_file(hub_id, revision)
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(commit, encoding="utf-8")
    return target


@pytest.fixture
def path(tmp_path: Path) -> list[str]:
    """A module search path on which the project is installed, as far as entry points go."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in groups[group].items()) for group in groups
    ]
    information = tmp_path / "site" / f"m3e_runtime-{m3e.__version__}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Name: m3e-runtime\nVersion: {m3e.__version__}\n", encoding="utf-8")
    (information / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return [str(information.parent), *sys.path]


def program(path: list[str], code: str) -> str:
    """As on a machine without PyTorch, whose import would take longer than all the rest."""
    return f"import sys; sys.path[:] = {path!r}; sys.modules['torch'] = None; {code}"


@pytest.mark.checkout
def test_first_use_converts_and_later_uses_ask_nobody(
    hub: Hub, cache: Path, path: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first = run(tmp_path, hub, "-c", program(path, ENCODE), REPO)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(MAIN)
    hub.refs[REPO, "main"] = OLDER  # a push is not noticed until someone pulls
    monkeypatch.setattr("m3e.cache._puller", lambda: pytest.fail("the cache has it"))
    assert Encoder(REPO).manifest.source.revision == MAIN
    pulled = run(tmp_path, hub, "-c", program(path, COMMAND), "pull", REPO)
    assert pulled.returncode == 0, pulled.stderr
    assert Path(pulled.stdout.strip()) == bundle_folder(REPO, OLDER, ["fp32"])
    assert Encoder(REPO).manifest.source.revision == OLDER
    assert Encoder(REPO, revision=MAIN).manifest.source.revision == MAIN
    for command in ("info", "verify"):
        assert main([command, REPO]) == 0
    assert f"{REPO} at {OLDER}" in capsys.readouterr().out


@pytest.mark.checkout
def test_first_uses_at_once_convert_once(hub: Hub, cache: Path, path: list[str], tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: run(tmp_path, hub, "-c", program(path, COMMAND), "pull", REPO), range(2)))
    assert [done.returncode for done in runs] == [0, 0], [done.stderr for done in runs]
    assert len({done.stdout for done in runs}) == 1
    assert sum("publishing" in done.stderr for done in runs) == 1
    assert Encoder(REPO).space_id == Encoder(runs[0].stdout.strip()).space_id


@pytest.mark.checkout
def test_offline_without_a_bundle_is_a_message(hub: Hub, cache: Path, path: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, hub, "-c", program(path, COMMAND), "encode", REPO, "text", offline=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot read")
    assert "HF_HUB_OFFLINE" in done.stderr


def test_which_bundle_answers(tiny_bundle: Path, cache: Path) -> None:
    head = put(tiny_bundle, REPO, MAIN, "fp32")
    both = put(tiny_bundle, REPO, MAIN, "int8", "fp32")
    tagged = put(tiny_bundle, REPO, OLDER, "fp32", revision="release/v1")
    assert head.is_relative_to(cache)
    assert both.name == "fp32+int8"
    assert find_cached(REPO, None, "auto") == both
    assert find_cached(REPO, None, "int8") == both
    assert find_cached(REPO, MAIN, "fp32") == both
    assert find_cached(REPO, "release/v1", "auto") == tagged
    assert find_cached(REPO, OLDER, "int8") is None
    assert find_cached(REPO, NEWER, "auto") is None
    assert find_cached(f"modelscope:{REPO}", None, "auto") is None
    assert obtain(REPO, "release/v1") == tagged
    np.testing.assert_array_equal(Encoder(REPO, revision="release/v1").encode("天"), Encoder(tiny_bundle).encode("天"))


def test_a_half_made_bundle_does_not_answer(tiny_bundle: Path, cache: Path) -> None:
    (put(tiny_bundle, REPO, MAIN, "fp32") / "manifest.json").unlink()
    assert find_cached(REPO, None, "auto") is None


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        pytest.param({}, f"'m3e pull {REPO}'", id="nothing asked for"),
        pytest.param({"revision": "v1"}, f"'m3e pull {REPO} --revision v1'", id="a revision"),
        pytest.param({"precision": "int8"}, f"'m3e pull {REPO} --precision fp32 int8'", id="a precision"),
    ],
)
def test_without_the_exporter_the_message_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], advice: str
) -> None:
    monkeypatch.setattr("m3e.cache._puller", lambda: None)
    with pytest.raises(DependencyError) as caught:
        Encoder(REPO, **arguments)
    assert advice in str(caught.value)
    assert 'pip install "m3e-runtime[cpu,export]"' in str(caught.value)
    with pytest.raises(BundleError) as located:
        locate(REPO, **arguments)
    assert advice in str(located.value)


def test_what_is_a_hub_id(cache: Path) -> None:
    Path("bundles").mkdir()
    assert is_hub_id("moka-ai/m3e-base")
    assert is_hub_id("modelscope:Jerry0/m3e-base")
    for name in ("bundles/m3e-base", "m3e-base", "./a/b", "/a/b", "a/b/c", "a/b\n", "../a"):
        assert not is_hub_id(name), name
    with pytest.raises(BundleError, match="there is no such folder"):
        Encoder("bundles/m3e-base")
    with pytest.raises(BundleError, match="is a folder and has no revisions; leave out 'v1'"):
        Encoder("bundles/m3e-base", revision="v1")


@pytest.mark.parametrize(("given", "relative"), [("/var/cache", False), ("", True), ("not/absolute", True)])
def test_the_cache_folder_is_the_specifications(monkeypatch: pytest.MonkeyPatch, given: str, relative: bool) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == (Path.home() / ".cache" / "m3e" if relative else Path(given) / "m3e")


def test_a_cache_that_cannot_be_written_is_a_message(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(blocked))
    source = LocalCheckpoint(tiny_checkpoint, REPO, MAIN)
    monkeypatch.setattr(pull_module, "fetch_checkpoint", lambda *_: source)
    with pytest.raises(ExportError, match=r"the cache cannot be written: .*; set XDG_CACHE_HOME"):
        pull_module.pull(REPO)
