"""One run: engines opened side by side, steps measured in turn, everything kept in a journal."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from m3e import M3EError
from m3e_bench import peers
from m3e_bench.budget import Budget
from m3e_bench.launch import Launcher, own_code
from m3e_bench.machine import describe_code, describe_machine
from m3e_bench.models import Model
from m3e_bench.peers import Engine
from m3e_bench.process import EngineProcess
from m3e_bench.record import SCHEMA_VERSION, Journal, Series
from m3e_bench.workloads import Workload, data_hashes, every_nth_batch, sized_texts, speed_workloads

_WARM_UP_TEXTS = 32  # a batch of the peers
Measure = Callable[["OpenEngine", int], list[Series]]


@dataclass(slots=True)
class OpenEngine:
    """An engine with a model loaded.

    Attributes:
        engine: Which one.
        process: Where it runs.
        threads: With which it was loaded.
        texts: Names of the texts that it was given.
    """

    engine: Engine
    process: EngineProcess
    threads: int
    texts: set[str] = field(default_factory=set)

    def give(self, name: str, texts: Sequence[str]) -> None:
        """Hand texts over, once."""
        if name not in self.texts:
            self.process.request("texts", name=name, texts=list(texts))
            self.texts.add(name)

    def warm_up(self, texts: Sequence[str]) -> None:
        """Encode a few of the texts, once, so that the first turn is like the others."""
        few = texts[:: max(1, len(texts) // _WARM_UP_TEXTS)]
        name = f"warm-up {hash(tuple(few))}"
        if name not in self.texts:
            self.give(name, few)
            self.seconds(name)

    def seconds(self, name: str) -> float:
        """Time one call with texts that it was given."""
        seconds: float = self.process.request("encode", name=name)["seconds"]
        return seconds


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
        self._place = work / "runs" / name
        if fresh:
            (self._place / "journal.jsonl").unlink(missing_ok=True)
        self.journal = Journal(self._place / "journal.jsonl", plan)
        if len(self.journal):
            print(
                f"going on after {len(self.journal)} steps of an interrupted run (--fresh begins anew)", file=sys.stderr
            )
        else:
            self.journal.keep_fact("created", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
        self.launcher = Launcher(work, self._place, threads, quick=quick)
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

                def turn(opened: OpenEngine, number: int = number) -> list[Series]:
                    return measure(opened, number)

                self.once(f"{step}/{model.name}/{engine.name}/{number}", engine, model, turn)

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
            process = self.launcher.start(engine, model)
            self._open[key] = OpenEngine(engine, process, self.threads)
            process.request("load", **self.launcher.arguments(engine, model), threads=self.threads)
            fact = f"versions/{engine.name}"
            if fact not in self.journal:
                self.journal.keep_fact(fact, process.request("versions"))
        return self._open[key]

    def close_all(self) -> None:
        """End all engines' processes."""
        for opened in self._open.values():
            opened.process.close()
        self._open.clear()

    def sample(self, workload: Workload, model: Model) -> tuple[str, ...]:
        """The part of a workload that every turn encodes; throughput has decided how large it is."""
        return every_nth_batch(workload.texts, self.journal.fact(f"parts/{workload.name}/{model.name}"))

    def rounds(self, workload: Workload, model: Model) -> int:
        """How many turns the budget has for a workload."""
        rounds: int = self.journal.fact(f"rounds/{workload.name}/{model.name}")
        return rounds

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
        for engine in (*self.engines, *peers.BOUNDS):
            fact = f"versions/{engine.name}"
            if engine in peers.BOUNDS and fact not in self.journal:
                continue
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
                "parts": dict(self.journal.facts("parts/")),
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

    def finish(self) -> None:
        """Put the journal aside, so that the same command measures anew."""
        (self._place / "journal.jsonl").replace(self._place / "finished.jsonl")

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
            "code": own_code(),
        }
        same: dict[str, Any] = json.loads(json.dumps(plan))
        return same
