"""README's table, from the record that is committed; ``--check`` fails where the two differ."""

from __future__ import annotations

import re
from pathlib import Path

from m3e import M3EError
from m3e_bench.peers import REFERENCE
from m3e_bench.record import Record, load_record
from m3e_bench.report.figures import number, percentiles, values
from m3e_bench.statistics import median, ratio

# The checkout: a wheel has neither README nor records.
_ROOT = Path(__file__).parents[2]
_README = _ROOT / "README.md"
_RECORD = _ROOT / "benchmarks" / "results" / "cpu.json"
_TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)
_NONE = "–"


def table(record: Record, record_name: str) -> str:
    """Lay the figures that a reader of the README wants out as Markdown: medians."""
    lines = []
    for model in record.content["models"]:
        workloads = values(record, "sentences_per_s", "workload", question="throughput", model=model)
        if not workloads:
            continue
        heads = [f"{workload}, sentences/s" for workload in workloads]
        lines += [
            f"**{model} shape**" if record.content["models"][model]["weights"] == "random" else f"**{model}**",
            "",
            "| | " + " | ".join(heads) + " | one text, p50 | first vector | resident memory | mean cosine |",
            "|---|" + "---|" * (len(heads) + 4),
            *_rows(record, model, workloads),
            "",
        ]
    machine, settings = record.content["machine"], record.content["settings"]
    features = [name for name in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if name in machine["isa"]]
    lines.append(
        f"Medians on {settings['threads']} threads of an {machine['cpu']} ({', '.join(features)}), all engines in turn "
        "in one run; in brackets the ratio to sentence-transformers on PyTorch FP32. One text has 12 tokens; a first "
        "vector counts from the start of the process; memory is read after all workloads; the cosine is "
        "to PyTorch FP32. "
        f"[The page](benchmarks/results/{record_name}.html) shows more, "
        f"[the record](benchmarks/results/{record_name}.json) has every sample; `make bench` measures on your machine."
    )
    return "\n".join(lines) + "\n"


def write_readme(readme: Path = _README, path: Path = _RECORD) -> None:
    """Write the table into the README."""
    readme.write_text(_expected(readme, path), encoding="utf-8")


def check_readme(readme: Path = _README, path: Path = _RECORD) -> None:
    """Compare, and change nothing.

    Raises:
        M3EError: The README shows other figures than the record.
    """
    if _expected(readme, path) != readme.read_text(encoding="utf-8"):
        raise M3EError("README.md does not show the record's figures; run: python -m benchmarks readme")


def _expected(readme: Path, path: Path) -> str:
    if not readme.is_file():
        raise M3EError(f"{readme} is not there: this command works in a checkout")
    text = readme.read_text(encoding="utf-8")
    content = table(load_record(path), path.stem)
    if not _TABLE.search(text):
        raise M3EError(f"{readme} has no <!-- table --> ... <!-- /table --> to write into")
    return _TABLE.sub(lambda match: match[1] + content + match[2], text)


def _rows(record: Record, model: str, workloads: list[str]) -> list[str]:
    first = {
        one.engine: median(one)
        for one in record.find("sentences_per_s", question="throughput", model=model, workload=workloads[0])
    }
    lines = []
    for engine in sorted(first, key=lambda engine: -first[engine]):
        cells = []
        for workload in workloads:
            mine, other = (
                record.find("sentences_per_s", question="throughput", model=model, engine=name, workload=workload)
                for name in (engine, REFERENCE)
            )
            value = number(median(mine[0])) if mine else _NONE
            cells.append(f"{value} ({ratio(mine[0], other[0]).value:.1f}×)" if mine and other else value)
        wait = record.find("latency_ms", model=model, engine=engine, loop="closed", batch_size=1, length_tokens=12)
        cells.append(f"{percentiles(wait[0])['p50']:.1f} ms" if wait else _NONE)
        start = record.find("first_vector_s", model=model, engine=engine)
        cells.append(f"{median(start[0]):.2f} s" if start else _NONE)
        memory = record.find("resident_mb", model=model, engine=engine, after="workloads")
        cells.append(f"{median(memory[0]):.0f} MB" if memory else _NONE)
        cosine = record.find("cosine_mean", model=model, engine=engine, set="corpus")
        cells.append(f"{median(cosine[0]):.5f}" if cosine else _NONE)
        lines.append("| " + " | ".join([record.title(engine), *cells]) + " |")
    return lines
