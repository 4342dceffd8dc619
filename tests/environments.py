"""Environments of their own for tools that cannot live beside the tests' packages.

Each is made once from its list of requirements, in a folder named after the list's hash, and used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "environments"
# The build that the calling environment has, from the index that its pip is set to.
TORCH = f"torch=={metadata.version('torch').split('+')[0]}"
# What does not work with transformers 5, in one environment: PyTorch is most of it.
TRANSFORMERS_4 = (
    TORCH, "transformers==4.57.6", "sentence-transformers==5.7.0",
    "optimum-onnx[onnxruntime]==0.1.0", "uniem==0.3.3", "accelerate==0.21.0", "datasets==2.21.0",
)  # fmt: skip


def python_with(*requirements: str) -> Path:
    """The interpreter of a virtual environment with these packages."""
    folder = _folder("python", [*requirements, sys.version])
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _do([sys.executable, "-m", "venv", str(folder)])
        _do([str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check",
             *requirements])  # fmt: skip
        (folder / "complete").touch()
    return python


def node_with(*packages: str) -> Path:
    """A folder whose ``node_modules`` holds these packages; programs that lie in it find them.

    Without install scripts: onnxruntime-node's would download its CUDA build, and the CPU build is in the package.
    """
    assert shutil.which("npm"), "these tests need Node.js with npm: apt-get install nodejs npm"
    folder = _folder("node", packages)
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
        _do(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", *packages], folder)
        (folder / "complete").touch()
    return folder


def run_python(python: Path, program: str, folder: Path) -> None:
    """Run a program in a folder. It sees this checkout's packages, but none of the caller's."""
    roots = os.pathsep.join(str(ROOT / root) for root in ("runtime", "export", "."))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment = {**kept, "PYTHONPATH": roots, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (folder / "program.py").write_text(program, encoding="utf-8")
    _do([str(python), "program.py"], folder, environment)


def run_node(modules: Path, program: str, folder: Path) -> None:
    """Run a program in a folder, with the packages of another."""
    link = folder / "node_modules"
    if not link.exists():
        link.symlink_to(modules / "node_modules")
    (folder / "program.mjs").write_text(program, encoding="utf-8")
    _do(["node", "program.mjs"], folder)


def _folder(kind: str, names: Sequence[str]) -> Path:
    return FOLDER / f"{kind}-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]}"


def _do(command: list[str], folder: Path | None = None, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command[:4])} ...\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
