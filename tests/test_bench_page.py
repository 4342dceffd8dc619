"""The page in a real browser (Debian: chromium, chromium-driver), and MTEB in its own environment."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3e_bench.cli import main
from m3e_bench.record import Series, load_record, parse_record
from m3e_bench.report.page import render_page
from tests.bench_records import make_content, series, waits

pytestmark = [pytest.mark.interop, pytest.mark.checkout]
ROOT = Path(__file__).parents[1]
ENGINES = ("m3e-int8", "m3e-fp32", "st-torch-fp32", "openvino-int8", "fastembed-int8", "ctranslate2-int8", "peer")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven engines with every kind of figure; one name is hostile."""
    rng = np.random.default_rng(0)
    found: list[Series] = []
    for i, engine in enumerate(ENGINES):
        speed = 2000 / (i + 1)
        found += [series(engine, [[speed * x] for x in (0.97, 1, 1.04)], workload=name) for name in ("lcqmc", "mixed")]
        found += [series(engine, [[speed / length]], length_tokens=length) for length in (8, 64, 512)]
        found.append(waits(engine, [list((i + 1) * (1 + rng.gamma(2, 0.1, 50))) for _ in range(3)]))
        found += [
            series(engine, [[value * (i + 1)]], metric, question=question, unit=unit, better="lower", after=after)
            for question, metric, unit, after, value in (
                ("cold_start", "first_vector_s", "s", "first vector", 0.3),
                ("memory", "resident_mb", "MB", "workloads", 100.0),
            )
        ]
        found += [
            series(engine, [[1 - 10.0 ** (i - 8)]], name, question="accuracy", unit="1", set="corpus",
                   reference="st-torch-fp32")
            for name in ("cosine_mean", "cosine_p1", "cosine_min", "top10_overlap")
        ]  # fmt: skip
        found += [
            series(engine, [[speed * n]], question="scaling", by="threads", threads=n, workload="lcqmc") for n in (1, 2)
        ]
    found += [
        series(name, [[value]], "tokens_per_s", question="roofline", workload="lcqmc")
        for name, value in (("m3e-int8", 20_000.0), ("gemm-int8", 28_000.0))
    ]
    found += [
        series("m3e-int8", [[value]], "operator_s", question="roofline", unit="s", better="neither", workload="lcqmc",
               operator=name)
        for name, value in (("MatMulIntegerToFloat", 0.7), ("MultiHeadAttention", 0.2), ("Gelu", 0.1))
    ]  # fmt: skip
    content = make_content(found)
    del content["engines"]["gemm-int8"]
    content["engines"]["peer"]["title"] = "<script>console.error('hostile')</script>"
    content["engines"]["gone"] = {
        "title": "gone", "precision": "int8", "ours": False, "versions": {}, "problems": ["pip cannot install it"]
    }  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render_page(parse_record(content, "made up"), 0.1), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    driver = shutil.which("chromedriver")
    assert driver is not None, "apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield running
    running.quit()


def show(browser: Any, page: Path, width: int, *, dark: bool = False) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get(page.as_uri())


@pytest.mark.parametrize("width", [390, 1200], ids=["phone", "desk"])
def test_it_renders_without_errors_and_fits(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0)"
        ".map(s => ({name: s.getAttribute('aria-label'), marks: s.querySelectorAll('.mark').length,"
        " width: s.getBoundingClientRect().width, right: s.getBoundingClientRect().right,"
        " font: parseFloat(getComputedStyle(s.querySelector('text')).fontSize)"
        " * s.getBoundingClientRect().width / s.viewBox.baseVal.width}))"
    )
    assert len(drawn) >= 10
    for chart in drawn:
        assert chart["marks"] > 0, chart
        assert chart["right"] <= width, chart
        assert chart["font"] >= 10, chart  # text that can be read
    bars = next(chart for chart in drawn if chart["name"] == "Throughput, lcqmc")
    assert bars["marks"] == len(ENGINES)


def test_marks_are_visible_in_light_and_dark(browser: Any, page: Path) -> None:
    seen = []
    for dark in (False, True):
        show(browser, page, 1200, dark=dark)
        seen.append(
            browser.execute_script(
                "const c = e => getComputedStyle(e); return [c(document.body).backgroundColor, "
                "c(document.querySelector('svg text')).fill, c(document.querySelector('rect.ours')).fill]"
            )
        )
    assert all(light != dark for light, dark in zip(*seen, strict=True))
    assert all(len(set(colours)) == 3 for colours in seen)


def test_the_price_changes_the_cost(browser: Any, page: Path) -> None:
    show(browser, page, 1200)
    cell = "[data-rate]"
    before = float(browser.find_element("css selector", cell).text)
    assert before == pytest.approx(1e6 / 2000 / 3600 * 0.1, abs=1e-4)
    field = browser.find_element("id", "price")
    field.clear()
    field.send_keys("0.2")
    assert float(browser.find_element("css selector", cell).text) == pytest.approx(2 * before, abs=2e-4)


def test_mteb_scores_local_tasks_for_pytorch_and_every_precision(tmp_path: Path, data_dir: Path | None) -> None:
    """The environments are kept in the checkout's .bench, since making them takes minutes."""
    given = ["quality", "--tasks", "local", "--models", "tiny", "--limit", "60", "--work", str(ROOT / ".bench"),
             "-o", str(tmp_path / "q")]  # fmt: skip
    assert main(given + (["--data", str(data_dir)] if data_dir else [])) == 0
    record = load_record(tmp_path / "q.json")
    for metric in ("cosine_spearman", "ndcg_at_10"):
        tasks = {one.parameters["task"] for one in record.find(metric)}
        assert tasks
        for task in tasks:
            scores = {one.engine: one.flat[0] for one in record.find(metric, task=task)}
            assert scores.keys() == {"st-torch-fp32", "m3e-fp32", "m3e-int8"}
            assert scores["m3e-fp32"] == pytest.approx(scores["st-torch-fp32"], abs=1e-4)
            assert scores["m3e-int8"] == pytest.approx(scores["st-torch-fp32"], abs=0.05)
            assert 0.2 < scores["m3e-fp32"] <= 1
    text = (tmp_path / "q.md").read_text(encoding="utf-8")
    assert "0.8004" in text  # published beside
