"""The service against the library, against itself under overload, and against infinity.

Writes ``benchmarks/results/serving.json``; a part that is measured again replaces itself alone. All traffic is on
loopback; server and load share the machine's processors.
Needs ``wrk`` (apt install wrk), whose own cost is small.

  python -m benchmarks.serving BUNDLE --texts FILE
  python -m benchmarks.serving BASE_BUNDLE --texts FILE --output benchmarks/results/serving-base.json
  python -m benchmarks.serving BUNDLE --texts FILE --parts infinity --infinity PYTHON --checkpoint FOLDER
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.closed_loop import capacity_per_s, http_call, p50_s, wrk
from benchmarks.open_loop import open_loop
from benchmarks.server_process import running
from m3e import Encoder
from m3e.bundle import Bundle
from m3e_bench.machine import describe_code, describe_machine

RECORD = Path(__file__).parent / "results" / "serving.json"
PROBE = "今天天气真好我们去公园"  # 13 tokens


def overhead(bundle: str, rounds: int = 9) -> dict[str, Any]:
    """The p50 of a single short text in the library and through HTTP, in turns."""
    with running(bundle, "--max-queue-ms", "0") as server:
        call = http_call(server.port, PROBE)
        served = [p50_s(call)]
        encoder = Encoder(bundle)
        library = []
        for _ in range(rounds):
            library.append(p50_s(lambda: encoder.encode(PROBE)))
            time.sleep(0.2)
            served.append(p50_s(call))
    ms = {"library_p50_ms": statistics.median(library) * 1e3, "http_p50_ms": statistics.median(served[1:]) * 1e3}
    return {**ms, "overhead_p50_ms": ms["http_p50_ms"] - ms["library_p50_ms"]}


def saturation(bundle: str, texts: list[str], seconds: float = 4, rounds: int = 7) -> dict[str, Any]:
    """Sentences/s of 64 connections with a text a request, and of `encode` on the same texts, in turns.

    Both ways of asking: /v1/embeddings in base64, as OpenAI's clients do, and /embed, whose floats are JSON. Turns are
    short and as long as each other, and each of the service is held against the library's before and after it:
    processors that others share change their speed within seconds.
    """
    paths = {"openai": "/v1/embeddings", "embed": "/embed"}
    library: list[float] = []
    served: dict[str, list[float]] = {name: [] for name in paths}
    ratios: dict[str, list[float]] = {name: [] for name in paths}
    encoder = Encoder(bundle)

    def embed() -> float:
        n, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            encoder.encode(texts, show_progress_bar=False)
            n += len(texts)
        return n / passed

    with running(f"served={bundle}", "--max-queue-ms", "0") as server:
        wrk(server.port, texts, seconds=2)
        library.append(embed())
        for _ in range(rounds):
            for name, path in paths.items():
                result = wrk(server.port, texts, seconds=seconds, path=path)
                library.append(embed())
                served[name].append(result["per_s"])
                ratios[name].append(result["per_s"] / statistics.mean(library[-2:]))
    return {
        "library_per_s": statistics.median(library),
        **{
            name: {
                "http_per_s": statistics.median(served[name]),
                "ratio": statistics.median(ratios[name]),
                "ratios": ratios[name],
            }
            for name in paths
        },
    }


def overload(bundle: str, texts: list[str] | None = None, seconds: float = 60, factor: float = 2) -> dict[str, Any]:
    """Open loop at 0.8 times the capacity and at a multiple of it, with the default settings.

    The capacity is measured again afterwards, and goodput is held against the mean of both.
    """
    texts = texts or [f"今天天气真好 {i}" for i in range(500)]
    with running(bundle) as server:
        capacity = capacity_per_s(server.port, texts)
        calm = open_loop(server.port, texts, rate_per_s=0.8 * capacity, seconds=min(seconds, 20), seed=1)
        before = server.metrics()
        storm = open_loop(server.port, texts, rate_per_s=factor * capacity, seconds=seconds, seed=2)
        batches = histogram(before, server.metrics(), "m3e_inference_seconds")
        capacity_after = capacity_per_s(server.port, texts)
    accepted = [outcome.seconds for outcome in storm if outcome.status == 200]
    refused = [outcome.seconds for outcome in storm if outcome.status == 429]
    return {
        "capacity_per_s": capacity,
        "capacity_after_per_s": capacity_after,
        "sent": len(storm),
        "accepted": len(accepted),
        "refused": len(refused),
        "lost": len(storm) - len(accepted) - len(refused),
        "refused_at_0.8": sum(outcome.status != 200 for outcome in calm),
        "goodput_of_capacity": len(accepted) / seconds / ((capacity + capacity_after) / 2),
        "p99_at_0.8_ms": _p99([outcome.seconds for outcome in calm if outcome.status == 200]),
        "p99_accepted_ms": _p99(accepted),
        "p99_batch_ms": quantile(batches, 0.99) * 1e3,
        "p99_refusal_ms": _p99(refused),
        "p99_sent_late_ms": _p99([outcome.late_s for outcome in storm]),
    }


def infinity(python: str, checkpoint: str, bundle: str, texts: list[str], seconds: float = 10) -> dict[str, Any]:
    """Both servers in turn: throughput of 64 connections, p99 at half of each one's own; ours at theirs as well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(python).absolute().with_name("infinity_emb"))
    process = subprocess.Popen(
        [program, "v2", "--model-id", ".", "--engine", "optimum", "--device", "cpu",
         "--pooling-method", "mean", "--port", str(port), "--host", "127.0.0.1", "--served-model-name", "served",
         "--url-prefix", "/v1", "--no-bettertransformer"],
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "HOME": str(Path.home())},
        cwd=checkpoint,  # its optimum engine finds an ONNX file in the folder where it runs, and in no other
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for(process, port)
        wrk(port, texts, seconds=2, path="/v1/embeddings")
        theirs = wrk(port, texts, seconds=seconds, path="/v1/embeddings")
        half = theirs["per_s"] / 2
        their_half = open_loop(port, texts, rate_per_s=half, seconds=seconds, path="/v1/embeddings", model="served")
    finally:
        process.kill()
        process.wait()
    with running(f"served={bundle}", "--max-queue-ms", "0") as server:
        wrk(server.port, texts, seconds=2, path="/v1/embeddings")
        ours = wrk(server.port, texts, seconds=seconds, path="/v1/embeddings")
        our_half, same = (
            open_loop(server.port, texts, rate_per_s=rate, seconds=seconds, path="/v1/embeddings", model="served")
            for rate in (ours["per_s"] / 2, half)
        )
    their_p99, our_p99, same_p99 = (
        _p99([outcome.seconds for outcome in outcomes]) for outcomes in (their_half, our_half, same)
    )
    return {
        "infinity_per_s": theirs["per_s"],
        "m3e_per_s": ours["per_s"],
        "throughput_ratio": ours["per_s"] / theirs["per_s"],
        "infinity_p99_at_half_ms": their_p99,
        "m3e_p99_at_half_ms": our_p99,
        "p99_ratio": our_p99 / their_p99,
        "half": "each at half of its own throughput",
        "m3e_p99_at_infinitys_half_ms": same_p99,
    }


def histogram(before: dict[str, float], after: dict[str, float], name: str) -> list[tuple[float, float]]:
    """Upper bounds of a histogram's buckets, and how many values came into each or below between two looks."""
    counts = {key: after[key] - before[key] for key in after if key.startswith(f"{name}_bucket[")}
    return sorted((float(key.split("'")[3]), count) for key, count in counts.items())


def quantile(buckets: list[tuple[float, float]], share: float) -> float:
    """A quantile of what `histogram` gives, even within a bucket as Prometheus' histogram_quantile; NaN of nothing."""
    bounds, counts = np.transpose([(0.0, 0.0), *buckets])
    return float(np.interp(share * counts[-1], counts, bounds)) if counts[-1] else float("nan")


def _p99(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99)) * 1e3 if seconds else float("nan")


def _wait_for(process: subprocess.Popen[bytes], port: int, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if time.monotonic() > until or process.poll() is not None:
                raise SystemExit(f"infinity does not serve; start it by hand to see why: {process.args}") from None
            time.sleep(0.2)
        else:
            time.sleep(1)
            return


def main() -> None:
    """Measure what was asked for and add it to the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--texts", required=True, help="UTF-8 file, a text a line; of tab-separated lines the first")
    parser.add_argument("--parts", nargs="+", default=["overhead", "saturation", "overload", "storm"],
                        choices=["overhead", "saturation", "overload", "storm", "infinity"])  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=60, help="of the overload and of the storm, twice and five times the capacity"
    )
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--infinity", metavar="PYTHON", help="of its environment, which 'python -m benchmarks engines "
                        "--install' makes: .bench/envs/infinity/bin/python")  # fmt: skip
    parser.add_argument("--checkpoint", help="what infinity serves: a folder with model.onnx")
    parsed = parser.parse_args()
    if "infinity" in parsed.parts and not (parsed.infinity and parsed.checkpoint):
        parser.error("--parts infinity needs --infinity PYTHON and --checkpoint FOLDER")
    lines = Path(parsed.texts).read_text(encoding="utf-8").splitlines()[:2000]
    texts = [line.split("\t")[0] for line in lines if line.split("\t")[0]]
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "overhead": lambda: overhead(parsed.bundle),
        "saturation": lambda: saturation(parsed.bundle, texts),
        "overload": lambda: overload(parsed.bundle, texts, parsed.seconds),
        "storm": lambda: overload(parsed.bundle, texts, parsed.seconds, factor=5),
        "infinity": lambda: infinity(parsed.infinity, parsed.checkpoint, parsed.bundle, texts),
    }
    output: Path = parsed.output
    record = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    model = Bundle(parsed.bundle).manifest.model
    record["model"] = {name: getattr(model, name) for name in ("num_layers", "hidden_size", "vocab_size")}
    record["machine"] = describe_machine()
    for part in parsed.parts:
        measured = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "code": describe_code()}
        record[part] = {**measures[part](), **measured}
        print(part, json.dumps(record[part], indent=1), file=sys.stderr)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
