"""A record as one HTML page that needs nothing else: no network, no fonts, a few lines of script for the price."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources

from m3e_bench.peers import REFERENCE
from m3e_bench.record import Record
from m3e_bench.report import figures, tables
from m3e_bench.report.cards import Cards
from m3e_bench.report.figures import number
from m3e_bench.statistics import median, ratio

_SCRIPT = """
const price = document.getElementById("price");
function show() {
  for (const cell of document.querySelectorAll("[data-rate]"))
    cell.textContent = (1e6 / cell.dataset.rate / 3600 * price.value).toFixed(4);
}
if (price) { price.addEventListener("input", show); show(); }
"""


def render_page(record: Record, price_per_hour: float) -> str:
    """Lay a record out as a page."""
    cards = Cards(record, price_per_hour)
    css = resources.files("m3e_bench.report").joinpath("page.css").read_text("utf-8")
    speed = [name for name in record.content["models"] if record.find("sentences_per_s", model=name)]
    others = [name for name in record.content["models"] if name not in speed]
    body = [_head(record, speed[:1])]
    for name in speed + others:
        facts = record.content["models"][name]
        intro = f"{facts['layers']} layers × {facts['hidden_size']}, {facts['weights']} weights"
        body.append(f'<h2 id="{_id(name)}">{html.escape(name)}</h2><p class=soft>{intro}</p>{cards.of_model(name)}')
    sizes = cards.by_size(speed)
    body += ["<h2>Model size</h2>" + sizes] * bool(sizes)
    body += [tables.engines(record), _method(record)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>m3e against its peers</title><style>{css}</style></head>\n"
        f"<body><main>{''.join(body)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _head(record: Record, models: Sequence[str]) -> str:
    """Title, machine, and the few figures that a hurried reader wants."""
    content, machine = record.content, record.content["machine"]
    isa = ", ".join(
        name for name in machine["isa"] if name.startswith(("avx2", "avx_", "avx512", "amx", "asimddp", "i8mm"))
    )
    facts = (
        f"{machine['cpu']} ({isa or machine['architecture']}), {content['settings']['threads']} threads for every "
        f"engine, {machine['memory_bytes'] / 1e9:.0f} GB. {content['created'][:10]}, m3e-runtime "
        f"{content['code']['version']}, commit {(content['code']['commit'] or 'none')[:10]}."
    )
    links = "".join(f'<a href="#{_id(name)}">{html.escape(name)}</a>' for name in content["models"])
    tiles = "".join(_tile(*tile) for name in models for tile in _tiles(record, name))
    return (
        f"<h1>m3e against its peers</h1><p class=soft>{html.escape(facts)}</p>"
        f'<nav>{links}<a href="#engines">Engines</a><a href="#method">Method</a></nav>'
        f'<div class="tiles">{tiles}</div>'
    )


def _tiles(record: Record, model: str) -> list[tuple[str, str]]:
    best = next((name for name in record.content["engines"] if figures.is_ours(record, name)), "")
    tiles = []
    found = record.find("sentences_per_s", question="throughput", model=model)
    workloads = [one for one in found if one.engine == best and "workload" in one.parameters]
    if workloads:
        workload = workloads[0].parameters["workload"]
        tiles.append((number(median(workloads[0])), f"sentences a second, {model}, {workload}, {record.title(best)}"))
        against = next(
            (one for one in found if one.engine == REFERENCE and one.parameters == workloads[0].parameters), None
        )
        if against is not None:
            tiles.append(
                (
                    f"{ratio(workloads[0], against).value:.1f}×",
                    f"the speed of sentence-transformers on PyTorch FP32, {workload}",
                )
            )
    cosine = record.find("cosine_mean", model=model, engine=best)
    if cosine:
        tiles.append((f"{median(cosine[0]):.5f}", "mean cosine to FP32 PyTorch’s vectors"))
    waits = record.find("latency_ms", model=model, engine=best, loop="closed", batch_size=1, length_tokens=12)
    if waits:
        tiles.append((f"{figures.percentiles(waits[0])['p50']:.1f} ms", "median wait for one text of 12 tokens"))
    for metric, unit, label in (
        ("first_vector_s", "s", "from process start to the first vector"),
        ("resident_mb", "MB", "resident after both workloads"),
    ):
        where = {"after": "workloads"} if metric == "resident_mb" else {}
        one = record.find(metric, model=model, engine=best, **where)
        if one:
            tiles.append((f"{number(median(one[0]))} {unit}", label))
    return tiles


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'


def _method(record: Record) -> str:
    """How the figures came about."""
    content = record.content
    workloads = "".join(
        f"<li><b>{html.escape(name)}</b>: {one['texts']} texts, {html.escape(one['source'])}</li>"
        for name, one in content["workloads"].items()
    )
    budget = content["settings"]["budget"]
    return (
        '<h2 id="method">Method</h2><section class="card"><p>Every engine gets the same checkpoint, texts and '
        "threads and runs in a process of its own, which is stopped while another has its turn. The engines take "
        f"turns (A B C, C B A, …) for {budget['rounds']} rounds after a warm-up. Bars are medians; whiskers reach "
        "from the slowest to the fastest round. A ratio is one of medians, round by round alike: what slows a "
        "machine down falls on all engines of a round, so ratios hold where seconds do not. "
        "Tokenising is included everywhere.</p>"
        f"<ul>{workloads}</ul><p class=note>{content['seconds'] / 60:.0f} minutes of measurements. The record "
        "beside this page has every sample, versions, and hashes of models and data.</p></section>"
        "<footer>Made by the m3e benchmark suite from one record.</footer>"
    )


def _id(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name)
