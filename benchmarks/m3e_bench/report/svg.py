"""The few marks that the charts are drawn with, and axes."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER = 6.4  # mean width of a character at the charts' 12 px, for leaving room


@dataclass(frozen=True, slots=True)
class Scale:
    """Values -> pixels, linear or logarithmic.

    Attributes:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Pixels.
        end: Pixels.
        log: Whether equal ratios are equal distances.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; values beyond the ends stay at the ends."""
        if self.log:
            share = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values between both ends."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if self.high / self.low < 500 else (1,)
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            inside = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
            return inside[:: max(1, len(inside) // 7)]
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        return [step * i for i in range(math.ceil(self.low / step), int(self.high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A tick's label: 1500 -> 1.5k, 0.00001 -> 1e-5."""
    if value and abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def text(x: float, y: float, content: str, *, anchor: str = "start", kind: str = "") -> str:
    """Text on one line."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(content)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "", radius: float = 3) -> str:
    """A mark: a rectangle that tells its figure when pointed at."""
    return (
        f'<rect class="mark {kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.8):.1f}" height="{height:.1f}" '
        f'rx="{radius}">{_title(title)}</rect>'
    )


def circle(x: float, y: float, radius: float, kind: str, title: str = "") -> str:
    """A mark: a dot."""
    return f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{_title(title)}</circle>'


def path(points: Sequence[tuple[float, float]], kind: str, title: str = "", *, closed: bool = False) -> str:
    """A mark: a line through points, or an area."""
    steps = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="mark {kind}" d="M{steps}{" Z" if closed else ""}">{_title(title)}</path>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A line that is no mark: grid, whisker."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def x_axis(scale: Scale, top: float, bottom: float, label: str) -> list[str]:
    """Grid lines, their values and what they are."""
    parts = []
    for value in scale.ticks():
        x = scale(value)
        parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 15, short(value), anchor="middle", kind="tick")]
    return [*parts, text((scale.start + scale.end) / 2, bottom + 32, label, anchor="middle", kind="axis")]


def y_axis(scale: Scale, left: float, right: float, label: str) -> list[str]:
    """As `x_axis`, the label above."""
    parts = []
    for value in scale.ticks():
        y = scale(value)
        parts += [line(left, y, right, y, "grid"), text(left - 6, y + 4, short(value), anchor="end", kind="tick")]
    return [*parts, text(0, 11, label, kind="axis")]


def figure(width: float, height: float, parts: Sequence[str], name: str) -> str:
    """The whole drawing; ``name`` is read out to who cannot see it."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(name)}">'
        f"{''.join(parts)}</svg>"
    )


def _title(content: str) -> str:
    return f"<title>{html.escape(content)}</title>" if content else ""
