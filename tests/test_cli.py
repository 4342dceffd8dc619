"""The command line: in process where that is enough, as a process of its own where streams matter."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import m3e
import m3e_export
from m3e import Encoder
from m3e.cli.main import main
from m3e.manifest import Manifest

COMMAND = "from m3e.cli.main import main; raise SystemExit(main())"
ROOTS = os.pathsep.join(str(Path(str(package.__file__)).parents[1]) for package in (m3e, m3e_export))
TEXTS = ["今天天气真好", "", "a 🍜 “quoted”", "长" * 510, "长" * 511]


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's command, as installing the package registers it."""
    entries = [metadata.EntryPoint("convert", "m3e_export.cli:main", "m3e.commands")]
    monkeypatch.setattr("m3e.cli.main.metadata", SimpleNamespace(entry_points=lambda group: entries))


@pytest.fixture
def folders(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    """Names for a table of command lines; the working folder is the test's own."""
    monkeypatch.chdir(tmp_path)
    return {"bundle": tiny_bundle, "checkpoint": tiny_checkpoint}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """More lines than a pipe's buffer takes once they are embedded."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"text {i}\n" for i in range(300)), encoding="utf-8")
    return path


def process(*arguments: object, before: str = "", **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run m3e with buffered output, as a shell starts it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": ROOTS, **options.pop("environment", {})}
    command = [sys.executable, "-c", before + COMMAND, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stdin": None if "input" in options else subprocess.DEVNULL, **options}
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, check=False, **options)


def assert_rows(output: str | bytes, encoder: Encoder, texts: list[str], **arguments: Any) -> None:
    rows = [json.loads(line) for line in output.splitlines()]
    expected, counts = encoder.encode(texts, **arguments), encoder.count_tokens(texts)
    assert [row["text"] for row in rows] == texts
    assert [row["tokens"] for row in rows] == np.minimum(counts, encoder.max_seq_length).tolist()
    assert [row["truncated"] for row in rows] == (counts > encoder.max_seq_length).tolist()
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], dtype=expected.dtype), expected)


@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
def test_lines_of_standard_input(tiny_bundle: Path, tiny_encoder: Encoder) -> None:
    source = "\r\n".join(TEXTS).encode()
    done = process("encode", tiny_bundle, input=source, environment={"PYTHONIOENCODING": "gbk"})
    assert (done.returncode, done.stderr.decode().count("warning: 1 of 5 texts are longer than 512 tokens")) == (0, 1)
    assert_rows(done.stdout, tiny_encoder, TEXTS)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        pytest.param([], {}, id="plain"),
        pytest.param(["--normalize", "--truncate-dim", "8"], {"normalize_embeddings": True, "truncate_dim": 8}, id="8"),
        pytest.param(["--precision", "ubinary", "--graph-precision", "fp32"], {"precision": "ubinary"}, id="ubinary"),
        pytest.param(["--precision", "int8", "--threads", "1"], {"precision": "int8"}, id="int8"),
    ],
)
def test_texts_to_json_lines(
    tiny_bundle: Path,
    tiny_encoder: Encoder,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    arguments: dict[str, Any],
) -> None:
    assert main(["encode", str(tiny_bundle), *TEXTS[:3], *options]) == 0
    assert_rows(capsys.readouterr().out, tiny_encoder, TEXTS[:3], **arguments)


def test_files_in_and_out(tiny_bundle: Path, tiny_encoder: Encoder, lines: Path, tmp_path: Path) -> None:
    texts = lines.read_text("utf-8").splitlines()
    for name in ("out.jsonl", "out.npy"):
        assert main(["encode", str(tiny_bundle), "-i", str(lines), "-o", str(tmp_path / name)]) == 0
    assert_rows((tmp_path / "out.jsonl").read_bytes(), tiny_encoder, texts)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), tiny_encoder.encode(texts))


def test_npy_into_a_pipe(tiny_bundle: Path, tiny_encoder: Encoder, lines: Path) -> None:
    done = process("encode", tiny_bundle, "--format", "npy", "-i", lines)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = tiny_encoder.encode(lines.read_text("utf-8").splitlines())
    np.testing.assert_array_equal(np.load(io.BytesIO(done.stdout)), expected)


@pytest.mark.parametrize("format_", ["jsonl", "npy"])
def test_empty_standard_input(tiny_bundle: Path, format_: str) -> None:
    done = process("encode", tiny_bundle, "--format", format_, input=b"")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"" if format_ == "jsonl" else np.load(io.BytesIO(done.stdout)).shape == (0, 64)


def test_head_closes_the_pipe(tiny_bundle: Path, lines: Path) -> None:
    reader, writer = os.pipe()
    head = subprocess.Popen(["head", "-1"], stdin=reader, stdout=subprocess.PIPE)
    os.close(reader)
    done = process("encode", tiny_bundle, "-i", lines, stdout=writer)
    os.close(writer)
    assert json.loads(head.communicate()[0])["text"] == "text 0"
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_reader_that_has_gone_before_the_first_line(tiny_bundle: Path, command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = process(command, tiny_bundle, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to write to")
@pytest.mark.parametrize("arguments", [("info",), ("encode", "a")], ids=lambda arguments: str(arguments[0]))
def test_a_full_disk(tiny_bundle: Path, arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = process(arguments[0], tiny_bundle, *arguments[1:], stdout=full)
    assert (done.returncode, done.stderr) == (1, b"error: No space left on device\n")


def test_info(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tiny_bundle)]) == 0
    said = capsys.readouterr().out
    for fact in ("m3e-tiny", "bert, 2 layers x 64", "64 dimensions, mean pooling", "512 tokens", "fp32 for cpu, 6 MB"):
        assert fact in said
    assert "accepted" not in said  # it was not refused, so there was nothing to accept
    assert main(["info", str(tiny_bundle), "--json"]) == 0
    manifest = Manifest.from_bytes((tiny_bundle / "manifest.json").read_bytes())
    shown = json.loads(capsys.readouterr().out)
    assert shown["space_id"] == manifest.space_id
    assert shown["graphs"][0]["certificate"]["reference"] == str(manifest.graphs[0].certificate.reference)  # type: ignore[union-attr]


def test_verify(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle)]) == 0
    assert "8 files match the manifest\nonnx/model.onnx: golden texts differ by" in capsys.readouterr().out
    damaged = Path(shutil.copytree(tiny_bundle, tmp_path / "damaged"))
    (damaged / "vocab.txt").write_bytes((damaged / "vocab.txt").read_bytes().swapcase())
    assert main(["verify", str(damaged)]) == 1
    assert_one_line(capsys, "vocab.txt' is damaged")


def test_convert(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bundle"
    arguments = ["convert", str(tiny_checkpoint), "-o", str(target), "--max-seq-length", "16", "--normalize"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert f"{target}/onnx/model.onnx: certified" in said.out
    assert "building the fp32 graph" in said.err
    encoder = Encoder(target)
    assert encoder.max_seq_length == 16
    assert np.linalg.norm(encoder.encode("你好")) == pytest.approx(1, abs=1e-6)
    assert main(arguments) == 1
    assert_one_line(capsys, "already holds a bundle; --force replaces it")
    assert main(["convert", "no such folder", "-o", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.startswith(
        "reading no such folder\nerror: 'no such folder' is neither a folder here"
    )


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "missing"], 1, "no bundle at 'missing'"),
        (["verify", "missing"], 1, "no bundle at 'missing'"),
        (["encode", "missing", "a"], 1, "no bundle at 'missing'"),
        (["encode", "{checkpoint}", "a"], 1, "convert it"),
        (["encode", "{bundle}", "-i", "missing"], 2, "No such file or directory: missing"),
        (["encode", "{bundle}", "a", "-o", "missing/out"], 2, "No such file or directory: missing/out"),
        (["encode", "{bundle}", "a", "--graph-precision", "int3"], 1, "no int3 graph for cpu"),
        (["encode", "{bundle}", "a", "--truncate-dim", "65"], 2, "truncate_dim is 65, expected 1 to 64"),
        (["encode", "{bundle}", "a", "--threads", "0"], 2, "num_threads is 0"),
        (["encode", "{bundle}", "a", "--prompt-name", "q"], 2, "no prompt named 'q'"),
        (["encode", "{bundle}", "a", "\udcff"], 2, "text 1 is not valid Unicode"),
        (["encode", "{bundle}", "-i", "gbk"], 2, "line 2 of 'gbk' is not UTF-8 at byte 2; convert it first"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line_and_a_code(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    Path("gbk").write_bytes("ok\na 今天\n".encode("gbk"))
    assert main([argument.format(**folders) for argument in arguments]) == code
    assert_one_line(capsys, message)


def test_gbk_on_standard_input(tiny_bundle: Path) -> None:
    done = process("encode", tiny_bundle, input="ok\n今天\n".encode("gbk"))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(
        b"error: line 2 of 'standard input' is not UTF-8 at byte 0; convert it first, for GBK:"
    )


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["encode"], ["encode", "b", "--precision", "int3"],
                                       ["convert", "c", "-o", "b", "--precision", "fp17"]])  # fmt: skip
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: m3e" in capsys.readouterr().err


COMMANDS = ["calibrate", "convert", "embed", "encode", "export-triton", "info", "serve", "verify"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    usage, examples = capsys.readouterr().out.lower().split("examples:\n")
    assert usage.startswith(f"usage: m3e {command} ")
    assert examples.startswith(("  m3e " + command, "  python export/convert.py"))


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in said


@pytest.mark.parametrize(("command", "code"), [("encode", 1), ("verify", 1), ("info", 0)])
def test_without_onnxruntime(tiny_bundle: Path, command: str, code: int) -> None:
    done = process(command, tiny_bundle, before="import sys; sys.modules['onnxruntime'] = None; ")
    assert done.returncode == code
    message = 'error: onnxruntime is not installed; install one of: pip install "m3e-runtime[cpu]"'
    assert done.stderr.decode().startswith(message if code else "")
    assert done.stderr.count(b"\n") == code


def test_npy_is_not_written_to_a_terminal(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["encode", str(tiny_bundle), "a", "--format", "npy"]) == 2
    assert_one_line(capsys, "standard output is a terminal; give -o FILE or pipe it")


def test_an_interrupt(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("m3e.cli.encode.Encoder", interrupted)
    assert main(["encode", str(tiny_bundle), "a"]) == 130
    assert capsys.readouterr() == ("", "")


def test_an_encode_that_fails_leaves_its_files_as_they_were(tiny_bundle: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts", tmp_path / "out.jsonl"
    texts.write_text("a\nb\n", encoding="utf-8")
    out.write_text("kept", encoding="utf-8")
    bundle = str(tiny_bundle)
    assert main(["encode", bundle, "-i", str(texts), "-o", str(texts)]) == 2
    assert main(["encode", bundle, "-i", str(tmp_path / "none"), "-o", str(out)]) == 2
    assert main(["encode", bundle, "a", "--prompt-name", "none", "-o", str(out)]) == 2
    assert main(["encode", bundle, "a", "-i", str(texts), "-o", str(out)]) == 2
    assert (texts.read_text(encoding="utf-8"), out.read_text(encoding="utf-8")) == ("a\nb\n", "kept")
    assert main(["encode", bundle, "-i", str(texts), "-o", str(out)]) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2


def test_a_plugin_without_its_packages_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = metadata.EntryPoint("bench", "no_such_package:main", "m3e.commands")
    monkeypatch.setattr("m3e.cli.main.metadata", SimpleNamespace(entry_points=lambda group: [entry]))
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == (
        "error: m3e bench needs a package that is not installed: No module named 'no_such_package'\n"
    )


@pytest.mark.filterwarnings("default::m3e.TruncationWarning")
def test_encode_counts_the_prompts_tokens_too(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "prompted"))
    manifest = Manifest.from_bytes((bundle / "manifest.json").read_bytes())
    model = dataclasses.replace(manifest.model, prompts={"query": "问" * 10})
    (bundle / "manifest.json").write_bytes(dataclasses.replace(manifest, model=model).to_bytes())
    longest = manifest.model.max_seq_length
    assert main(["encode", str(bundle), "好", "好" * (longest - 5), "--prompt-name", "query"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["tokens"], row["truncated"]) for row in rows] == [(13, False), (longest, True)]
