"""Write a Triton Inference Server model repository for a bundle.

Examples:
  m3e export-triton bundles/m3e-base -o model_repository
  tritonserver --model-repository model_repository
  m3e export-triton bundles/m3e-base -o model_repository --precision fp32 --name m3e --device gpu

Three models: NAME takes texts (TYPE_STRING, one a row) and gives float32 vectors; it is an ensemble of NAME_tokenizer
(Triton's Python backend, with the package tokenizers) and NAME_graph (its onnxruntime backend).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from m3e.bundle import Bundle
from m3e.errors import InputError
from m3e.triton import write_repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", help="folder written by convert.py")
    parser.add_argument("-o", "--output", required=True, help="model repository; made if missing")
    parser.add_argument("--name", help="of the model (default: the bundle folder's)")
    parser.add_argument("--precision", default="fp32", help="graph to export (default: fp32)")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="where Triton runs it (default: cpu)")
    parser.add_argument("--max-batch-size", type=int, default=64, metavar="N", help="texts of a batch (default: 64)")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    if parsed.max_batch_size < 1:
        raise InputError(f"--max-batch-size is {parsed.max_batch_size}, expected at least 1")
    bundle = Bundle(parsed.bundle)
    name = parsed.name or Path(parsed.bundle).resolve().name
    graph = bundle.graph(parsed.precision, "cpu")
    written = write_repository(
        bundle, graph, Path(parsed.output), name=name, device=parsed.device, max_batch_size=parsed.max_batch_size
    )
    sys.stdout.write("\n".join(map(str, written)) + "\n")
