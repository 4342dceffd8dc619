from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from m3e_bench.record import SCHEMA, Journal, RecordError, Series, load_record, parse_record, write_record
from tests.bench_records import make_content, series


def delete(content: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return changed


REQUIRED = (
    [(name,) for name in SCHEMA["required"]]
    + [("series", 0, name) for name in SCHEMA["properties"]["series"]["items"]["required"]]
    + [(part, name) for part in ("settings", "code", "machine") for name in SCHEMA["properties"][part]["required"]]
    + [("models", "m3e-tiny", name) for name in SCHEMA["properties"]["models"]["additionalProperties"]["required"]]
    + [("engines", "m3e-int8", name) for name in SCHEMA["properties"]["engines"]["additionalProperties"]["required"]]
)


@pytest.mark.parametrize("path", REQUIRED, ids=lambda path: ".".join(map(str, path)))
def test_a_record_without_a_field_is_refused_and_the_field_is_named(path: tuple[Any, ...]) -> None:
    content = make_content([series("m3e-int8", [[1.0]])])
    parse_record(content, "whole")
    with pytest.raises(RecordError, match=f"'{path[-1]}' is a required property"):
        parse_record(delete(content, path), "cut")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("series", 0, "samples"), []),
        (("series", 0, "samples"), [[]]),
        (("series", 0, "samples"), [1.0]),
        (("series", 0, "better"), "faster"),
        (("models", "m3e-tiny", "sha256"), "abc"),
    ],
    ids=["version", "no rounds", "empty round", "flat samples", "direction", "hash"],
)
def test_values_that_mean_nothing_are_refused(path: tuple[Any, ...], value: Any) -> None:
    content = make_content([series("m3e-int8", [[1.0]])])
    place: Any = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(RecordError):
        parse_record(content, "wrong")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    content = make_content([series("m3e-int8", [[1.0, 2.0], [3.0]]), series("st-torch-fp32", [[4.0]])])
    written = write_record(tmp_path / "record.json", content)
    assert load_record(tmp_path / "record.json") == written
    assert written.content == json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert written.series[0].samples == ((1.0, 2.0), (3.0,))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"], ids=["empty", "cut", "list", "object"])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(RecordError):
        load_record(tmp_path / "record.json")


def one(round_: int) -> Series:
    return Series("throughput", "sentences_per_s", "1/s", "higher", "m", "e", ((float(round_),),), {"workload": "w"})


def test_a_journal_goes_on_after_the_last_whole_step(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"plan": 1})
    journal.keep_fact("portions", 3)
    for round_ in range(3):
        journal.add(f"step {round_}", [one(round_)], 0.5)
    with path.open("a") as file:
        file.write('{"step": "step 3", "ser')  # what a kill in the middle of a write leaves
    again = Journal(path, {"plan": 1})
    assert "step 2" in again
    assert "step 3" not in again
    again.add("step 3", [one(3)], 0.5)
    assert again.fact("portions") == 3
    (merged,) = Journal(path, {"plan": 1}).series()
    assert merged.samples == ((0.0,), (1.0,), (2.0,), (3.0,))
    assert again.seconds == 2.0


def test_a_journal_of_another_plan_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl", {"threads": 1})
    with pytest.raises(RecordError, match="another run"):
        Journal(tmp_path / "journal.jsonl", {"threads": 2})
