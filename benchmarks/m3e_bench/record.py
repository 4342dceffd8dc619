"""Samples as they come, and the record that they become."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jsonschema

from m3e import M3EError

SCHEMA = json.loads((Path(__file__).parent / "record.schema.json").read_text(encoding="utf-8"))
SCHEMA_VERSION = SCHEMA["properties"]["schema_version"]["const"]


class RecordError(M3EError):
    """A record or a journal is not what the schema says."""


@dataclass(frozen=True, slots=True)
class Series:
    """Samples of one quantity.

    Attributes:
        question: Which file in questions/ asked.
        metric: What was measured.
        unit: Of the samples.
        better: ``higher``, ``lower`` or ``neither``.
        model: Name of the model.
        engine: Name of the engine.
        parameters: What else tells this series from others.
        samples: A tuple for each round.
    """

    question: str
    metric: str
    unit: str
    better: str
    model: str
    engine: str
    samples: tuple[tuple[float, ...], ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for series that measure the same thing."""
        parameters = json.dumps(self.parameters, sort_keys=True, ensure_ascii=False)
        return (self.question, self.metric, self.model, self.engine, parameters)

    @property
    def flat(self) -> list[float]:
        """All samples."""
        return [sample for group in self.samples for sample in group]


class Journal:
    """A file that takes every finished step at once, so that an interrupted run goes on where it stopped.

    Args:
        path: JSON lines; made when it is not there.
        plan: What the run is to do. A journal of another plan is refused.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        self._path = path
        self._steps: dict[str, dict[str, Any]] = {}
        if path.is_file():
            # The last line may have been cut off by what interrupted the run.
            lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            entries = [json.loads(line) for line in lines]
            if not entries or entries[0]["plan"] != plan:
                raise RecordError(f"{path} belongs to another run; --fresh begins anew")
            self._steps = {entry["step"]: entry for entry in entries[1:]}
            path.write_text("".join(lines), encoding="utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"plan": plan})

    def __contains__(self, step: str) -> bool:
        return step in self._steps

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: str, series: list[Series], seconds: float) -> None:
        """Keep the series of a finished step and the time that it took."""
        self._keep({"step": step, "series": [asdict(one) for one in series], "seconds": seconds})

    def keep_fact(self, step: str, fact: Any) -> None:
        """Keep a decision that the rest of the run depends on."""
        self._keep({"step": step, "fact": fact})

    def fact(self, step: str) -> Any:
        """A decision that was kept."""
        return self._steps[step]["fact"]

    def facts(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """All decisions whose name starts so, without that start."""
        for step, entry in self._steps.items():
            if step.startswith(prefix) and "fact" in entry:
                yield step.removeprefix(prefix), entry["fact"]

    @property
    def seconds(self) -> float:
        """Time that all finished steps took."""
        return float(sum(entry.get("seconds", 0.0) for entry in self._steps.values()))

    def series(self) -> list[Series]:
        """Everything measured; rounds of one quantity are put together, in order."""
        merged: dict[tuple[str, ...], Series] = {}
        for entry in self._steps.values():
            for raw in entry.get("series", []):
                one = read_series(raw)
                before = merged[one.key].samples if one.key in merged else ()
                merged[one.key] = Series(**{**raw, "samples": before + one.samples})
        return list(merged.values())

    def _keep(self, entry: dict[str, Any]) -> None:
        self._steps[entry["step"]] = entry
        self._write(entry)

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_series(raw: Mapping[str, Any]) -> Series:
    """A series as JSON has it."""
    return Series(**{**raw, "samples": tuple(tuple(group) for group in raw["samples"])})


@dataclass(frozen=True, slots=True)
class Record:
    """A record, read and validated.

    Attributes:
        content: The whole JSON object.
        series: Its series.
    """

    content: Mapping[str, Any]
    series: tuple[Series, ...]

    def find(
        self, metric: str, *, question: str | None = None, model: str | None = None, engine: str | None = None,
        **parameters: Any,
    ) -> list[Series]:  # fmt: skip
        """Series of a metric, those that have all of the parameters."""
        return [
            one
            for one in self.series
            if one.metric == metric
            and question in (None, one.question)
            and model in (None, one.model)
            and engine in (None, one.engine)
            and all(one.parameters.get(name) == value for name, value in parameters.items())
        ]

    def title(self, engine: str) -> str:
        """An engine's name for people."""
        title: str = self.content["engines"].get(engine, {}).get("title", engine)
        return title


def parse_record(content: Mapping[str, Any], name: str) -> Record:
    """Validate a record.

    Raises:
        RecordError: It is not what the schema says; every problem is named.
    """
    problems = sorted(
        jsonschema.Draft202012Validator(SCHEMA).iter_errors(content), key=lambda problem: problem.json_path
    )
    if problems:
        lines = [f"  {problem.json_path}: {problem.message[:200]}" for problem in problems[:20]]
        raise RecordError("\n".join([f"{name} is no record of schema version {SCHEMA_VERSION}:", *lines]))
    return Record(content, tuple(read_series(raw) for raw in content["series"]))


def load_record(path: Path) -> Record:
    """Read a record.

    Raises:
        RecordError: It is not JSON, or not what the schema says.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"the record {str(path)!r} cannot be read: {error}") from error
    return parse_record(content, str(path))


def write_record(path: Path, content: Mapping[str, Any]) -> Record:
    """Validate a record and write it, one series a line."""
    plain = json.loads(json.dumps(content, ensure_ascii=False))
    record = parse_record(plain, str(path))
    series = ",\n".join(json.dumps(one, ensure_ascii=False, separators=(",", ":")) for one in plain["series"])
    rest = {name: value for name, value in plain.items() if name != "series"}
    head = json.dumps(rest, ensure_ascii=False, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "series": [\n{series}\n]\n}}\n', encoding="utf-8")
    return record
