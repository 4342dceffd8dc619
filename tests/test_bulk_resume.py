"""m3e embed, interrupted and gone on with: a kill at any moment costs nothing, and nothing mixes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import m3e
from m3e import Encoder, InputError
from m3e.bulk.embed import embed
from m3e.bulk.inputs import Input
from m3e.bulk.records import Fields
from m3e.bulk.vectors import VectorOptions, VectorSource
from tests.bulk_jobs import COMMAND, FORMS, content, read, run, short_texts, write_jsonl


def other_space(encoder: Encoder, tmp_path: Path) -> VectorSource:
    vectors = VectorSource(encoder, VectorOptions())
    vectors.space = {**vectors.space, "space_id": "another"}
    return vectors


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("append", [True, False])
def test_another_space_is_refused(tiny_encoder: Encoder, tmp_path: Path, complete: bool, append: bool) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", short_texts(10))
    run(source, tmp_path / "out", tiny_encoder)
    if not complete:
        state = json.loads((tmp_path / "out/_m3e.json").read_text()) | {"complete": False}
        (tmp_path / "out/_m3e.json").write_text(json.dumps(state))
    before = content(tmp_path / "out")
    with pytest.raises(InputError, match=r"vectors of another space: {'space_id': '[0-9a-f]{16}'}, this job's are"):
        embed(Input(str(source)), tmp_path / "out", other_space(tiny_encoder, tmp_path), Fields("text"), append=append)
    assert content(tmp_path / "out") == before


def test_appending(tiny_encoder: Encoder, tmp_path: Path) -> None:
    texts = short_texts(50)
    first, second = write_jsonl(tmp_path / "1.jsonl", texts[:30]), write_jsonl(tmp_path / "2.jsonl", texts[30:])
    run(first, tmp_path / "out", tiny_encoder)
    with pytest.raises(InputError, match="holds a complete job with another input; add --append"):
        run(second, tmp_path / "out", tiny_encoder)
    assert run(second, tmp_path / "out", tiny_encoder, append=True).new_rows == 20
    assert run(second, tmp_path / "out", tiny_encoder, append=True).new_rows == 0
    rows, vectors = read(tmp_path / "out")
    assert rows == list(range(50))
    np.testing.assert_array_equal(vectors, tiny_encoder.encode(texts))


class Killed(BaseException):
    """A process that ends here: nothing catches it, and what is not on the disk is gone."""


def crash_points(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[str]:
    """Let the call number ``at`` of those that make things durable raise, before it does its work."""
    calls = iter(range(1, 10**6))

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any, **options: Any) -> Any:
            if next(calls) == at:
                raise Killed
            return original(*arguments, **options)

        return failing

    monkeypatch.setattr("m3e.bulk.durable.os.replace", wrap(os.replace))
    monkeypatch.setattr("m3e.bulk.durable.os.fsync", wrap(os.fsync))
    monkeypatch.setattr("m3e.bulk.embed.shutil.rmtree", wrap(__import__("shutil").rmtree))
    monkeypatch.setattr(Path, "rename", wrap(Path.rename))
    monkeypatch.setattr(Path, "mkdir", wrap(Path.mkdir))
    yield ""


@pytest.mark.parametrize("form", FORMS)
def test_a_crash_at_every_durable_step_changes_nothing(tiny_encoder: Encoder, tmp_path: Path, form: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"text": "{t}"}}\n' for t in short_texts(40)) + "bad\n")
    vectors, fields, made = VectorSource(tiny_encoder, VectorOptions()), Fields("text"), 0

    def job(folder: str) -> None:
        embed(Input(str(source)), tmp_path / folder / form, vectors, fields, rows_per_part=15)

    job("whole")
    for at in range(1, 200):
        with pytest.MonkeyPatch.context() as patch:
            next(crash_points(patch, at))
            try:
                job(f"killed{at}")
                break
            except Killed:
                made += 1
        job(f"killed{at}")
        assert content(tmp_path / f"killed{at}") == content(tmp_path / "whole"), at
    assert made > 10


def kill_and_resume(bundle: Path, source: Path, folder: Path, form: str, after_s: float) -> bool:
    """Start the command, kill it after a while, run it again; tells whether the kill came in time."""
    command = [sys.executable, "-c", COMMAND, "embed", str(source), "-o", str(folder / form), "--bundle", str(bundle),
               "--rows-per-part", "500", "--threads", "1"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(m3e.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    state = folder / (form if form == "folder" else f"{form}.partial") / "_m3e.json"
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(after_s)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return killed


def check_kills(bundle: Path, encoder: Encoder, tmp_path: Path, n: int, n_rows: int) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", short_texts(n_rows))
    spans = {}
    for form in FORMS:
        started = time.monotonic()
        run(source, tmp_path / "whole" / form, encoder, keep=() if form.endswith("npy") else ("text",),
            rows_per_part=500)  # fmt: skip
        spans[form] = time.monotonic() - started
    rng, in_time = random.Random(os.getpid()), 0
    for i in range(n):
        form, folder = FORMS[i % len(FORMS)], tmp_path / f"killed{i}"
        after_s = rng.uniform(0, spans[form])
        folder.mkdir()
        in_time += kill_and_resume(bundle, source, folder, form, after_s)
        expected = {name: data for name, data in content(tmp_path / "whole").items() if name.startswith(form)}
        assert content(folder) == expected, (form, after_s)
    assert in_time >= n // 2


def test_kill_minus_nine_at_random_moments(tiny_bundle: Path, tiny_encoder: Encoder, tmp_path: Path) -> None:
    check_kills(tiny_bundle, tiny_encoder, tmp_path, n=5, n_rows=2500)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_kill_minus_nine_at_fifty_random_moments(tiny_bundle: Path, tiny_encoder: Encoder, tmp_path: Path) -> None:
    check_kills(tiny_bundle, tiny_encoder, tmp_path, n=50, n_rows=6000)


def test_two_processes_do_not_mix(tiny_encoder: Encoder, tmp_path: Path) -> None:
    from m3e.bulk.job import locked

    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(InputError, match="another process is writing"):
        run(write_jsonl(tmp_path / "in.jsonl", ["a"]), tmp_path / "out", tiny_encoder)


def test_a_job_that_has_written_nothing_may_be_begun_otherwise(tiny_encoder: Encoder, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", short_texts(20))
    with pytest.raises(InputError, match="there is no field 'body'"):
        run(source, tmp_path / "out.parquet", tiny_encoder, text="body")
    run(source, tmp_path / "out.parquet", tiny_encoder)
    assert read(tmp_path / "out.parquet")[0] == list(range(20))
    assert not (tmp_path / "out.parquet.partial").exists()


def test_an_unfinished_job_goes_on_only_as_it_began(tiny_encoder: Encoder, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", short_texts(20))
    run(source, tmp_path / "out", tiny_encoder)
    state = json.loads((tmp_path / "out/_m3e.json").read_text()) | {"complete": False}
    (tmp_path / "out/_m3e.json").write_text(json.dumps(state))
    before = content(tmp_path / "out")
    with pytest.raises(InputError, match="unfinished job with another text_field"):
        run(source, tmp_path / "out", tiny_encoder, text="id")
    assert content(tmp_path / "out") == before
