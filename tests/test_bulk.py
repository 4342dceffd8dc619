"""m3e embed: every input and output, and what is wrong with either."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

import m3e
from m3e import Encoder, InputError
from m3e.bulk import readers
from m3e.bulk.inputs import Input
from m3e.bulk.records import Fields
from m3e.bulk.vectors import VectorOptions, VectorSource
from m3e.bulk.windows import windows
from m3e.cli.main import main
from tests.bulk_jobs import COMMAND, FORMS, read, run, short_texts, write_jsonl


@pytest.mark.parametrize("form", FORMS)
def test_vectors_are_encodes_own_in_input_order(tiny_encoder: Encoder, tmp_path: Path, form: str) -> None:
    texts = [*short_texts(300), "", "同", "同", "长" * 600, *short_texts(50, seed=1)]
    summary = run(write_jsonl(tmp_path / "in.jsonl", texts), tmp_path / form, tiny_encoder, rows_per_part=100)
    assert (summary.rows, summary.new_rows, summary.rejected, summary.truncated) == (354, 354, 0, 1)
    rows, vectors = read(tmp_path / form)
    assert rows == list(range(354))
    with pytest.warns(m3e.TruncationWarning):
        np.testing.assert_array_equal(vectors, tiny_encoder.encode(texts))
    assert run(tmp_path / "in.jsonl", tmp_path / form, tiny_encoder, rows_per_part=100).new_rows == 0


def csv_bytes(texts: list[str]) -> bytes:
    return ("\ufeffid,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts))).encode()


def parquet_bytes(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), file, row_group_size=7)
    return file.getvalue()


INPUTS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": lambda texts: "\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)).encode(),
    "a.csv": csv_bytes,
    "a.tsv": lambda texts: ("id\ttext\n" + "".join(f"{i}\t{t}\r\n" for i, t in enumerate(texts))).encode(),
    "a.txt": lambda texts: "\n".join(texts).encode(),
    "a.parquet": parquet_bytes,
    "a.jsonl.gz": lambda texts: gzip.compress(INPUTS["a.jsonl"](texts)),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("skip", [0, 1, 6, 7, 8, 29, 30])
def test_a_reader_goes_on_from_any_record(tmp_path: Path, name: str, skip: int) -> None:
    texts = short_texts(30)
    (tmp_path / name).write_bytes(INPUTS[name](texts))
    fields = Fields("text", () if name == "a.txt" else ("id:int",))
    records = list(Input(str(tmp_path / name)).records(fields, (0, skip)))
    assert [record.text for record in records] == texts[skip:]
    assert [record.number for record in records] == list(range(skip + 1, 31))
    if name != "a.txt":
        assert [record.kept for record in records] == [(i,) for i in range(skip, 30)]


def test_a_folder_is_read_by_name(tiny_encoder: Encoder, tmp_path: Path) -> None:
    folder, texts = tmp_path / "in", short_texts(90)
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_bytes(INPUTS["a.txt"](texts[30:60]))
    (folder / "a.jsonl").write_bytes(INPUTS["a.jsonl"](texts[:30]))
    (folder / "sub" / "c.parquet").write_bytes(parquet_bytes(texts[60:]))
    for other in ("image.png", ".hidden.txt", "_m3e.json"):
        (folder / other).write_bytes(b"\xff")
    run(folder, tmp_path / "out", tiny_encoder, keep=("text",), rows_per_part=20)
    assert pyarrow.dataset.dataset(tmp_path / "out").to_table()["text"].to_pylist() == texts


def test_a_data_set_written_by_datasets(tiny_encoder: Encoder, tmp_path: Path) -> None:
    import datasets

    texts = short_texts(40)
    datasets.Dataset.from_dict({"id": list(range(40)), "text": texts}).save_to_disk(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out.npy", tiny_encoder)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), tiny_encoder.encode(texts))
    assert [r.text for r in Input(str(tmp_path / "in")).records(Fields("text"), (0, 37))] == texts[37:]


def test_a_data_set_by_its_name_is_streamed(
    tiny_encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is what ``datasets`` can load without the hub."""
    texts = short_texts(40)
    (tmp_path / "named").mkdir()
    write_jsonl(tmp_path / "named" / "test.jsonl", texts)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run("hf:named@test", tmp_path / "out", tiny_encoder, keep=("id:int", "text"), rows_per_part=15)
    assert pyarrow.dataset.dataset(tmp_path / "out").to_table()["text"].to_pylist() == texts
    assert [r.text for r in Input("hf:named@test").records(Fields("text"), (0, 37))] == texts[37:]


def test_urls(tiny_encoder: Encoder, tmp_path: Path) -> None:
    import fsspec

    texts, files = short_texts(90), fsspec.filesystem("memory")
    files.pipe({
        "/in/b.txt": INPUTS["a.txt"](texts[30:60]), "/in/a.jsonl.gz": INPUTS["a.jsonl.gz"](texts[:30]),
        "/in/sub/c.parquet": parquet_bytes(texts[60:]), "/in/_rejected.jsonl": b"{", "/in/image.png": b"\xff",
    })  # fmt: skip
    run("memory://in", tmp_path / "out", tiny_encoder, keep=("text",), rows_per_part=20)
    assert pyarrow.dataset.dataset(tmp_path / "out").to_table()["text"].to_pylist() == texts
    source = Input("memory://in/b.txt")
    assert [record.text for record in source.records(Fields("text"), (0, 5))] == texts[35:60]
    assert source.identity == [["memory://in/b.txt", len(INPUTS["a.txt"](texts[30:60]))]]
    for url, message in (("memory://in/no.txt", "no input at"), ("nothing://x", "Protocol not known: nothing")):
        with pytest.raises(InputError, match=message):
            Input(url)


def test_bad_records_go_to_a_side_file(tiny_encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MAX_LINE_BYTES", 64)
    lines = [
        b'{"text": "a", "id": 1}', b"{", b"[1]", b'{"id": 3}', b'{"text": null}', b'{"text": "\\ud800"}',
        b'{"text": "b", "id": "x"}', b'{"text": "\xff"}', b'{"text": "' + b"x" * 200 + b'"}', b'{"text": "b"}',
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    summary = run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tiny_encoder, keep=("id:int",))
    assert (summary.rows, summary.rejected) == (2, 8)
    assert read(tmp_path / "out.jsonl")[0] == [0, 9]
    rejected = [json.loads(line) for line in Path(f"{tmp_path}/out.jsonl.rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejected] == [2, 3, 4, 5, 6, 7, 8, 9]
    expected = ["not JSON: ", "a JSON list, expected an object", "there is no field 'text', only id", "field 'text' is "
                "null, expected text", "lone surrogate at character 0", "field 'id' is x, expected int", "not JSON: ",
                "longer than 0 MiB"]  # fmt: skip
    for row, problem in zip(rejected, expected, strict=True):
        assert problem in row["problem"]
        assert row["file"] == "in.jsonl"


def test_bad_rows_of_csv(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b'text,id\n"two\nlines",1\nshort\n\xff,3\n"' + b"x" * 200_000 + b'",4\nlast,5\n')
    records = list(Input(str(tmp_path / "in.csv")).records(Fields("text")))
    assert [(record.text, record.line) for record in records if record.text] == [("two\nlines", 3), ("last", 7)]
    assert [record.problem.split(":")[0] for record in records if not record.text] == [
        "1 values, the header has 2", "field 'text' is not valid Unicode", "not CSV"]  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("float32", {}),
        ("float16", {}),
        ("int8", {}),
        ("float16", {"normalize": True, "truncate_dim": 8}),
        ("int8", {"normalize": True}),
    ],
)
@pytest.mark.parametrize("form", FORMS[:3])
def test_vector_types(
    tiny_encoder: Encoder, tmp_path: Path, precision: Any, options: dict[str, Any], form: str
) -> None:
    texts = short_texts(40)
    run(write_jsonl(tmp_path / "in.jsonl", texts), tmp_path / form, tiny_encoder,
        options=VectorOptions(precision=precision, **options))  # fmt: skip
    expected = tiny_encoder.encode(
        texts, precision="int8" if precision == "int8" else "float32",
        normalize_embeddings=options.get("normalize", False), truncate_dim=options.get("truncate_dim"),
    ).astype(precision)  # fmt: skip
    vectors = read(tmp_path / form)[1]
    assert vectors.dtype == expected.dtype
    np.testing.assert_array_equal(vectors, expected)


def test_parquet_is_a_fixed_size_list_that_names_its_space(tiny_encoder: Encoder, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", short_texts(10))
    run(source, tmp_path / "out.parquet", tiny_encoder, keep=("id:int", "text"))
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.names == ["row", "id", "text", "truncated", "embedding"]
    assert schema.field("embedding").type == pa.list_(pa.float32(), 64)
    assert json.loads(schema.metadata[b"m3e"])["space_id"] == tiny_encoder.manifest.space_id


def test_equal_texts_of_a_window_are_embedded_once(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = VectorSource(tiny_encoder, VectorOptions())
    seen: list[str] = []
    encode = tiny_encoder.encode

    def counting(texts: Any, *args: Any, **arguments: Any) -> Any:
        seen.extend(texts)
        return encode(texts, *args, **arguments)

    monkeypatch.setattr(tiny_encoder, "encode", counting)
    vectors, _ = source.embed(["a", "b", "a", "a"])
    assert seen == ["a", "b"]
    np.testing.assert_array_equal(vectors, encode(["a", "b", "a", "a"]))


def test_windows_are_bounded_by_records_and_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3e.bulk.windows._MAX_WINDOW_CHARACTERS", 10)
    (tmp_path / "in.txt").write_text("123456\n123456\n" + "1\n" * 7)
    found = list(windows(Input(str(tmp_path / "in.txt")).records(Fields("text")), 100, 5))
    assert [(window.rows, window.position) for window in found] == [
        ([100, 101], (0, 2)), ([102, 103, 104, 105, 106], (0, 7)), ([107, 108], (0, 9))]  # fmt: skip


def test_the_command(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", short_texts(20))
    arguments = ["embed", str(source), "-o", str(tmp_path / "out"), "--bundle", str(tiny_bundle), "--keep", "id:int"]
    assert main(arguments) == 0
    assert f"{tmp_path}/out: 20 vectors, 0 of texts that were cut, 0 records rejected, " in capsys.readouterr().out
    assert main(arguments) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert pq.read_schema(tmp_path / "out/part-000000.parquet").names == ["row", "id", "text", "truncated", "embedding"]


def test_standard_input(tiny_bundle: Path, tiny_encoder: Encoder, tmp_path: Path) -> None:
    texts = short_texts(20)
    command = [sys.executable, "-c", COMMAND, "embed", "-", "-o", str(tmp_path / "o.npy"), "--bundle", str(tiny_bundle)]
    environment = os.environ | {"PYTHONPATH": str(Path(m3e.__file__).parents[1])}
    subprocess.run(command, env=environment, input="\n".join(texts).encode(), check=True, capture_output=True)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), tiny_encoder.encode(texts))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl", "-o", "out"], "no input at 'missing.jsonl'"),
        (["in.xyz", "-o", "out"], "the format of 'in.xyz' is not known from its ending"),
        (["in.jsonl", "-o", "out", "--text-field", "body"], "there is no field 'body', only id, text. Name the text's"),
        (["in.csv", "-o", "out", "--text-field", "body"], "no column 'body', only 'id', 'text'"),
        (["in.jsonl", "-o", "full"], "'full' holds files of something else"),
        (["in.jsonl", "-o", "x.npy", "--keep", "id"], "an .npy file holds vectors alone"),
        (["in.jsonl", "-o", "out", "--keep", "id", "id:int"], "two columns named 'id'"),
        (["in.jsonl", "-o", "out", "--keep", "id:integer"], "'integer' in --keep 'id:integer' is no type"),
        (["in.jsonl", "-o", "out.csv"], "'out.csv' would be a folder; files end in .parquet, .npy or .jsonl"),
        (["in.jsonl", "-o", "there.npy"], "'there.npy' exists and is not this job's output"),
        (["in.jsonl", "-o", "out", "--rows-per-part", "0"], "rows_per_part is 0"),
        (["in.jsonl", "-o", "out", "--truncate-dim", "99"], "truncate_dim is 99"),
        (["in.jsonl", "-o", "out", "--prompt-name", "q"], "no prompt named 'q'"),
        (["empty", "-o", "out"], "'empty' holds no file that ends in"),
        (["in.jsonl", "-o", "s3://bucket/out"], "'s3://bucket/out' is a URL, and --engine local writes files"),
    ],
)
def test_what_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("in.jsonl"), ["a"])
    Path("in.csv").write_bytes(csv_bytes(["a"]))
    for name in ("in.xyz", "there.npy"):
        Path(name).write_bytes(b"")
    for name in ("full", "empty"):
        Path(name).mkdir()
    Path("full/of.something").write_bytes(b"")
    assert main(["embed", *arguments, "--bundle", str(tiny_bundle)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert message in said.err


def test_a_field_that_no_record_has_is_said(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b", "id": 2}\n', encoding="utf-8")
    for name, said in (("id:int", ""), ("ID:int", "m3e: no record has a value in 'ID'; its column is null\n")):
        out = str(tmp_path / name[:2])
        assert main(["embed", str(tmp_path / "in.jsonl"), "-o", out, "--bundle", str(tiny_bundle), "--keep", name]) == 0
        assert capsys.readouterr().err == said


def test_a_number_beyond_all_bounds_is_a_rejected_record(tiny_encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 1e999}\n', encoding="utf-8")
    run(tmp_path / "in.jsonl", tmp_path / "out", tiny_encoder, keep=("id:int",))
    assert "field 'id' is inf, expected int" in (tmp_path / "out" / "_rejected.jsonl").read_text(encoding="utf-8")


def test_a_prompt_is_given_as_the_library_takes_it(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined to the text, it would be pooled by models that leave prompts out."""
    given: list[Any] = []
    encode = Encoder.encode

    def listen(self: Encoder, texts: Any, **named: Any) -> Any:
        given.append((texts, named["prompt"]))
        return encode(self, texts, **named)

    monkeypatch.setattr(Encoder, "encode", listen)
    source = VectorSource(tiny_encoder, VectorOptions())
    source._prompt = "问："
    source.embed(["a"])
    assert given[-1] == (["a"], "问：")
