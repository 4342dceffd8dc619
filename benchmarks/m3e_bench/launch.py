"""An engine and a model -> a process that can load it: environment, converted files, arguments."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m3e_bench import environments, peers
from m3e_bench.models import Model
from m3e_bench.peers import Engine
from m3e_bench.process import EngineError, EngineProcess
from m3e_bench.workloads import accuracy_texts

_CALIBRATION_TEXTS = 1000  # of each language; an engine takes as many of them as it wants
_BRIEF_CALIBRATION_TEXTS = 60
_PREPARE_LIMIT_S = 3600


class Launcher:
    """Knows where everything of an engine is, and makes what is not there yet.

    Args:
        work: Environments and converted files are kept here from run to run.
        logs: What engines print goes here.
        threads: Of each engine.
        quick: Whether engines whose environment would have to be installed are refused.
    """

    def __init__(self, work: Path, logs: Path, threads: int, *, quick: bool) -> None:
        self._work, self.logs, self._threads, self._quick = work, logs, threads, quick

    def start(self, engine: Engine, model: Model) -> EngineProcess:
        """Start a process whose files are prepared; nothing is loaded yet, and the caller closes it.

        Raises:
            EngineError: The conversion failed, or a quick run would have to install something.
            EnvironmentUnavailableError: pip cannot install the engine.
        """
        self.prepare(engine, model)
        return self._process(engine)

    def prepare(self, engine: Engine, model: Model) -> None:
        """Convert the model for an engine, unless that was done before."""
        if engine.after is not None:
            self.prepare(peers.by_name(engine.after), model)
        folder = self._files(engine, model)
        done = folder / "prepared"
        if done.is_file() or engine in peers.BOUNDS:
            return
        folder.mkdir(parents=True, exist_ok=True)
        tqdm.write(f"converting {model.name} for {engine.title}", file=sys.stderr)
        process = self._process(engine)
        try:
            count = _BRIEF_CALIBRATION_TEXTS if self._brief(model) else _CALIBRATION_TEXTS
            calibration = [text for language in ("zh", "en") for text in accuracy_texts(language, count)[:count]]
            process.request("prepare", _PREPARE_LIMIT_S, **self.arguments(engine, model), calibration=calibration)
        finally:
            process.close()
        done.touch()

    def arguments(self, engine: Engine, model: Model) -> dict[str, Any]:
        """What an engine is told of a model."""
        options = dict(engine.options)
        if engine.environment is None and engine.module != "openai_http":
            options["brief"] = self._brief(model)
        if engine.after is not None:
            options["exported"] = str(self._files(peers.by_name(engine.after), model))
        return {"checkpoint": str(model.folder), "folder": str(self._files(engine, model)), "options": options}

    def bundle(self, engine: Engine, model: Model) -> Path:
        """Our converted model."""
        self.prepare(engine, model)
        return self._files(engine, model) / "bundle"

    def interpreter(self, engine: Engine) -> Path:
        """The Python that runs an engine, installed first if need be."""
        if engine.environment is None:
            return Path(sys.executable)
        if self._quick:
            if engine.environment == "torch" and environments.own_interpreter_has("torch", "sentence_transformers"):
                return Path(sys.executable)
            raise EngineError("not installed in this environment; a run without --quick makes one for it")
        return environments.interpreter(engine.environment, self._work)

    def _brief(self, model: Model) -> bool:
        """Whether to calibrate on few texts: that is quicker, and random weights have no accuracy to spoil."""
        return self._quick and model.weights == "random"

    def _process(self, engine: Engine) -> EngineProcess:
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{engine.name}.log"
        return EngineProcess(self.interpreter(engine), engine.module, self._threads, log, own_roots(engine))

    def _files(self, engine: Engine, model: Model) -> Path:
        """Where an engine's converted model is; another place when what converts it changes."""
        if engine.environment is None:
            # Both precisions of ours, and their bounds, lie in one bundle.
            name = f"m3e-{own_code()}{'-brief' * self._brief(model)}"
        else:
            name = f"{engine.name}-{environments.lock_sha256(engine.environment)[:8]}"
        return (self._work / "assets" / model.sha256[:12] / name).absolute()


def own_roots(engine: Engine) -> dict[str, str]:
    """Where this project's packages are, for engines that run in this environment and for no others."""
    if engine.environment is not None:
        return {}
    return {"PYTHONPATH": os.pathsep.join(str(_package(name).parent) for name in ("m3e", "m3e_export"))}


def own_code() -> str:
    """Hash of the runtime's and the exporter's source."""
    digest = hashlib.sha256()
    for name in ("m3e", "m3e_export"):
        for path in sorted(_package(name).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
