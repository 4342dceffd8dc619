"""Figures -> drawings, each at a width in pixels, so that a phone gets its own and not a shrunken one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from m3e_bench.report import svg
from m3e_bench.report.figures import number
from m3e_bench.report.svg import Scale


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a bar chart.

    Attributes:
        title: Of the engine.
        kind: CSS class that colours it.
        value: Its length.
        low: Start of the whisker.
        high: End of the whisker.
        label: Beside it.
    """

    title: str
    kind: str
    value: float
    low: float
    high: float
    label: str


def bars(items: Sequence[Bar], width: int, unit: str, name: str) -> str:
    """Horizontal bars; titles stand above them, so that they need no column of their own on a phone."""
    label_room = svg.CHARACTER * max(len(item.label) for item in items) + 12
    longest = max(item.high for item in items)
    scale = Scale(0, longest, 0, width - label_room)
    parts, y = [], 2.0
    for item in items:
        parts.append(svg.text(0, y + 11, item.title, kind="name strong" if item.kind.startswith("ours") else "name"))
        hint = f"{item.title}: {number(item.value)} {unit} (rounds from {number(item.low)} to {number(item.high)})"
        parts.append(svg.rect(0, y + 16, scale(item.value), 14, item.kind, hint))
        if item.high > item.low:
            middle = y + 23
            parts.append(svg.line(scale(item.low), middle, scale(item.high), middle, "whisker"))
            parts += [
                svg.line(scale(end), middle - 4, scale(end), middle + 4, "whisker") for end in (item.low, item.high)
            ]
        parts.append(svg.text(scale(max(item.value, item.high)) + 8, y + 27, item.label, kind="value"))
        y += 41
    return svg.figure(width, y, parts, name)


def lines(
    curves: Mapping[str, Sequence[tuple[float, float]]], titles: Mapping[str, str], kinds: Mapping[str, str],
    width: int, x_label: str, y_label: str, name: str, *, log_y: bool = False,
) -> str:  # fmt: skip
    """Curves over a logarithmic x axis, each named at its end or, on a narrow page, below."""
    narrow = width < 500
    room = 0 if narrow else svg.CHARACTER * max(len(titles[engine]) for engine in curves) + 14
    left, top, bottom = 44, 24, 300
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) * 2, left, width - 10 - room, log=True)
    y = Scale(min(ys) / 1.2, max(ys) * 1.2, bottom, top, log=True) if log_y else Scale(0, max(ys) * 1.08, bottom, top)
    parts = svg.y_axis(y, left, x.end, y_label)
    for value in sorted(set(xs)):
        parts.append(svg.text(x(value), bottom + 15, svg.short(value), anchor="middle", kind="tick"))
    parts.append(svg.text((x.start + x.end) / 2, bottom + 32, x_label, anchor="middle", kind="axis"))
    # Ours are drawn last, on top.
    for engine in sorted(curves, key=lambda engine: kinds[engine].startswith("ours")):
        points = [(x(at), y(value)) for at, value in curves[engine]]
        parts.append(svg.path(points, f"curve {kinds[engine]}", titles[engine]))
        for (at, value), place in zip(curves[engine], points, strict=True):
            parts.append(svg.circle(*place, 3, kinds[engine], f"{titles[engine]}: {number(value)} at {number(at)}"))
    ends = sorted((y(points[-1][1]), engine) for engine, points in curves.items())
    if narrow:
        height = bottom + 44.0
        for _, engine in ends:
            parts += [svg.circle(left, height + 6, 4, kinds[engine]), svg.text(left + 12, height + 10, titles[engine])]
            height += 18
    else:
        height = bottom + 40.0
        for at_y, (_, engine) in zip(_apart([end for end, _ in ends], 15), ends, strict=True):
            strong = "strong" if kinds[engine].startswith("ours") else ""
            parts.append(svg.circle(x.end + 14, at_y, 4, kinds[engine]))
            parts.append(svg.text(x.end + 22, at_y + 4, titles[engine], kind=strong))
            height = max(height, at_y + 12)
    return svg.figure(width, height, parts, name)


def ridges(items: Sequence[tuple[str, str, Sequence[float]]], width: int, unit: str, name: str) -> str:
    """Distributions on one logarithmic axis: title, colour and samples of each; p50, p95 and p99 are marked."""
    everything = np.concatenate([np.asarray(samples) for _, _, samples in items])
    low, high = float(np.percentile(everything, 0.2)) / 1.15, float(np.percentile(everything, 99.8)) * 1.3
    scale = Scale(low, high, 4, width - 8, log=True)
    edges = np.geomspace(low, high, 121)
    two_lines = any(svg.CHARACTER * len(title) + 190 > width for title, _, _ in items)
    row_height = 74 if two_lines else 60
    height = 8 + row_height * len(items)
    parts = svg.x_axis(scale, 14, height + 6, unit)
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / 1.6) ** 2)
    for row, (title, kind, samples) in enumerate(items):
        base = 8 + row_height * (row + 1) - 6
        p50, p95, p99 = np.percentile(samples, [50, 95, 99])
        density = np.convolve(np.histogram(samples, edges)[0], kernel / kernel.sum(), mode="same")
        top = density.max() or 1.0
        middles = np.sqrt(edges[:-1] * edges[1:])
        area = [
            (scale(float(at)), base - 22 * float(d) / top) for at, d in zip(middles, density, strict=True) if d > 1e-3
        ]
        hint = f"{title}: p50 {p50:.2f}, p95 {p95:.2f}, p99 {p99:.2f} {unit}, {len(samples)} requests"
        if area:
            parts.append(svg.path([(area[0][0], base), *area, (area[-1][0], base)], f"area {kind}", hint, closed=True))
        parts.append(svg.line(scale(float(p50)), base, scale(float(p99)), base, f"range {kind}"))
        for value, radius in ((p50, 4.5), (p95, 3), (p99, 2)):
            parts.append(svg.circle(scale(float(value)), base, radius, kind, hint))
        strong = "name strong" if kind.startswith("ours") else "name"
        figures = f"p50 {p50:.2f}\u2002p95 {p95:.2f}\u2002p99 {p99:.2f}"
        parts.append(svg.text(0, base - (46 if two_lines else 32), title, kind=strong))
        if two_lines:
            parts.append(svg.text(0, base - 30, figures, kind="value"))
        else:
            parts.append(svg.text(width, base - 32, figures, anchor="end", kind="value"))
    return svg.figure(width, height + 44, parts, name)


def scatter(items: Sequence[tuple[str, str, float, float]], width: int, x_label: str, y_label: str, name: str) -> str:
    """Points with names beside them: title, colour, x (logarithmic, the better the further right) and y."""
    left, top, bottom = 44, 24, 360
    xs = [max(x, 1e-8) for _, _, x, _ in items]
    x = Scale(max(xs) * 3, min(xs) / 3, left, width - 12, log=True)
    y = Scale(min(y for *_, y in items) / 1.4, max(y for *_, y in items) * 1.4, bottom, top, log=True)
    parts = svg.y_axis(y, left, width - 12, y_label)
    first, last = math.ceil(math.log10(min(xs) / 3)), math.floor(math.log10(max(xs) * 3))
    for power in range(first, last + 1, max(1, (last - first) // (4 if width < 500 else 8))):
        parts.append(svg.line(x(10.0**power), top, x(10.0**power), bottom, "grid"))
        parts.append(svg.text(x(10.0**power), bottom + 15, f"1e{power}", anchor="middle", kind="tick"))
    parts.append(svg.text((left + width) / 2, bottom + 32, x_label, anchor="middle", kind="axis"))
    dots = [(x(max(deviation, 1e-8)), y(value)) for _, _, deviation, value in items]
    taken = [(px - 7, px + 7, py + 4) for px, py in dots]  # begin, end and height of what a name must not cover
    for title, kind, deviation, value in sorted(items, key=lambda item: -item[3]):
        px, py = x(max(deviation, 1e-8)), y(value)
        hint = f"{title}: {number(value)} sentences/s, 1 - cosine {deviation:.2g}"
        parts.append(svg.circle(px, py, 7 if kind.startswith("ours") else 5.5, kind, hint))
        length = svg.CHARACTER * len(title)
        right = px + 12 + length < width
        start, at = (px + 11 if right else px - 11 - length), py + 4
        while any(abs(at - other) < 13 and start < end and begin < start + length for begin, end, other in taken):
            at += 13
        taken.append((start, start + length, at))
        parts.append(svg.text(start, at, title, kind="strong" if kind.startswith("ours") else ""))
    return svg.figure(width, max([bottom + 40.0, *(at + 8 for *_, at in taken)]), parts, name)


def stacked(items: Sequence[tuple[str, Sequence[tuple[str, float]]]], width: int, name: str) -> str:
    """Shares of a whole: a bar for each item, its largest parts named inside, the rest together."""
    parts, y = [], 0.0
    names = list(dict.fromkeys(part for _, shares in items for part, share in shares if share >= 0.03))
    for title, shares in items:
        parts.append(svg.text(0, y + 12, title, kind="name"))
        x = 0.0
        rest = 1 - sum(share for part, share in shares if part in names)
        for part, share in [*((p, s) for p, s in shares if p in names), ("all others", rest)]:
            size = share * width
            kind = f"part-{names.index(part) % 8}" if part in names else "part-rest"
            parts.append(svg.rect(x, y + 18, size - 1, 24, kind, f"{part}: {share:.1%}", radius=2))
            if size > 44:
                parts.append(svg.text(x + size / 2, y + 34, f"{share:.0%}", anchor="middle", kind="inside"))
            x += size
        y += 54
    x, y = 0.0, y + 4
    for part in [*names, "all others"]:
        needed = 18 + svg.CHARACTER * len(part) + 14
        if x + needed > width:
            x, y = 0.0, y + 20
        kind = f"part-{names.index(part) % 8}" if part in names else "part-rest"
        parts += [svg.rect(x, y, 12, 12, kind), svg.text(x + 17, y + 10, part)]
        x += needed
    return svg.figure(width, y + 20, parts, name)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Move sorted places down until no two are nearer than the gap."""
    result: list[float] = []
    for place in places:
        result.append(max(place, result[-1] + gap) if result else place)
    return result
