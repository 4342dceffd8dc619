"""One run: engines opened side by side, steps measured in turn, everything kept in a journal."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from m3e import M3EError
from m3e_bench import environments
from m3e_bench.budget import Budget
from m3e_bench.machine import describe_code, describe_machine
from m3e_bench.models import Model
from m3e_bench.peers import Engine
from m3e_bench.process import EngineError, EngineProcess
from m3e_bench.record import SCHEMA_VERSION, Journal, Series
from m3e_bench.workloads import Workload, accuracy_texts, data_hashes, sized_texts, speed_workloads

Measure = Callable[["OpenEngine", int], list[Series]]


@dataclass(slots=True)
class OpenEngine:
    """An engine with a model loaded.

    Attributes:
        engine: Which one.
        process: Where it runs.
        texts: Names of the texts that it was given.
        warm: What it has done once already.
    """

    engine: Engine
    process: EngineProcess
    texts: set[str] = field(default_factory=set)
    warm: set[str] = field(default_factory=set)

    def give(self, name: str, texts: Sequence[str]) -> None:
        """Hand texts over, once."""
        if name not in self.texts:
            self.process.request("texts", name=name, texts=list(texts))
            self.texts.add(name)

    def seconds(self, name: str, start: int = 0, step: int = 1) -> tuple[float, int]:
        """Encode a portion of texts that it was given: seconds and number of texts."""
        answer = self.process.request("encode", name=name, start=start, step=step)
        return answer["seconds"], answer["texts"]


class Run:
    """What the questions ask with.

    Args:
        models: For every question.
        accuracy_models: Trained ones, for accuracy alone.
        engines: All that are compared.
        data: Folder of public sets, or None.
        work: Where environments, models, converted files and journals are kept.
        threads: Of each engine.
        budget: How much is measured.
        quick: Whether peers that would have to be installed are left out.
        fresh: Whether to begin anew where an interrupted run could go on.
    """

    def __init__(
        self,
        models: Sequence[Model],
        accuracy_models: Sequence[Model],
        engines: Sequence[Engine],
        data: Path | None,
        work: Path,
        threads: int,
        budget: Budget,
        *,
        quick: bool,
        fresh: bool,
    ) -> None:
        self.models, self.accuracy_models, self.engines = list(models), list(accuracy_models), list(engines)
        self.data, self.work, self.threads, self.budget, self.quick = data, work, threads, budget, quick
        self.workloads: list[Workload] = speed_workloads(data)
        plan = self._plan()
        name = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]
        self.place = work / "runs" / name
        if fresh:
            (self.place / "journal.jsonl").unlink(missing_ok=True)
        self.journal = Journal(self.place / "journal.jsonl", plan)
        if len(self.journal):
            print(
                f"going on after {len(self.journal)} steps of an interrupted run (--fresh begins anew)", file=sys.stderr
            )
        else:
            self.journal.keep_fact("created", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
        self._open: dict[str, OpenEngine] = {}
        self._bar = tqdm(unit="step", disable=None, leave=False)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_all()
        self._bar.close()

    def interleave(
        self, step: str, model: Model, measure: Measure, *, rounds: int | None = None,
        engines: Sequence[Engine] | None = None,
    ) -> None:  # fmt: skip
        """Let the engines take turns: A B C, C B A, A B C, ..., so that a drift of the machine falls on all alike.

        Args:
            step: Name of the figure.
            model: What they encode with.
            measure: One turn.
            rounds: Turns of each engine; None for the budget's.
            engines: None for all.
        """
        chosen = list(self.engines if engines is None else engines)
        rounds = self.budget.rounds if rounds is None else rounds
        self._bar.set_description(f"{model.name} {step}")
        for number in range(rounds):
            for engine in chosen if number % 2 == 0 else reversed(chosen):
                self.once(
                    f"{step}/{model.name}/{engine.name}/{number}", engine, model, lambda e, n=number: measure(e, n)
                )

    def once(self, step: str, engine: Engine, model: Model, measure: Callable[[OpenEngine], list[Series]]) -> None:
        """Measure one step unless the journal has it; what fails is kept as the engine's problem."""
        if step in self.journal or self.problem(engine, model):
            return
        begin = time.perf_counter()
        try:
            opened = self.open(engine, model)
            series = measure(opened)
        except M3EError as error:
            self.note_problem(engine, model, f"{step.partition('/')[0]}: {error}")
            return
        self.journal.add(step, series, time.perf_counter() - begin)
        self._bar.update()

    def open(self, engine: Engine, model: Model) -> OpenEngine:
        """Give the engine with this model loaded, in a process that stays."""
        key = f"{model.name}/{engine.name}"
        if key not in self._open:
            process = self.start(engine, model)
            self._open[key] = OpenEngine(engine, process)
            self.load(process, engine, model, self.threads)
            fact = f"versions/{engine.name}"
            if fact not in self.journal:
                self.journal.keep_fact(fact, process.request("versions"))
        return self._open[key]

    def start(self, engine: Engine, model: Model) -> EngineProcess:
        """Start a process for an engine whose files are prepared; the caller closes it."""
        self.prepare(engine, model)
        return self._process(engine)

    def load(self, process: EngineProcess, engine: Engine, model: Model, threads: int) -> None:
        """Load a model."""
        process.request("load", **self.arguments(engine, model), threads=threads)

    def arguments(self, engine: Engine, model: Model) -> dict[str, Any]:
        """What an engine is told of a model."""
        options = dict(engine.options)
        if engine.after is not None:
            source = next(other for other in self.engines_known() if other.name == engine.after)
            options["exported"] = str(self._assets(source, model))
        return {"checkpoint": str(model.folder), "folder": str(self._assets(engine, model)), "options": options}

    def engines_known(self) -> list[Engine]:
        """The chosen engines and those that they start from."""
        from m3e_bench.peers import ENGINES

        return [*self.engines, *ENGINES]

    def prepare(self, engine: Engine, model: Model) -> None:
        """Convert the model for an engine, unless that was done before."""
        if engine.after is not None:
            self.prepare(next(other for other in self.engines_known() if other.name == engine.after), model)
        folder = self._assets(engine, model)
        done = folder / "prepared"
        if done.is_file() or engine.module == "gemm_bound":
            return
        folder.mkdir(parents=True, exist_ok=True)
        tqdm.write(f"converting {model.name} for {engine.title}", file=sys.stderr)
        process = self._process(engine)
        try:
            calibration = [*accuracy_texts("zh", 1000), *accuracy_texts("en", 1000)]
            process.request("prepare", 3600, **self.arguments(engine, model), calibration=calibration)
        finally:
            process.close()
        done.touch()

    def bundle(self, engine: Engine, model: Model) -> Path:
        """Our converted model."""
        self.prepare(engine, model)
        return self._assets(engine, model) / "bundle"

    def close_all(self) -> None:
        """End all engines' processes."""
        for opened in self._open.values():
            opened.process.close()
        self._open.clear()

    def problem(self, engine: Engine, model: Model) -> str | None:
        """Why an engine does not run with a model, if it does not."""
        step = f"problem/{engine.name}/{model.name}"
        return self.journal.fact(step) if step in self.journal else None

    def note_problem(self, engine: Engine, model: Model, text: str) -> None:
        """Keep why an engine is left out from here on, and say so."""
        tqdm.write(f"{engine.name} with {model.name}: {text}", file=sys.stderr)
        self.journal.keep_fact(f"problem/{engine.name}/{model.name}", text)
        opened = self._open.pop(f"{model.name}/{engine.name}", None)
        if opened is not None:
            opened.process.close()

    def record(self) -> dict[str, Any]:
        """Everything that the journal has, as a record."""
        sized = [Workload("sized", sized_texts(12, 64), "the exporter's corpus, cut to a number of tokens")]
        engines = {}
        for engine in self.engines:
            fact = f"versions/{engine.name}"
            engines[engine.name] = {
                "title": engine.title, "precision": engine.precision, "ours": engine.ours,
                "versions": self.journal.fact(fact) if fact in self.journal else {},
                "problems": [f"{model}: {text}" for model, text in self.journal.facts(f"problem/{engine.name}/")],
            }  # fmt: skip
        return {
            "schema_version": SCHEMA_VERSION,
            "created": self.journal.fact("created"),
            "seconds": round(self.journal.seconds, 1),
            "settings": {
                "threads": self.threads,
                "quick": self.quick,
                "budget": dataclasses.asdict(self.budget),
                "portions": dict(self.journal.facts("portions/")),
                "bound_batches": dict(self.journal.facts("roofline batch/")),
            },
            "code": describe_code(),
            "machine": describe_machine(),
            "models": {model.name: model.facts() for model in self.models + self.accuracy_models},
            "workloads": {
                one.name: {"source": one.source, "texts": len(one.texts), "sha256": one.sha256}
                for one in self.workloads + sized
            },
            "data_sha256": data_hashes(self.data),
            "engines": engines,
            "series": [dataclasses.asdict(series) for series in self.journal.series()],
        }

    def _process(self, engine: Engine) -> EngineProcess:
        self.place.mkdir(parents=True, exist_ok=True)
        log = self.place / f"{engine.name}.log"
        return EngineProcess(self.interpreter(engine), engine.module, self.threads, log, own_roots(engine))

    def finish(self) -> None:
        """Put the journal aside, so that the same command measures anew."""
        (self.place / "journal.jsonl").replace(self.place / "finished.jsonl")

    def interpreter(self, engine: Engine) -> Path:
        """The Python that runs an engine, installed first if need be."""
        if engine.environment is None:
            return Path(sys.executable)
        if self.quick:
            if engine.environment == "torch" and environments.own_interpreter_has("torch", "sentence_transformers"):
                return Path(sys.executable)
            raise EngineError("not installed in this environment; a run without --quick makes one for it")
        return environments.interpreter(engine.environment, self.work)

    def _assets(self, engine: Engine, model: Model) -> Path:
        # Both precisions of ours lie in one bundle; it is made again when the code that makes it changes.
        name = f"m3e-{_own_code()}" if engine.module in ("m3e_runtime", "gemm_bound") else engine.name
        return (self.work / "assets" / model.sha256[:12] / name).absolute()

    def _plan(self) -> Mapping[str, Any]:
        """What must be equal for an interrupted run to go on."""
        plan = {
            "models": {model.name: model.sha256 for model in self.models},
            "accuracy_models": {model.name: model.sha256 for model in self.accuracy_models},
            "engines": [dataclasses.asdict(engine) for engine in self.engines],
            "workloads": {workload.name: workload.sha256 for workload in self.workloads},
            "threads": self.threads,
            "budget": dataclasses.asdict(self.budget),
            "quick": self.quick,
            "code": _own_code(),
        }
        same: dict[str, Any] = json.loads(json.dumps(plan))
        return same


def own_roots(engine: Engine) -> dict[str, str]:
    """Where this project's packages are, for engines that run them and for no others."""
    if engine.module not in ("m3e_runtime", "gemm_bound"):
        return {}
    folders = []
    for name in ("m3e", "m3e_export"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        folders.append(str(Path(spec.origin).parents[1]))
    return {"PYTHONPATH": os.pathsep.join(folders)}


def _own_code() -> str:
    """Hash of the runtime's and the exporter's source."""
    digest = hashlib.sha256()
    for name in ("m3e", "m3e_export"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
