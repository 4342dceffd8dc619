"""A virtual environment for every peer, made from its locked requirements file."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from m3e import M3EError

_LOCKS = Path(__file__).parent / "environments"


class EnvironmentUnavailableError(M3EError):
    """A peer cannot be installed here; the message says why."""


def interpreter(name: str, work: Path) -> Path:
    """Give the Python of an environment, installed first if it is not there or its lock has changed.

    Args:
        name: Of a file ``environments/NAME.txt``.
        work: The suite's folder; environments are kept in ``envs`` there.

    Raises:
        EnvironmentUnavailableError: pip failed; also the second time, without trying again, until the lock changes.
    """
    folder = work / "envs" / name
    python, state = folder / "bin" / "python", folder / "lock.sha256"
    digest = lock_sha256(name)
    if state.is_file():
        recorded, _, failure = state.read_text(encoding="utf-8").partition("\n")
        if recorded == digest:
            if failure:
                raise EnvironmentUnavailableError(failure)
            return python.absolute()
    print(f"installing the environment {name!r}; this happens once", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(_LOCKS / f"{name}.txt")],
        capture_output=True, text=True,
    )  # fmt: skip
    reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
    failure = "" if done.returncode == 0 else f"pip cannot install it: {' '.join(reasons)[:500]}"
    state.write_text(digest + ("\n" + failure if failure else ""), encoding="utf-8")
    if failure:
        raise EnvironmentUnavailableError(failure)
    return python.absolute()


def lock_sha256(name: str) -> str:
    """Hash of an environment's lock and of the Python that it is for."""
    return hashlib.sha256((_LOCKS / f"{name}.txt").read_bytes() + sys.version.encode()).hexdigest()


def own_interpreter_has(*modules: str) -> bool:
    """Whether this interpreter can import some modules, so that a quick run need not install them again."""
    return all(importlib.util.find_spec(module) is not None for module in modules)
