"""What a record becomes: figures, README's table, Markdown and the page."""

from __future__ import annotations

import dataclasses

import pytest

from m3e_bench import readme
from m3e_bench.record import Record, parse_record
from m3e_bench.report import figures
from m3e_bench.report.markdown import render_markdown
from m3e_bench.report.page import render_page
from tests.bench_records import make_content, series, waits


@pytest.fixture
def record() -> Record:
    found = [
        series("m3e-int8", [[900.0], [1000.0], [1200.0]]),
        series("st-torch-fp32", [[250.0], [250.0], [200.0]]),
        series("m3e-int8", [[500.0]], "tokens_per_s", question="roofline", workload="lcqmc"),
        series("gemm-int8", [[2000.0]], "tokens_per_s", question="roofline", workload="lcqmc"),
        series("m3e-int8", [[0.5]], "first_vector_s", question="cold_start", unit="s", better="lower", after="x"),
        series("st-torch-fp32", [[4.0]], "first_vector_s", question="cold_start", unit="s", better="lower", after="x"),
        series("st-torch-fp32", [[1.0]], "cosine_mean", question="accuracy", set="corpus", reference="st-torch-fp32"),
        series("m3e-int8", [[0.99]], "cosine_mean", question="accuracy", set="corpus", reference="st-torch-fp32"),
        series("m3e-int8", [[0.8]], "spearman", question="accuracy", set="other", reference="st-torch-fp32"),
        waits("m3e-int8", [[2.0, 3.0, 4.0]]),
    ]
    return parse_record(make_content(found), "made up")


def test_rows_are_sorted_by_what_is_better_and_have_their_ratio(record: Record) -> None:
    fast, slow = figures.rows(record, record.find("sentences_per_s"))
    assert (fast.engine, fast.value, fast.low, fast.high, fast.ours) == ("m3e-int8", 1000, 900, 1200, True)
    assert fast.times is not None
    assert (fast.times.value, fast.times.low, fast.times.high) == (4, 3.6, 6)
    assert (slow.engine, slow.ours) == ("st-torch-fp32", False)
    assert [row.engine for row in figures.rows(record, record.find("first_vector_s"))] == ["m3e-int8", "st-torch-fp32"]


def test_the_share_of_the_bound(record: Record) -> None:
    ((workload, engine, bound, share),) = figures.bound_shares(record, "m3e-tiny")
    assert (workload, engine, bound, share.value) == ("lcqmc", "m3e-int8", 2000, 0.25)


def test_accuracy_of_a_set_in_the_records_order(record: Record) -> None:
    found = figures.accuracy(record, "m3e-tiny", "corpus")
    assert list(found.items()) == [("m3e-int8", {"cosine_mean": 0.99}), ("st-torch-fp32", {"cosine_mean": 1.0})]
    assert figures.accuracy(record, "m3e-tiny", "other") == {"m3e-int8": {"spearman": 0.8}}


def test_the_cost_of_a_million_texts(record: Record) -> None:
    """A thousand a second take 1000 s, which are 1000 / 3600 of an hour's price."""
    assert figures.cost_per_million(1000, 0.36) == pytest.approx(0.1)
    assert "| M3E-INT8 | 1,000 | 4.00× (3.60–6.00) | 0.1000 |" in render_markdown(record, 0.36)
    assert '<td data-rate="1000.000">0.1000</td>' in render_page(record, 0.36)


def test_the_processor_time_of_a_text_at_a_rate(record: Record) -> None:
    found = [
        series(engine, [[value]], "processor_ms", question="latency", unit="ms", better="lower", loop="open",
               length_tokens=12, batch_size=1, rate_per_s=rate)
        for engine, value, rate in (("st-torch-fp32", 90.0, 20), ("m3e-int8", 7.5, 20), ("m3e-int8", 9.0, 100))
    ]  # fmt: skip
    whole = dataclasses.replace(record, series=(*record.series, *found))
    lines = render_markdown(whole, 0.36).splitlines()
    start = lines.index("### Processor time of a text, ms, open loop, 20/s")
    assert [line.split(" | ")[:2] for line in lines[start + 4 : start + 6]] == [
        ["| M3E-INT8", "7.5"], ["| ST-TORCH-FP32", "90.0"],
    ]  # fmt: skip
    assert "### Processor time of a text, ms, open loop, 100/s" in lines
    assert "Processor time of a text, 20 requests a second" in render_page(whole, 0.36)
    assert "Processor time" not in render_markdown(record, 0.36) + render_page(record, 0.36)


def test_the_readmes_row(record: Record) -> None:
    assert "| M3E-INT8 | 1,000 (4.0×) | 3.0 ms | 0.50 s | – | 0.99000 |" in readme.table(record, "cpu")


def test_the_profiles_table(record: Record) -> None:
    times = {"Gelu": 0.2, "MatMul": 0.792, "Squeeze": 0.005, "Cast": 0.003}
    found = [
        series("m3e-int8", [[value]], "operator_s", question="roofline", unit="s", better="neither", workload="lcqmc",
               operator=name)
        for name, value in times.items()
    ]  # fmt: skip
    whole = dataclasses.replace(record, series=(*record.series, *found))
    assert readme.profile_table([whole]).splitlines() == [
        "| | m3e-tiny, lcqmc |",
        "|---|---|",
        "| share of the bound | 0.25 (0.25–0.25) |",
        "| MatMul | 79 % |",
        "| Gelu | 20 % |",
        "| all others | 1 % |",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (9.876, "9.88"), (98.76, "98.8"), (12345.6, "12,346")]
)
def test_numbers_have_three_figures_that_count(value: float, text: str) -> None:
    assert figures.number(value) == text


def test_model_size_is_drawn_where_an_engine_ran_with_two(record: Record) -> None:
    assert "Model size" not in render_page(record, 0.1)
    small = series("m3e-int8", [[100.0]])
    content = make_content([small, dataclasses.replace(small, model="m3e-small")])
    content["models"]["m3e-small"] = {**content["models"]["m3e-tiny"], "layers": 4, "hidden_size": 512}
    page = render_page(parse_record(content, "made up"), 0.1)
    assert page.count("<h2>Model size</h2>") == 1
    assert "m3e-int8".upper() + ": 100 at 12.6" in page  # 12 * 4 * 512 ** 2 parameters in the layers
