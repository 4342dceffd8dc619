"""Embed lines of text.

Examples:
  m3e encode bundles/m3e-base 今天天气真好            # JSON lines on standard output
  m3e encode bundles/m3e-base -i texts.txt -o out.npy  # float32 (n, dim)
  cat texts.txt | m3e encode bundles/m3e-base | jq .embedding
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, get_args

import numpy as np

from m3e.backends import DEVICES
from m3e.encoder import Encoder
from m3e.errors import InputError
from m3e.prompts import find_prompt
from m3e.vectors import EmbeddingPrecision

_WINDOW = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", help="folder written by convert.py, or hub id")
    parser.add_argument("text", nargs="*", default=[], help="texts; without any, lines are read from --input")
    parser.add_argument(
        "-i", "--input", default="-", help="UTF-8 file with a text a line; - is standard input (default)"
    )
    parser.add_argument("-o", "--output", default="-", help="file to write; - is standard output (default)")
    parser.add_argument("--format", choices=["jsonl", "npy"], help="default: by the ending of --output, else jsonl")
    parser.add_argument("--graph-precision", default="auto", metavar="P", help="fp32, ... (default: auto)")
    parser.add_argument("--precision", choices=get_args(EmbeddingPrecision), default="float32", help="of the vectors")
    parser.add_argument("--normalize", action="store_true", help="scale vectors to unit length")
    parser.add_argument("--truncate-dim", type=int, metavar="N", help="keep the first N dimensions")
    parser.add_argument("--prompt-name", metavar="NAME", help="put the model's prompt of this name before each text")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="what runs the model (default: cpu)")
    parser.add_argument("--device-id", type=int, default=0, metavar="N", help="which card (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: what affinity and quota allow")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    format_ = parsed.format or ("npy" if parsed.output.endswith(".npy") else "jsonl")
    if format_ == "npy" and parsed.output == "-" and sys.stdout.isatty():
        raise InputError("npy is binary and standard output is a terminal; give -o FILE or pipe it")
    if parsed.text and parsed.input != "-":
        raise InputError(f"texts were given both as arguments and in {parsed.input!r}; give one of them")
    if "-" not in (parsed.input, parsed.output) and _same(parsed.input, parsed.output):
        raise InputError(f"{parsed.output!r} is the input as well; give -o another name")
    encoder = Encoder(
        parsed.bundle,
        precision=parsed.graph_precision,
        device=parsed.device,
        num_threads=parsed.threads,
        device_id=parsed.device_id,
    )
    arguments = {
        "normalize_embeddings": parsed.normalize,
        "truncate_dim": parsed.truncate_dim,
        "precision": parsed.precision,
        "prompt_name": parsed.prompt_name,
    }
    with contextlib.ExitStack() as files:
        source: Any = parsed.text or _lines(parsed.input, files)
        if format_ == "npy":
            texts = list(source)
            embeddings = encoder.encode(texts, **arguments)
            binary: BinaryIO = (
                sys.stdout.buffer if parsed.output == "-" else files.enter_context(Path(parsed.output).open("wb"))
            )
            # Through write alone: np.save asks a real file for its position, and a pipe has none.
            writer: Any = types.SimpleNamespace(write=binary.write)
            np.save(writer, embeddings)
        else:
            out: TextIO | None = sys.stdout if parsed.output == "-" else None
            for rows in _jsonl(encoder, iter(source), arguments):
                # Not before there is something to write: an error leaves the file as it was.
                out = out or files.enter_context(Path(parsed.output).open("w", encoding="utf-8"))
                out.writelines(rows)
                out.flush()
            if out is None:  # no texts, no rows
                Path(parsed.output).write_bytes(b"")


def _same(a: str, b: str) -> bool:
    return Path(a).exists() and Path(b).exists() and Path(a).samefile(b)


def _lines(path: str, files: contextlib.ExitStack) -> Iterator[str]:
    stream: BinaryIO = sys.stdin.buffer
    if path != "-":
        stream = files.enter_context(Path(path).open("rb"))  # noqa: SIM115 (closed by the stack)
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"line {number} of {'standard input' if path == '-' else path!r} is not UTF-8 at byte {error.start}; "
                "convert it first, for GBK: iconv -f GBK -t UTF-8"
            ) from error


def _jsonl(encoder: Encoder, texts: Iterator[str], arguments: dict[str, Any]) -> Iterator[list[str]]:
    """Give an object a text, as lines, window by window, so that a pipe of any length needs no memory of its length."""
    prompt = find_prompt(encoder.manifest.model, arguments["prompt_name"], None)
    while window := list(itertools.islice(texts, _WINDOW)):
        counts = encoder.count_tokens([prompt + text for text in window], exact=False)
        rows = (
            {
                "text": text,
                "tokens": min(int(count), encoder.max_seq_length),
                "truncated": bool(count > encoder.max_seq_length),
                "embedding": embedding.tolist(),
            }
            for text, count, embedding in zip(window, counts, encoder.encode(window, **arguments), strict=True)
        )
        yield [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
