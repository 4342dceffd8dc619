"""Embed files of any size; the same command goes on after a kill.

Examples:
  m3e embed rows.jsonl -o vectors --bundle bundles/m3e-base --text-field body --keep id:int
  m3e embed corpus/ -o vectors.npy --bundle bundles/m3e-base --precision float16   # every file of the folder
  zcat dump.gz | m3e embed - -o vectors.parquet --bundle bundles/m3e-base --input-format csv
  m3e embed hf:shibing624/nli-zh@train -o vectors --bundle bundles/m3e-base --text-field sentence1
  m3e embed rows.parquet -o vectors --bundle bundles/m3e-base --engine ray --workers 8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from m3e.bulk.embed import ROWS_PER_PART, embed
from m3e.bulk.inputs import Input
from m3e.bulk.readers import READERS
from m3e.bulk.records import KEEP_TYPES, Fields
from m3e.bulk.vectors import VectorOptions, VectorSource, VectorType
from m3e.encoder import Encoder
from m3e.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "input",
        help="a file, a folder of files, - for standard input, a URL, a folder written by datasets.save_to_disk, or "
        "hf:NAME[@SPLIT]; files may be compressed",
    )
    parser.add_argument("-o", "--output", required=True, help="NAME.parquet, NAME.npy, NAME.jsonl, or a folder for "
                        "Parquet parts")  # fmt: skip
    parser.add_argument("--bundle", required=True, help="folder written by convert.py")
    parser.add_argument("--input-format", choices=list(READERS), help="default: by the ending; text for -")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column to embed (default: text)")
    parser.add_argument("--keep", nargs="+", default=[], metavar="NAME[:TYPE]", help="fields to copy to the output; "
                        f"TYPE is one of {', '.join(KEEP_TYPES)} (default: string)")  # fmt: skip
    parser.add_argument("--no-text", action="store_true", help="leave the text out of the output")
    parser.add_argument("--precision", choices=get_args(VectorType), default="float32", help="of the vectors")
    parser.add_argument("--normalize", action="store_true", help="scale vectors to unit length")
    parser.add_argument("--truncate-dim", type=int, metavar="N", help="keep the first N dimensions")
    parser.add_argument("--prompt-name", metavar="NAME", help="put the model's prompt of this name before each text")
    parser.add_argument("--graph-precision", default="auto", metavar="P", help="fp32, ... (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: what affinity and quota allow")
    parser.add_argument("--rows-per-part", type=int, default=ROWS_PER_PART, metavar="N", help="rows between two "
                        f"commits, and in a Parquet part (default: {ROWS_PER_PART})")  # fmt: skip
    parser.add_argument("--append", action="store_true", help="put the rows behind those of a complete job; the output "
                        "must be a folder of the same space")  # fmt: skip
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="ray: on a Ray cluster")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="encoders in the Ray cluster")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    options = VectorOptions(
        precision=parsed.precision,
        normalize=parsed.normalize,
        truncate_dim=parsed.truncate_dim,
        prompt_name=parsed.prompt_name,
    )
    bare = parsed.no_text or parsed.output.endswith(".npy")
    fields = Fields(parsed.text_field, tuple(parsed.keep) + (() if bare else (parsed.text_field,)))
    source = Input(parsed.input, parsed.input_format)
    if parsed.engine == "ray":
        from m3e.bulk.on_ray import embed_on_ray

        if parsed.append:
            raise InputError("--append is not for --engine ray; choose another -o")
        summary = embed_on_ray(
            source, parsed.output, parsed.bundle, fields, options,
            graph_precision=parsed.graph_precision, workers=parsed.workers, threads=parsed.threads,
        )  # fmt: skip
    else:
        if "://" in parsed.output:
            raise InputError(
                f"{parsed.output!r} is a URL, and --engine local writes files; choose a path, or --engine ray"
            )
        encoder = Encoder(parsed.bundle, precision=parsed.graph_precision, num_threads=parsed.threads)
        summary = embed(
            source,
            Path(parsed.output),
            VectorSource(encoder, options),
            fields,
            rows_per_part=parsed.rows_per_part,
            append=parsed.append,
        )
    speed = f", {summary.new_rows / summary.seconds:,.0f} rows/s" if summary.new_rows else ", nothing was left to do"
    sys.stdout.write(
        f"{parsed.output}: {summary.rows:,} vectors, {summary.truncated:,} of texts that were cut, "
        f"{summary.rejected:,} records rejected{speed}\n"
    )
    if summary.absent:
        sys.stderr.write(f"m3e: no record has a value in {', '.join(map(repr, summary.absent))}; its column is null\n")
