"""Every code block of the documentation runs, page by page and in order; the site builds; the example answers."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import m3e
import m3e_export
from benchmarks.server_process import running
from m3e import Encoder

ROOT = Path(__file__).parents[1]
# Their blocks need packages beyond the runtime's, and some minutes.
WITH_PEERS = {"integrations.md", "bulk.md"}
MARKS = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]
# The same blocks as in English, with other words.
TRANSLATED = {"zh/index.md", "zh/migrate.md", "zh/scores.md", "zh/tune.md", "zh/precision.md", "zh/operate.md"}
PAGES = [
    pytest.param(name, marks=MARKS if name in WITH_PEERS else pytest.mark.long if name in TRANSLATED else [])
    for name in ("index.md", "migrate.md", "bulk.md", "integrations.md", "scores.md", "precision.md", "tune.md",
                 "operate.md", "zh/index.md", "zh/migrate.md", "zh/bulk.md", "zh/scores.md", "zh/tune.md",
                 "zh/precision.md", "zh/operate.md")
]  # fmt: skip
SERVING = ["serving.md", pytest.param("zh/serving.md", marks=pytest.mark.long)]
ROOTS = os.pathsep.join(str(Path(str(package.__file__)).parents[1]) for package in (m3e, m3e_export))
# As where the extras that the pages name are installed: without PyTorch.
M3E = """#!{python}
import sys
sys.modules["torch"] = None
from importlib import metadata
from types import SimpleNamespace
import m3e.cli.main as cli
entry = metadata.EntryPoint("convert", "m3e_export.cli:main", "m3e.commands")
cli.metadata = SimpleNamespace(entry_points=lambda group: [entry])
raise SystemExit(cli.main())
"""
# Installing is tried by its own job; here the extras that a page names must exist.
PIP = """#!{python}
import re, sys
known = {extras!r}
named = [extra for item in sys.argv[2:] for extra in re.findall(r"\\[(.*)\\]", item)[0].split(",")]
assert sys.argv[1] == "install" and named and set(named) <= known, (sys.argv, known)
"""
PAIRS = [
    ("今天天气真好", "今天天气不错", 1),
    ("我想退货", "怎么办理退货", 1),
    ("今天天气真好", "我想退货", 0),
    ("今天天气真好", "Who pays for it?", 0),
] * 6

pytestmark = pytest.mark.checkout


@pytest.fixture
def place(
    tiny_checkpoint: Path, minilm_encoder: Encoder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:  # fmt: skip
    """A folder in which a reader of the documentation could stand, with real models under the names that it uses."""
    (tmp_path / "bin").mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    scripts = {"m3e": M3E.format(python=sys.executable),
               "pip": PIP.format(python=sys.executable, extras=set(project["optional-dependencies"]))}  # fmt: skip
    for name, text in scripts.items():
        path = tmp_path / "bin" / name
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "moka-ai").mkdir()
    (tmp_path / "moka-ai" / "m3e-base").symlink_to(tiny_checkpoint)
    (tmp_path / "finetuned-model").symlink_to(tiny_checkpoint)
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "text": "今天天气真好"}\n{"id": 2, "text": "我想退货"}\n', "utf-8")
    (tmp_path / "notes.txt").write_text("今天天气真好\n我想退货\n", "utf-8")
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.txt").write_text("今天天气真好\n我想退货\n", "utf-8")
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\t{label}\n" for a, b, label in PAIRS), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ROOTS, str(ROOT)]))
    monkeypatch.setenv("ANONYMIZED_TELEMETRY", "False")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    return tmp_path


def blocks(page: str) -> list[tuple[str, str]]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert {language for language, _ in found} <= {"sh", "python"}, "a block that nothing runs"
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(place: Path, page: str, minilm_encoder: Encoder) -> None:
    found = blocks(page)
    assert found
    converts = any("m3e convert" in code and "bundles/m3e-base" in code for _, code in found)
    if not converts:  # the page stands on the first one, which did
        shutil.copytree(minilm_encoder._folder, place / "bundles" / "m3e-base")
    for language, code in found:
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        if page.endswith("precision.md") and language == "sh":
            assert "certificate" in done.stdout or "max_abs_difference" in done.stdout
        assert done.returncode == 0, f"{page}\n{code}\n{done.stderr}"


@pytest.mark.parametrize("page", SERVING)
def test_the_pages_about_the_service(place: Path, page: str, tiny_bundle: Path) -> None:
    """Their ``m3e serve`` goes on while the blocks after it run, on a port that is free here."""
    shutil.copytree(tiny_bundle, place / "bundles" / "m3e-base")
    moved: dict[str, str] = {}
    with contextlib.ExitStack() as servers:
        for language, code in blocks(page):
            *before, last = code.strip().splitlines()
            if last.startswith("m3e serve"):
                server = servers.enter_context(running(*shlex.split(last, comments=True)[2:]))
                moved["6008" if "--compat" in last else "8080"] = str(server.port)
                code = "\n".join(before)
            for port, free in moved.items():
                code = code.replace(f"127.0.0.1:{port}", f"127.0.0.1:{free}")
            command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
            assert done.returncode == 0, f"{page}\n{code}\n{done.stderr}"


def test_no_page_is_left_out() -> None:
    names = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    # With their own tests, or commands that need another machine.
    elsewhere = {"agents.md", "benchmarks.md", "checkpoints.md", "gpu.md", "interop.md", "sources.md"}
    assert names - elsewhere == {page.values[0] for page in PAGES} | {"serving.md", "zh/serving.md"}


@pytest.mark.frameworks
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "快速开始" in (tmp_path / "site/zh/index.html").read_text("utf-8")


def test_semantic_search_over_the_documentation(place: Path, minilm_encoder: Encoder) -> None:
    command = [sys.executable, str(ROOT / "examples/semantic_search/search.py"), str(ROOT / "docs"),
               "resume a job after it was killed", "--bundle", str(minilm_encoder._folder)]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "  bulk.md\n" in first.stdout
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == first.stdout
    assert len(list((place / ".search-cache").iterdir())) >= 8
