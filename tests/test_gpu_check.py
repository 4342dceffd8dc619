from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from m3e import gpu
from tests.gpu_standin import CARD, StandInSession, standin

__all__ = ["standin"]

FIGURES = {
    "cosine", "max_abs_difference", "neighbours_max_abs_difference", "tokens_per_s", "tflops", "of_matmul_rate",
    "mixed_texts_per_s", "mixed_tokens_per_s", "times_sentence_transformers", "single_p50_ms", "single_p99_ms",
    "precision", "device",
}  # fmt: skip


@pytest.fixture
def texts(tmp_path: Path, sentences: list[str]) -> Path:
    path = tmp_path / "texts"
    path.write_text("\n".join([text for text in sentences if len(text) < 100][::20]), encoding="utf-8")
    return path


def test_without_a_gpu_it_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "_DRIVER", "libcuda-that-is-not-there.so.1")
    assert gpu_check.main(["--output", str(tmp_path / "record")]) == 1
    assert "error: there is no NVIDIA driver here" in capsys.readouterr().err
    assert not (tmp_path / "record").exists()


@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
def test_the_script_itself_on_the_cpu(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "record.json"
    given = ["--device", "cpu", "--shape", "tiny", "--seconds", "0.05", "--texts", str(texts), "--output", str(output)]
    assert gpu_check.main(given) == 0
    record = json.loads(output.read_text())
    (run,) = record["runs"]
    assert set(run) == FIGURES
    assert run["cosine"] > 0.99999
    assert run["times_sentence_transformers"] > 0
    assert record["peers"]["sdpa"]["mixed_texts_per_s"] > 0
    assert record["machine"]["versions"]["torch"]
    assert f"record: {output}" in capsys.readouterr().out


def test_every_run_on_the_stand_in(
    tmp_path: Path, texts: Path, standin: list[StandInSession], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_check, "read_card", lambda device_id: CARD)
    monkeypatch.setattr(gpu_check, "matmul_tflops", lambda device_id, seconds: 1.0)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "tokens_rate", lambda *_: 1e6)  # the stand-in takes seconds for a batch
    given = ["--shape", "tiny", "--seconds", "0.01", "--texts", str(texts), "--no-peer"]
    assert gpu_check.main([*given, "--runs", "fp32:cuda", "fp16:cuda", "fp16:tensorrt"]) == 1  # slower than promised
    record = json.loads((tmp_path / "gpu-stand-in-1.json").read_text())
    assert [(run["precision"], run["device"]) for run in record["runs"]] == [
        ("fp32", "cuda"), ("fp16", "cuda"), ("fp16", "tensorrt"),
    ]  # fmt: skip
    assert record["left_out"] == {}
    assert record["machine"]["card"] == "Stand-in 1"
    assert all(run["cosine"] > 0.9999 for run in record["runs"])
    assert "missed: tokens_per_s is 1e+06, promised is at least 2.5e+06" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "missed"),
    [({}, []), ({"cosine": 0.9}, ["cosine"]), ({"single_p50_ms": 9.0}, ["single_p50_ms"]),
     ({"tokens_per_s": 1.0}, ["tokens_per_s"]),
     ({"times_sentence_transformers": None}, ["times_sentence_transformers"])],
    ids=["kept", "cosine", "latency", "speed", "not measured"],
)  # fmt: skip
def test_promises(change: dict[str, Any], missed: list[str]) -> None:
    kept = {"precision": "fp16", "device": "cuda", "cosine": 1.0, "tokens_per_s": 3e6, "of_matmul_rate": 0.6,
            "times_sentence_transformers": 2.0, "single_p50_ms": 1.0}  # fmt: skip
    lines = gpu_check.misses({"runs": [{**kept, **change}], "peers": {"sdpa": {"left_out": "no memory"}}})
    assert [line.split()[0] for line in lines] == missed


def test_runs_that_are_not_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "read_card", lambda device_id: CARD)
    assert gpu_check.main(["--runs", "fp8:cuda"]) == 1
    assert "--runs has fp8:cuda, expected of fp32:cuda" in capsys.readouterr().err


def test_the_work_of_a_token() -> None:
    base: Any = types.SimpleNamespace(hidden_size=768, intermediate_size=3072, num_layers=12)
    assert gpu_check.flops_per_token(base, 0) == 2 * 12 * (4 * 768**2 + 2 * 768 * 3072)  # 170 million
    assert 0.02 < gpu_check.flops_per_token(base, 128) / gpu_check.flops_per_token(base, 0) - 1 < 0.03


@pytest.mark.checkout
def test_make_finds_everything_in_the_checkout() -> None:
    """With the packages of a Python that has none of this project's: -S leaves out what is installed as editable."""
    root = Path(gpu_check.__file__).parents[1]
    given = ["make", "-s", "-C", str(root), "gpu-check", f"PYTHON={sys.executable} -S", "ARGS=--help"]
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(given, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--checkpoint DIR" in done.stdout
