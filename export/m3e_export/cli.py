"""The command line of the exporter: ``python export/convert.py`` and ``m3e convert``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from m3e.bundle import PRECISIONS
from m3e.cli.guard import run_guarded
from m3e.cli.info import certificate_lines
from m3e.errors import DependencyError

_EXAMPLES = """\
examples:
  python export/convert.py moka-ai/m3e-base -o bundles/m3e-base
  python export/convert.py moka-ai/m3e-base -o bundles/m3e-base --cpu vnni avx2 --eval sts.tsv
  python export/convert.py moka-ai/m3e-base -o bundles/m3e-base --target cpu cuda
  python export/convert.py my-fine-tune/ -o bundles/mine --max-seq-length 256 --normalize
  python export/convert.py some-org/deberta -o bundles/deberta --frontend optimum
  HF_ENDPOINT=https://mirror.example python export/convert.py moka-ai/m3e-small -o bundles/m3e-small
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the exporter; the exit code is returned."""
    parser = _parser(
        prog, "Convert a sentence-embedding checkpoint (M3E and other BERTs) into a bundle of ONNX graphs.", _EXAMPLES
    )
    parser.add_argument("checkpoint", help="folder or hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the bundle's folder")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        help="graphs to make; fp16 is for cuda and tensorrt, int8 for cpu and tensorrt (default: fp32 and int8 for "
        "cpu, fp16 for the others)",
    )
    parser.add_argument(
        "--target",
        nargs="+",
        choices=["cpu", "cuda", "tensorrt"],
        default=["cpu"],
        help="what they are to run on (default: cpu, whose fp32 graph runs with CUDA too)",
    )
    parser.add_argument("--frontend", choices=["builder", "optimum"], default="builder",
                        help="builder (default) knows BERT and its kin, optimum traces others")  # fmt: skip
    parser.add_argument(
        "--max-seq-length", type=int, metavar="N", help="longest text in tokens (default: the checkpoint's)"
    )
    parser.add_argument("--with-token-embeddings", action="store_true",
                        help="also output last_hidden_state, for tools that pool outside the graph")  # fmt: skip
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction,
                        help="unit length inside the graph, or not (default: as the checkpoint)")  # fmt: skip
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--cpu",
        nargs="+",
        choices=["vnni", "avx2"],
        help="processors to make int8 graphs for: vnni, or avx2 for those without it, with 7-bit weights "
        "(default: as this processor)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="UTF-8 file of texts to calibrate int8 on, one a line (default: those that come along)",
    )
    parser.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="UTF-8 file of sentence1<TAB>sentence2<TAB>label: Spearman's correlation and the ten nearest "
        "neighbours join the certificate",
    )
    parser.add_argument(
        "--accept-accuracy",
        action="store_true",
        help="publish an int8 or fp16 graph that loses more than allowed, and record that",
    )
    parser.add_argument("--force", action="store_true", help="replace the bundle that is there")
    parser.set_defaults(run=_run)
    return run_guarded(parser.parse_args(arguments))


_PULL_EXAMPLES = """\
examples:
  m3e pull moka-ai/m3e-base                                  # then Encoder("moka-ai/m3e-base") needs no network
  m3e pull moka-ai/m3e-base --revision v1 --precision fp32 int8
  m3e pull modelscope:Jerry0/m3e-base
  XDG_CACHE_HOME=/image/cache m3e pull moka-ai/m3e-base      # into an image that will have no network
"""


def pull_main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run ``m3e pull``; the exit code is returned."""
    parser = _parser(prog, "Convert a model of a hub into the cache, where Encoder(ID) finds it.", _PULL_EXAMPLES)
    parser.add_argument("id", help="hub id")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: the hub's default branch)")
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "int8"], default=["fp32"], help="graphs to make (default: fp32)"
    )
    parser.set_defaults(run=_run_pull)
    return run_guarded(parser.parse_args(arguments))


def _parser(prog: str | None, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _report(step: str) -> None:
    print(step, file=sys.stderr)


def _run_pull(parsed: argparse.Namespace) -> None:
    _require_packages()
    from m3e_export.pull import pull

    print(pull(parsed.id, revision=parsed.revision, precisions=parsed.precision, report=_report))


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise DependencyError(f'converting needs {error.name}: pip install "m3e-runtime[cpu,export]"') from error
    from m3e.session import import_onnxruntime

    import_onnxruntime()


def _default_precisions(parsed: argparse.Namespace) -> list[str]:
    """What is best on each target: int8, beside the exact fp32, and fp16."""
    precisions = ["fp32", "int8"] if "cpu" in parsed.target else []
    return precisions + ["fp16"] * (parsed.target != ["cpu"])


def _run(parsed: argparse.Namespace) -> None:
    _require_packages()
    from m3e_export.pipeline import convert

    manifest = convert(
        parsed.checkpoint,
        parsed.output,
        precisions=parsed.precision or _default_precisions(parsed),
        targets=parsed.target,
        frontend=parsed.frontend,
        max_seq_length=parsed.max_seq_length,
        normalize=parsed.normalize,
        with_token_embeddings=parsed.with_token_embeddings,
        revision=parsed.revision,
        force=parsed.force,
        cpus=parsed.cpu,
        calibration=parsed.calibration,
        evaluation=parsed.eval,
        accept_accuracy=parsed.accept_accuracy,
        report=_report,
    )
    for graph in manifest.graphs:
        assert graph.certificate is not None
        print(f"{parsed.output / graph.file}: certified")
        print("\n".join(certificate_lines(graph.certificate)))
