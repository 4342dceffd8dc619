"""The house: arrows, light imports, public names, the wheel, the README."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import m3e

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "onnx", "huggingface_hub", "safetensors", "onnxruntime", "optimum"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.checkout
def test_the_runtime_knows_neither_the_exporter_nor_its_packages() -> None:
    for path in (ROOT / "runtime").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        # The drop-in hands out tensors to programs that ask for them, and imports torch only then.
        allowed = {"torch"} if path.name == "sentence_transformers.py" else set()
        assert not roots & {"m3e_export", "m3e_bench", "benchmarks", "tests", *(HEAVY - {"onnxruntime"} - allowed)}, (
            path
        )
        assert "onnxruntime" not in roots or path.name == "session.py", path


@pytest.mark.checkout
def test_only_errors_is_below_the_manifest_and_nobody_imports_the_benchmarks() -> None:
    assert {name for name in imports(ROOT / "runtime/m3e/manifest.py") if name.startswith("m3e")} == {"m3e.errors"}
    below = {name for name in imports(ROOT / "runtime/m3e/bundle.py") if name.startswith("m3e")}
    assert below == {"m3e.errors", "m3e.manifest", "m3e.graph_check", "m3e.tokenizer_check"}
    checks = {name for name in imports(ROOT / "runtime/m3e/tokenizer_check.py") if name.startswith("m3e")}
    assert checks == {"m3e.errors"}
    checks = {name for name in imports(ROOT / "runtime/m3e/graph_check.py") if name.startswith("m3e")}
    assert checks == {"m3e.errors", "m3e.manifest"}
    for path in (ROOT / "export").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"benchmarks", "m3e_bench", "tests"}, path


@pytest.mark.checkout
def test_imports_have_no_cycles() -> None:
    graph = {}
    for root in ("runtime", "export"):
        for path in (ROOT / root).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT / root).with_suffix("").parts).removesuffix(".__init__")
            graph[module] = {name for name in imports(path) if name.startswith("m3e")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_importing_is_light() -> None:
    program = "import sys, m3e; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    path = [entry for entry in sys.path if entry]
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {program}"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert not (HEAVY | {"asyncio"}) & set(loaded)


def test_public_names() -> None:
    language = {"annotations", "TYPE_CHECKING", "Any"}
    visible = {
        name for name, value in vars(m3e).items() if not name.startswith("_") and not isinstance(value, type(m3e))
    }
    assert visible - language | set(m3e._ON_FIRST_USE) == set(m3e.__all__)
    for name in m3e.__all__:
        assert getattr(m3e, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = m3e.nothing


@pytest.mark.checkout
def test_the_wheel_holds_the_three_packages(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"m3e", "m3e_export", "m3e_bench"}
    assert {"m3e/py.typed", "m3e_export/py.typed", "m3e_export/corpus/zh.txt", "m3e_export/corpus/en.txt"} <= set(names)
    assert {f"m3e_bench/{name}" for name in ("record.schema.json", "environments/torch.txt", "report/page.css")} <= set(
        names
    )


@pytest.mark.checkout
def test_the_extras_are_all_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"cpu", "gpu", "tensorrt", "export", "modelscope", "torch", "optimum", "server", "bulk", "bench", "dev"}
    extras |= {"ray", "spark", "chroma", "qdrant", "lancedb", "milvus", "faiss", "sqlite-vec", "langchain",
               "llama-index", "haystack", "mteb", "sklearn", "docs", "frameworks"}  # fmt: skip
    assert set(project["optional-dependencies"]) == extras
    assert {re.split(r"[<>=]", item)[0] for item in project["dependencies"]} == {"numpy", "tokenizers", "tqdm"}


@pytest.mark.checkout
def test_the_readmes_python_runs(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "m3e-base").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.checkout
def test_the_version_is_in_the_changelog() -> None:
    assert f"## {m3e.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="where onnxruntime keeps its events elsewhere is not known here")
def test_onnxruntime_tells_nobody(tiny_bundle: Path, tmp_path: Path) -> None:
    """Its telemetry begins with a database in the user's cache. The control shows that it would, were it not for us."""
    quiet = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    written = {}
    for name, program in (
        ("ours", "import os, sys; from m3e import Encoder; Encoder(sys.argv[1]).encode(['a', 'b']); "
                 "assert 'ORT_DISABLE_TELEMETRY' not in os.environ"),
        ("control", "import onnxruntime; onnxruntime.SessionOptions(); onnxruntime.get_available_providers()"),
    ):  # fmt: skip
        home = tmp_path / name
        home.mkdir()
        environment = quiet | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
        subprocess.run([sys.executable, "-c", program, str(tiny_bundle)], env=environment, check=True)
        written[name] = [path.name for path in home.rglob("*")]
    assert not written["ours"]
    assert "onnxruntime.db" in written["control"], written
