"""Whole runs on the tiny shape: record, page and table; interruption; peers that are not there."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest

from m3e import M3EError
from m3e.bundle import Bundle
from m3e_bench import budget, commands, environments, peers, readme
from m3e_bench.cli import main
from m3e_bench.engines.gemm_bound import products_only
from m3e_bench.record import Journal, Record, load_record

SMALL = dataclasses.replace(
    budget.QUICK, rounds=2, turn_s=0.2, latency_turn_s=0.01, open_loop_s=0.1, cold_starts=1, lengths=(8, 32),
    accuracy_texts=50, corpus_sizes=(50, 100),
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def arguments(work: Path) -> list[str]:
    # openvino-int8 has an environment of its own, which a quick run does not make.
    engines = ["m3e-int8", "m3e-fp32", "openvino-int8"]
    return ["--quick", "--models", "tiny", "--engines", *engines, "--work", str(work), "-o", str(work / "out" / "run"),
            "--questions", *commands.QUESTIONS]  # fmt: skip


@pytest.fixture(scope="module")
def record(work: Path, arguments: list[str]) -> Record:
    """A run that is interrupted after some steps, and then goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("M3E_DATA_DIR", raising=False)
        patch.setattr(budget, "QUICK", SMALL)
        add = Journal.add

        def interrupt(journal: Journal, step: str, series: Any, seconds: float) -> None:
            add(journal, step, series, seconds)
            if len(list(journal.series())) == 4:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as trap:
            trap.setattr(Journal, "add", interrupt)
            assert main(arguments) == 130
        (journal,) = (work / "runs").glob("*/journal.jsonl")
        before = journal.read_text(encoding="utf-8")
        assert main(arguments) == 0
        after = journal.with_name("finished.jsonl").read_text(encoding="utf-8")
        assert after.startswith(before), "the steps before the interruption are kept"
        assert not journal.exists(), "the same command measures anew"
    return load_record(work / "out" / "run.json")


def test_every_question_has_an_answer(record: Record) -> None:
    for question in commands.QUESTIONS:
        found = [one for one in record.series if one.question == question]
        assert found, question
        assert {"m3e-int8", "m3e-fp32"} <= {one.engine for one in found}, question
    rounds = {len(one.samples) for one in record.series if one.question == "throughput"}
    assert rounds == {2}
    assert all(sample > 0 for one in record.series if one.unit in ("1/s", "ms", "MB") for sample in one.flat)
    assert record.content["workloads"].keys() == {"corpus-short", "corpus-mixed", "sized"}


def test_engines_take_turns_there_and_back(record: Record, work: Path) -> None:
    (journal,) = (work / "runs").glob("*/finished.jsonl")
    steps = [json.loads(line).get("step", "") for line in journal.read_text(encoding="utf-8").splitlines()]
    turns = [step.split("/")[2:] for step in steps if step.startswith("throughput corpus-short/")]
    assert turns == [["m3e-int8", "0"], ["m3e-fp32", "0"], ["m3e-fp32", "1"], ["m3e-int8", "1"]]


def test_the_bound_is_every_product_of_the_graph_and_nothing_else(record: Record, work: Path) -> None:
    (folder,) = work.glob("assets/*/m3e-*/bundle")
    bundle = Bundle(folder)
    # Two layers of hidden size 64 and inner size 128: query, key, value and output, then up and down; INT8 makes key
    # and value in one.
    square, wide, tall = (64, 64), (64, 128), (128, 64)
    expected = {"int8": [*[square] * 4, *[wide] * 4, *[tall] * 2], "fp32": [*[square] * 8, *[wide] * 2, *[tall] * 2]}
    for precision, operator in (("int8", "MatMulIntegerToFloat"), ("fp32", "Gemm")):
        graph = onnx.load_from_string(products_only(bundle.read(bundle.graph(precision, "cpu").file))).graph
        sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        products = [node for node in graph.node if node.op_type != "Slice"]
        assert {node.op_type for node in products} == {operator}
        assert sorted(sizes[node.input[1]] for node in products) == expected[precision]
        assert len({node.input[1] for node in products}) == len(products), "each layer has its own weights"
        bound = record.find("tokens_per_s", engine=f"gemm-{precision}", workload="corpus-short")[0]
        ours = record.find("tokens_per_s", engine=f"m3e-{precision}", workload="corpus-short")[0]
        assert len(bound.samples) == len(ours.samples) == 2
    operators = {one.parameters["operator"] for one in record.find("operator_s", engine="m3e-int8")}
    assert {"MatMulIntegerToFloat", "MatMulIntegerToFloat of attention", "Gelu"} <= operators


def test_a_peer_that_is_not_there_is_named_with_its_reason(record: Record, work: Path) -> None:
    (problem,) = record.content["engines"]["openvino-int8"]["problems"]
    assert "not installed" in problem
    for suffix in ("html", "md"):
        text = (work / "out" / f"run.{suffix}").read_text(encoding="utf-8")
        assert "OpenVINO INT8" in text
        assert "not installed" in text


def test_the_page_is_whole_and_asks_for_nothing(record: Record, work: Path) -> None:
    page = (work / "out" / "run.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*(?!"#)|url\(|@import""", page), "a page that needs the network"
    for heading in ("Throughput", "Latency", "Speed against accuracy", "Cost per million", "Cold start", "Memory",
                    "Scaling with threads", "Share of the bound", "Where the time goes", "Method"):  # fmt: skip
        assert heading in page, heading
    assert page.count("<svg") > 20


def test_the_report_command_makes_the_same_page_again(work: Path, record: Record) -> None:
    before = (work / "out" / "run.html").read_bytes()
    assert main(["report", str(work / "out" / "run.json")]) == 0
    assert (work / "out" / "run.html").read_bytes() == before


def test_a_readme_is_written_once_and_checked_against_its_record(record: Record, tmp_path: Path) -> None:
    page, content = tmp_path / "README.md", readme.table(record, "run")
    page.write_text("# x\n\n<!-- table -->\nold\n<!-- /table -->\n\nrest\n", encoding="utf-8")
    with pytest.raises(M3EError, match="readme"):
        readme.check(page, content)
    readme.write(page, content)
    readme.check(page, content)
    text = page.read_text(encoding="utf-8")
    assert "| m3e INT8 |" in text
    assert text.endswith("rest\n")
    page.write_text(text.replace("| m3e INT8 | ", "| m3e INT8 | 9"), encoding="utf-8")
    with pytest.raises(M3EError, match="readme"):
        readme.check(page, content)


def test_several_tables_go_into_a_page_in_order(tmp_path: Path) -> None:
    page, place = tmp_path / "page.md", "<!-- table -->\n<!-- /table -->\n"
    page.write_text(place + "between\n" + place, encoding="utf-8")
    readme.write(page, "one\n", "two\n")
    readme.check(page, "one\n", "two\n")
    assert page.read_text(encoding="utf-8").replace(" -->", "").split() == [
        "<!--", "table", "one", "<!--", "/table", "between", "<!--", "table", "two", "<!--", "/table",
    ]  # fmt: skip
    with pytest.raises(M3EError, match="has 2 places"):
        readme.write(page, "one\n")


def test_the_table_of_stacks_begins_with_the_fastest() -> None:
    stacks = {"slow": {"per_s": 900.0, "p50_ms": 1.0}, "quick": {"per_s": 9000.0, "p50_ms": 0.25}}
    lines = readme.stacks_table({"stacks": stacks}).splitlines()
    assert lines[2:] == ["| quick | 9,000 | 0.25 ms |", "| slow | 900 | 1.00 ms |"]


def test_the_services_table_leaves_out_what_was_not_measured() -> None:
    part = {"http_p50_ms": 2.04, "overhead_p50_ms": 0.954}
    lines = readme.serving_table({"small": {"overhead": part}, "base": {}}).splitlines()
    assert lines[2] == "| one short text, p50 | 2.0 ms, 0.95 ms more than in the library | – |"
    assert lines[3] == "| 64 connections, a text each, as OpenAI's clients ask | – | – |"


@pytest.mark.checkout
def test_pages_show_the_figures_of_the_committed_records() -> None:
    for page, tables in readme.quotes():
        readme.check(page, *tables)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--threads", "0"], "--threads is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--models", "enormous"], "the model is 'enormous'"),
        (["--engines", "m3e-int9"], "no engines"),
        (["--models", "tiny", "small", "--endpoint", "a=http://host/v1"], "serves one model"),
        (["--questions", "memory"], "ask throughput too"),
        (["--data", "/nowhere"], "lacks zh-lcqmc-test.tsv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_command_line_that_cannot_be_done(
    work: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    defaults = [] if "--models" in given else ["--models", "tiny"]
    assert main(["--quick", "--work", str(work), *defaults, *given]) == 2
    assert message in capsys.readouterr().err


def test_an_environment_that_pip_cannot_make_is_reported_and_not_tried_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "broken.txt").write_text("this is no requirement\n")
    monkeypatch.setattr(environments, "_LOCKS", tmp_path / "locks")
    for _ in range(2):
        with pytest.raises(environments.EnvironmentUnavailableError, match="Invalid requirement"):
            environments.interpreter("broken", tmp_path)
        monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("tried twice"))


def test_every_lock_pins_every_package() -> None:
    locks = sorted(environments._LOCKS.glob("*.txt"))
    names = {engine.environment for engine in peers.ENGINES if engine.environment}
    assert {path.stem for path in locks} == names | {"mteb", "stacks"}
    for path in locks:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line), f"{path.name}: {line}"
