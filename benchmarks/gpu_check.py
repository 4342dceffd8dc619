"""Everything about GPUs that only a GPU can show: parity, invariance and speed, on the card of this machine.

  make gpu-check PYTHON=python3                           # m3e-base's shape with random weights, and its record
  make gpu-check PYTHON=python3 ARGS="--checkpoint DIR"   # a trained model
  make gpu-check ARGS="--device cpu --shape tiny --seconds 0.2"   # the script itself, anywhere

Needs nothing but this checkout, onnxruntime-gpu, onnx, torch with CUDA, transformers and sentence-transformers. Writes
``benchmarks/results/gpu-CARD.json``. Where TensorRT does not load the record says why. Exits with 1 where a figure
misses what docs/gpu.md promises.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from m3e import Encoder, M3EError, __version__
from m3e.backends import AnySession
from m3e.cli.guard import run_guarded
from m3e.gpu import read_card
from m3e_bench.checkpoints import SHAPES, write_checkpoint
from m3e_export.pipeline import convert
from m3e_export.texts import corpus

RESULTS = Path(__file__).parent / "results"
# Precision and device of each run; those of TensorRT are left out, with the reason, where it does not load.
RUNS = (("fp32", "cuda"), ("fp16", "cuda"), ("fp16", "tensorrt"), ("int8", "tensorrt"))
LENGTH = 128
# What docs/gpu.md promises on a data-centre card, m3e-base's shape: name, figure, whether it must be at least that.
PROMISES = (
    ("cosine", 0.9999, True),
    ("tokens_per_s", 2.5e6, True),
    ("of_matmul_rate", 0.55, True),
    ("times_sentence_transformers", 1.5, True),
    ("single_p50_ms", 1.5, False),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; the exit code is returned."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="base", help="random weights (default: base)")
    parser.add_argument("--checkpoint", metavar="DIR", help="a checkpoint instead of random weights")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="a text a line for 'mixed' (default: the corpus)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the script without a GPU")
    parser.add_argument("--device-id", type=int, default=0, metavar="N")
    parser.add_argument("--runs", nargs="+", metavar="PRECISION:DEVICE", help="only these, such as fp16:cuda")
    parser.add_argument("--seconds", type=float, default=5, help="for each measurement (default: 5)")
    parser.add_argument("--no-peer", action="store_true", help="without sentence-transformers")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record (default: by the card's name)")
    parser.set_defaults(run=_run)
    return run_guarded(parser.parse_args(arguments))


def _run(parsed: argparse.Namespace) -> None:
    on_gpu = parsed.device == "cuda"
    card = read_card(parsed.device_id) if on_gpu else None  # refuses before anything takes time
    runs = _runs(parsed.runs, on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = parsed.checkpoint or str(write_checkpoint(Path(folder) / f"m3e-{parsed.shape}", parsed.shape))
        say(f"converting {checkpoint}")
        bundle = Path(folder) / "bundle"
        precisions = list(dict.fromkeys(["fp32", *(precision for precision, _ in runs)]))
        targets = list(dict.fromkeys(["cpu", *(device for precision, device in runs if precision != "fp32")]))
        convert(checkpoint, bundle, precisions=precisions, targets=targets, accept_accuracy=True, report=say)
        texts = _texts(parsed.texts)
        reference = Encoder(bundle, precision="fp32")
        exact = unit(reference.encode(texts[:200], prompt=""))
        record: dict[str, Any] = {
            "machine": _machine(card),
            "model": "random weights of m3e-" + parsed.shape if parsed.checkpoint is None else Path(checkpoint).name,
            "length": LENGTH,
            "matmul_tflops": matmul_tflops(parsed.device_id, parsed.seconds) if on_gpu else None,
            "peers": {} if parsed.no_peer else _peers(checkpoint, texts, parsed),
            "runs": [],
            "left_out": {},
        }
        for precision, device in runs:
            name = f"{precision} on {device}"
            say(name)
            try:
                encoder = Encoder(bundle, precision=precision, device=device, device_id=parsed.device_id,
                                  engine_cache=Path(folder) / "engines")  # fmt: skip
                if encoder.engine_build is not None:
                    started = time.perf_counter()
                    encoder.engine_build.wait()
                    say(f"engines built in {time.perf_counter() - started:.0f} s")
            except M3EError as error:
                if device != "tensorrt":
                    raise
                say(f"left out: {error}")
                record["left_out"][name] = str(error)
                continue
            record["runs"].append(_measure(encoder, exact, texts, record, parsed.seconds))
        _write(record, parsed.output, card.name if card is not None else "none")
    failed = misses(record) if on_gpu else []
    for line in failed:
        say(f"missed: {line}")
    if failed:
        raise M3EError(f"{len(failed)} figures miss what docs/gpu.md promises")


def _runs(asked: Sequence[str] | None, on_gpu: bool) -> list[tuple[str, str]]:
    if not on_gpu:
        return [("fp32", "cpu")]
    if asked is None:
        return list(RUNS)
    runs = [(item.partition(":")[0], item.partition(":")[2]) for item in asked]
    unknown = [":".join(run) for run in runs if run not in RUNS]
    if unknown:
        known = ", ".join(":".join(run) for run in RUNS)
        raise M3EError(f"--runs has {', '.join(unknown)}, expected of {known}")
    return runs


def _measure(
    encoder: Encoder, exact: np.ndarray[Any, Any], texts: list[str], record: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """One precision on one device: closeness, invariance, and the three speeds."""
    vectors = unit(encoder.encode(texts[: len(exact)], prompt=""))
    alone = unit(np.stack([encoder.encode(text, prompt="") for text in texts[:40]]))
    session = encoder._running.session  # from token ids: what tokenising takes is measured apart
    model = encoder.manifest.model
    length = min(LENGTH, model.max_seq_length)
    tokens_per_s = tokens_rate(session, model.vocab_size, length, seconds)
    mixed_s, mixed_tokens = timed(lambda: encoder.encode(texts), seconds), int(encoder.count_tokens(texts).sum())
    latencies = sorted(_latencies(encoder, texts[0], seconds))
    peers = [peer["mixed_texts_per_s"] for peer in record["peers"].values() if "mixed_texts_per_s" in peer]
    matmul = record["matmul_tflops"]
    return {
        "precision": encoder.precision,
        "device": encoder.device,
        "cosine": float((vectors * exact).sum(axis=1).min()),
        "max_abs_difference": float(np.abs(vectors - exact).max()),
        "neighbours_max_abs_difference": float(np.abs(vectors[: len(alone)] - alone).max()),
        "tokens_per_s": tokens_per_s,
        "tflops": (tflops := tokens_per_s * flops_per_token(model, length) / 1e12),
        "of_matmul_rate": tflops / matmul if matmul else None,
        "mixed_texts_per_s": len(texts) / mixed_s,
        "mixed_tokens_per_s": mixed_tokens / mixed_s,
        "times_sentence_transformers": len(texts) / mixed_s / max(peers) if peers else None,
        "single_p50_ms": statistics.median(latencies) * 1e3,
        "single_p99_ms": latencies[int(0.99 * (len(latencies) - 1))] * 1e3,
    }


def tokens_rate(session: AnySession, vocab_size: int, length: int, seconds: float) -> float:
    """Tokens a second from token ids of one length, through the session's own plan and as many threads as it wants."""
    rng = np.random.default_rng(0)
    # Sixteen batches a turn, so that its start and its end count little.
    ids = rng.integers(0, vocab_size, (max(1, 16 * session.max_batch_tokens // length), length)).tolist()
    batches = [[ids[row] for row in rows] for rows in session.plan(np.full(len(ids), length))]

    def everything() -> None:
        for _ in session.workers.ahead(session.run, batches):
            pass

    return len(ids) * length / timed(everything, seconds)


def flops_per_token(model: Any, length: int) -> float:
    """Multiplications and additions of the linear layers and of attention, two for each product."""
    hidden, inner = model.hidden_size, model.intermediate_size
    return float(model.num_layers * 2 * (4 * hidden**2 + 2 * hidden * inner + 2 * length * hidden))


def timed(function: Callable[[], object], seconds: float) -> float:
    """Median seconds of a call, after two that warm up."""
    function()
    function()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _latencies(encoder: Encoder, text: str, seconds: float) -> list[float]:
    for _ in range(10):
        encoder.encode(text)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 20 or time.perf_counter() < end:
        start = time.perf_counter()
        encoder.encode(text)
        samples.append(time.perf_counter() - start)
    return samples


def matmul_tflops(device_id: int, seconds: float) -> float:
    """The card's FP16 matrix product as torch does it, 8192 cubed."""
    import torch

    size, card = 8192, f"cuda:{device_id}"
    a, b = (torch.randn(size, size, device=card, dtype=torch.float16) for _ in range(2))

    def product() -> None:
        for _ in range(8):
            torch.mm(a, b)
        torch.cuda.synchronize(card)

    return 8 * 2 * size**3 / timed(product, seconds) / 1e12


def _peers(checkpoint: str, texts: list[str], parsed: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """sentence-transformers with FP16 and each attention that loads; on the CPU in FP32."""
    found: dict[str, dict[str, Any]] = {}
    on_gpu = parsed.device == "cuda"
    for attention in ("sdpa", "flash_attention_2") if on_gpu else ("sdpa",):
        if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            found[attention] = {"left_out": "flash_attn is not installed"}
            continue
        say(f"sentence-transformers, {attention}")
        try:
            found[attention] = _peer(checkpoint, attention, texts, parsed)
        except Exception as error:  # a peer that does not run here is no failure of ours
            found[attention] = {"left_out": f"{type(error).__name__}: {error}"}
    return found


def _peer(checkpoint: str, attention: str, texts: list[str], parsed: argparse.Namespace) -> dict[str, Any]:
    """One attention of sentence-transformers, with the batch size that suits it best."""
    from sentence_transformers import SentenceTransformer

    on_gpu = parsed.device == "cuda"
    place = f"cuda:{parsed.device_id}" if on_gpu else "cpu"
    model = SentenceTransformer(checkpoint, device=place, model_kwargs={"attn_implementation": attention})
    if on_gpu:
        model = model.half()
    seconds = {
        batch_size: timed(partial(model.encode, texts, batch_size=batch_size), parsed.seconds)
        for batch_size in ((32, 128, 512) if on_gpu else (32,))
    }
    best = min(seconds, key=lambda batch_size: seconds[batch_size])
    single_s = timed(partial(model.encode, texts[0]), min(1, parsed.seconds))
    return {"mixed_texts_per_s": len(texts) / seconds[best], "batch_size": best, "single_p50_ms": single_s * 1e3}


def _texts(path: Path | None) -> list[str]:
    """Texts of all lengths in a fixed order: the file's, or the corpus with runs of lines joined into documents."""
    if path is not None:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rng = np.random.default_rng(0)
    lines = [*corpus("zh"), *corpus("en")]
    texts = list(lines)
    for _ in range(len(lines) // 4):  # one in five reaches several hundred tokens
        first = int(rng.integers(0, len(lines) - 12))
        texts.append("".join(lines[first : first + int(rng.integers(3, 12))])[:480])
    return [texts[i] for i in rng.permutation(len(texts))]


def _machine(card: Any) -> dict[str, Any]:
    names = ("onnxruntime-gpu", "onnxruntime", "tensorrt-cu13", "torch", "transformers", "sentence-transformers",
             "tokenizers", "numpy", "onnx")  # fmt: skip
    versions: dict[str, Any] = {"m3e-runtime": __version__}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    import onnxruntime

    versions["onnxruntime that ran"] = onnxruntime.__version__
    facts = {} if card is None else {
        "card": card.name, "compute_capability": card.compute_capability,
        "memory_gb": round(card.memory_bytes / 1e9), "driver_cuda": card.driver_cuda,
    }  # fmt: skip
    return {**facts, "python": platform.python_version(), "platform": platform.platform(), "versions": versions}


def misses(record: dict[str, Any]) -> list[str]:
    """The promises that FP16 on CUDA does not keep."""
    lines = []
    for run in record["runs"]:
        if (run["precision"], run["device"]) == ("fp16", "cuda"):
            for name, bound, at_least in PROMISES:
                value = run[name]
                if value is None:
                    lines += [f"{name} was not measured"] * bool(record["peers"])  # --no-peer leaves it out on purpose
                elif not (value >= bound if at_least else value <= bound):
                    lines.append(
                        f"{name} is {value:.4g}, promised is {'at least' if at_least else 'at most'} {bound:g}"
                    )
    return lines


def _write(record: dict[str, Any], path: Path | None, card: str) -> None:
    path = path or RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for run in record["runs"]:
        print(
            f"{run['precision']} on {run['device']}: {run['tokens_per_s']:,.0f} tokens/s at {LENGTH} tokens, "
            f"{run['mixed_texts_per_s']:,.0f} mixed texts/s, one text {run['single_p50_ms']:.2f} ms, "
            f"cosine {run['cosine']:.6f}"
        )
    print(f"record: {path}")


def unit(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows at unit length."""
    rows: np.ndarray[Any, Any] = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return rows


def say(line: str) -> None:
    """Report a step."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
