"""Ray and Spark, each with local processes of its own: the same vectors, and a killed worker costs no row."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

import m3e
from m3e import Encoder, InputError
from m3e.bulk.embed import embed
from m3e.bulk.inputs import Input
from m3e.bulk.on_ray import embed_on_ray
from m3e.bulk.records import Fields
from m3e.bulk.vectors import VectorOptions, VectorSource
from m3e.cli.main import main

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(280)]
ROOT = str(Path(m3e.__file__).parents[1])


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    return ["".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(rng.randint(1, 12))) for _ in range(24000)]


@pytest.fixture(scope="module")
def source(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    for i in range(4):
        rows = range(i * 6000, (i + 1) * 6000)
        pq.write_table(pa.table({"id": rows, "text": [texts[j] for j in rows]}), folder / f"{i}.parquet")
    return folder


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket on a local S3 server, which every process that starts later finds too."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        fsspec.filesystem("s3").mkdir("rows")
        yield "s3://rows"
    server.stop()


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[Any]:
    import ray
    import ray.data

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20,
             runtime_env={"env_vars": {"PYTHONPATH": ROOT}})  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


def check(output: Path, texts: list[str], encoder: Encoder) -> None:
    """The files in the order of their names hold the rows in the order of the input."""
    table = pyarrow.dataset.dataset(output).to_table()
    assert table.schema.names == ["id", "text", "truncated", "embedding"]
    assert json.loads(table.schema.metadata[b"m3e"])["space_id"] == encoder.manifest.space_id
    assert table["id"].to_pylist() == list(range(len(texts)))
    assert table["text"].to_pylist() == texts
    vectors = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(texts), -1)
    np.testing.assert_array_equal(vectors, encoder.encode(texts))


def kill_one_actor(killed: list[int], stop: threading.Event) -> None:
    """Kill the first actor whose process title says that it is at work on a block."""
    while not stop.is_set() and not killed:
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if line.startswith("ray::") and "EncodeBatches" in line and ".submit" in line:
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
                break
        time.sleep(0.02)


def test_a_killed_worker_costs_no_row(
    cluster: Any, source: Path, texts: list[str], tiny_bundle: Path, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    killed: list[int] = []
    stop = threading.Event()
    killer = threading.Thread(target=kill_one_actor, args=(killed, stop))
    killer.start()
    try:
        fields = Fields("text", ("id:int", "text"))
        summary = embed_on_ray(
            Input(str(source)), str(tmp_path / "out"), str(tiny_bundle), fields, VectorOptions(), workers=2
        )
    finally:
        stop.set()
        killer.join()
    assert killed
    assert (summary.rows, summary.new_rows, summary.rejected) == (len(texts), len(texts), 0)
    check(tmp_path / "out", texts, tiny_encoder)


def test_at_least_one_worker(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a\n", encoding="utf-8")
    with pytest.raises(InputError, match="workers is 0, expected at least 1"):
        embed_on_ray(
            Input(str(tmp_path / "in.txt")), str(tmp_path / "out"), "bundle", Fields("text"), VectorOptions(), workers=0
        )


def test_the_command_on_ray(
    cluster: Any, source: Path, texts: list[str], tiny_bundle: Path, tiny_encoder: Encoder, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["embed", str(source), "-o", str(tmp_path / "out"), "--bundle", str(tiny_bundle), "--keep", "id:int",
                 "--engine", "ray", "--workers", "2"]  # fmt: skip
    assert main(arguments) == 0
    assert f"{tmp_path}/out: 24,000 vectors, 0 of texts that were cut, 0 records rejected, " in capsys.readouterr().out
    check(tmp_path / "out", texts, tiny_encoder)
    schema = pq.read_schema(next((tmp_path / "out").glob("*.parquet")))
    assert schema.field("embedding").type == pa.list_(pa.float32(), 64)
    assert main(arguments) == 2
    assert "Ray writes into a new folder" in capsys.readouterr().err
    for field, message in (("body", "no column 'body', only 'id', 'text'"), ("id", "field 'id' is 0, expected text")):
        with pytest.raises(InputError, match=message):
            embed_on_ray(Input(str(source)), str(tmp_path / "x"), str(tiny_bundle), Fields(field), VectorOptions())
    with pytest.raises(InputError, match="a cluster cannot read this process's standard input"):
        embed_on_ray(Input("-"), str(tmp_path / "x"), str(tiny_bundle), Fields("text"), VectorOptions())
    with pytest.raises(InputError, match="was written by the engine ray"):
        embed(Input(str(source)), tmp_path / "out", VectorSource(tiny_encoder, VectorOptions()),
              Fields("text", ("id:int", "text")), append=True)  # fmt: skip


def test_urls_and_records_that_cannot_be_used(
    cluster: Any, tiny_bundle: Path, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    good = ["今天天气真好", "长" * 600, "我想退货"]
    lines = [
        '{"id": 0, "text": "今天天气真好"}',
        "{",
        json.dumps({"id": 2, "text": good[1]}),
        '{"id": 3, "text": null}',
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"id": 4, "text": good[2]}) + "\n")
    source, output = f"file://{tmp_path}/in", f"file://{tmp_path}/out"
    options = VectorOptions(precision="float16")
    summary = embed_on_ray(Input(source), output, str(tiny_bundle), Fields("text", ("id:int", "title")), options)
    assert (summary.rows, summary.truncated, summary.rejected, summary.absent) == (3, 1, 2, ("title",))
    table = pyarrow.dataset.dataset(tmp_path / "out").to_table()
    assert table["id"].to_pylist() == [0, 2, 4]
    vectors = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(3, -1)
    with pytest.warns(m3e.TruncationWarning):
        np.testing.assert_array_equal(vectors, tiny_encoder.encode(good).astype(np.float16))
    listed = (tmp_path / "out" / "_rejected" / "000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in listed] == [2, 4]
    assert json.loads(listed[1]) == {"file": "a.jsonl", "line": 4, "problem": "field 'text' is null, expected text"}


def test_an_object_store(
    cluster: Any, bucket: str, source: Path, texts: list[str], tiny_bundle: Path, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    import fsspec

    files = fsspec.filesystem("s3")
    files.put(f"{source}/", f"{bucket}/in/", recursive=True)
    fields = Fields("text", ("id:int", "text"))
    summary = embed_on_ray(Input(f"{bucket}/in"), f"{bucket}/out", str(tiny_bundle), fields, VectorOptions(), workers=2)
    assert summary.rows == len(texts)
    files.get(f"{bucket}/out/", f"{tmp_path}/out/", recursive=True)
    check(tmp_path / "out", texts, tiny_encoder)
    with pytest.raises(InputError, match="Ray writes into a new folder"):
        embed_on_ray(Input(f"{bucket}/in"), f"{bucket}/out", str(tiny_bundle), fields, VectorOptions())
    embed(Input(f"{bucket}/in"), tmp_path / "local", VectorSource(tiny_encoder, VectorOptions()), fields)
    table = pyarrow.dataset.dataset(tmp_path / "local").to_table()
    assert table["text"].to_pylist() == texts


def test_spark(
    source: Path, texts: list[str], tiny_bundle: Path, tiny_encoder: Encoder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from pyspark.sql import SparkSession

    from m3e.bulk.on_spark import embed_partitions, output_schema

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)  # without it, whatever python3 the PATH has
    spark = (
        SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1").config("spark.driver.host", "127.0.0.1").getOrCreate()
    )  # fmt: skip
    try:
        rows = spark.read.parquet(str(source)).repartition(4)
        embed = embed_partitions(str(tiny_bundle), "text")
        rows.mapInPandas(embed, output_schema(rows)).write.parquet(str(tmp_path / "out"))
    finally:
        spark.stop()
    table = pyarrow.dataset.dataset(tmp_path / "out").to_table().sort_by("id")
    assert table["text"].to_pylist() == texts
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(texts), -1)
    np.testing.assert_array_equal(vectors, tiny_encoder.encode(texts))
