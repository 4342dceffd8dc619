"""Threads: affinity and the container's quota, read from cgroup trees that the tests write."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import m3e
from m3e import cpu


def threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, membership: str, files: dict[str, str]) -> int:
    """Count threads on a machine of 8 processors whose /proc/self/cgroup and /sys/fs/cgroup are these."""
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "self").write_bytes(os.fsencode(membership))
    reader = functools.partial(cpu._cgroup_quota, tmp_path / "cgroup", tmp_path / "self")
    monkeypatch.setattr(cpu, "_cgroup_quota", reader)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return cpu.available_threads()


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param("0::/a\n", {"a/cpu.max": "150000 100000\n"}, 2, id="a quota of 1.5 is two threads"),
        pytest.param("0::/a\n", {"a/cpu.max": "200000 100000\n"}, 2, id="a whole quota"),
        pytest.param("0::/a\n", {"a/cpu.max": "20000 100000\n"}, 1, id="never less than one"),
        pytest.param("0::/a\n", {"a/cpu.max": "100000 20000\n"}, 5, id="another period"),
        pytest.param("0::/a\n", {"a/cpu.max": "6400000 100000\n"}, 8, id="a quota above the processors"),
        pytest.param("0::/a\n", {"a/cpu.max": "max 100000\n"}, 8, id="no limit"),
        pytest.param("0::/\n", {"cpu.max": "300000 100000\n"}, 3, id="the root itself"),
        pytest.param("0::/a\n", {}, 8, id="no file"),
        pytest.param(
            "0::/a/b/c\n",
            {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "400000 100000"},
            2,
            id="an ancestor is tighter",
        ),
        pytest.param(
            "0::/a/b\n",
            {"cpu.max": "700000 100000", "a/cpu.max": "600000 100000", "a/b/cpu.max": "500000 100000"},
            5,
            id="the leaf is tighter",
        ),
        pytest.param("0::/a\n", {"cpu.max": "100000 100000", "b/cpu.max": "1 100000"}, 1, id="a sibling is not read"),
        pytest.param(
            "0::/system.slice/docker-1f.scope\n", {"cpu.max": "250000 100000\n"}, 3, id="path of the host's tree"
        ),
        pytest.param("0::/../../outside\n", {"cpu.max": "250000 100000\n"}, 3, id="path above the namespace"),
        pytest.param("0::/a:b\n", {"a:b/cpu.max": "250000 100000\n"}, 3, id="a colon in the path"),
        pytest.param("0::/\udcff\n", {"cpu.max": "250000 100000\n"}, 3, id="a path that is not UTF-8"),
    ],
)
def test_cgroup_v2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, membership: str, files: dict[str, str], expected: int
) -> None:
    assert threads(monkeypatch, tmp_path, membership, files) == expected


def v1(folder: str, quota: str, period: str = "100000\n") -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param("3:cpu:/a\n", v1("cpu/a", "150000\n"), 2, id="quota"),
        pytest.param("3:cpu:/a\n", v1("cpu/a", "-1\n"), 8, id="no limit"),
        pytest.param("3:cpu,cpuacct:/a\n", v1("cpu/a", "150000\n"), 2, id="two controllers"),
        pytest.param("3:cpuset:/a\n2:cpuacct:/a\n", v1("cpu/a", "150000\n"), 8, id="other controllers"),
        pytest.param("9:pids:/\n3:cpu:/docker/1f\n0::/\n", v1("cpu", "150000\n"), 2, id="path of the host's tree"),
        pytest.param("3:cpu:/a/b\n", {**v1("cpu/a", "350000"), **v1("cpu/a/b", "-1")}, 4, id="an ancestor is tighter"),
        pytest.param(
            "3:cpu:/a\n0::/b\n", {**v1("cpu/a", "350000"), "b/cpu.max": "250000 100000"}, 3, id="both versions"
        ),
        pytest.param("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "150000"}, 8, id="no period"),
    ],
)
def test_cgroup_v1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, membership: str, files: dict[str, str], expected: int
) -> None:
    assert threads(monkeypatch, tmp_path, membership, files) == expected


@pytest.mark.parametrize(
    "content",
    ["", "\n", "150000", "150000 100000 1", "a b", "150000 0", "0 100000", "-5 100000", "1.5 1", "150000 \x00"],
)
def test_a_malformed_quota_is_no_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    assert threads(monkeypatch, tmp_path, "0::/a\n", {"a/cpu.max": content}) == 8


@pytest.mark.parametrize(
    ("quota", "period"), [("", "100000"), ("150000", ""), ("150000", "0"), ("0", "100000"), ("x", "y"), ("1 2", "3")]
)
def test_a_malformed_quota_of_v1_is_no_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, period: str
) -> None:
    assert threads(monkeypatch, tmp_path, "3:cpu:/a\n", v1("cpu/a", quota, period)) == 8


@pytest.mark.parametrize(
    "membership",
    ["", "\n", "garbage\n", "::\n", ":\n3:cpu\n", "0::/a\x00b\n", f"0::/{'a' * 5000}\n", "\udcff\udcfe\n"],
    ids=["empty", "empty line", "no colon", "no fields", "one colon", "NUL", "longer than a name", "not UTF-8"],
)
def test_a_malformed_membership_is_survived(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, membership: str) -> None:
    assert threads(monkeypatch, tmp_path, f"{membership}0::/a\n", {"a/cpu.max": "150000 100000"}) == 2


def test_no_proc(tmp_path: Path) -> None:
    assert cpu._cgroup_quota(tmp_path, tmp_path / "missing") is None


def test_processors_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.setattr(cpu, "_cgroup_quota", lambda: None)
    assert cpu.available_threads() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_of_one_processor() -> None:
    code = (
        "import os; from m3e.cpu import available_threads; "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(available_threads())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(m3e.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"
