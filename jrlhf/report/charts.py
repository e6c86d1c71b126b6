"""Charts as inline SVG: no scripts, colours from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from jrlhf.report.curves import Curve

WIDTH, HEIGHT = 340, 168
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 22
SMOOTH_FROM = 24  # points; shorter curves are drawn as they are
MOST_POINTS = 600  # longer curves are thinned: the page stays small and the eye sees no more
SIDE = 300  # of a scatter plot


def number(value: float) -> str:
    """A number in at most about six characters: 12k, 1.41e-05, 0.052."""
    size = abs(value)
    if size >= 1e4 and size < 1e7:
        return f"{value / 1e3:.3g}k"
    if size != 0 and (size < 1e-3 or size >= 1e7):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}" if size >= 100 else f"{value:.3g}"


def ticks(low: float, high: float, *, most: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    if not low < high:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over about a tenth of the curve, shorter at its ends."""
    half = max(1, values.size // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(values.size)
    reach = np.minimum(half, np.minimum(index, values.size - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def line_chart(curve: Curve) -> str:
    """One metric over steps; a long curve gets its moving average on top."""
    steps, values = np.array(curve.steps), np.array(curve.values)
    thick = smooth(values) if values.size >= SMOOTH_FROM else values
    every = max(1, math.ceil(values.size / MOST_POINTS))
    keep = np.unique(np.append(np.arange(0, values.size, every), values.size - 1))
    (x0, x1), (y0, y1) = _range(steps, pad=0.0), _range(values, pad=0.06)

    def at(x: float, y: float) -> str:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    def path(heights: np.ndarray, kind: str) -> str:
        points = " ".join(at(steps[i], heights[i]) for i in keep)
        return f'<polyline class="{kind}" points="{points}"/>'

    parts = []
    for tick in ticks(y0, y1):
        _, y = at(x0, tick).split(",")
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(_text(LEFT - 6, float(y) + 3.5, number(tick), "end"))
    for tick in _step_ticks(steps):
        x, _ = at(tick, y0).split(",")
        anchor = "start" if tick == x0 else "end" if tick == x1 else "middle"
        parts.append(_text(float(x), HEIGHT - 6, number(tick), anchor))
    if values.size == 1:
        cx, cy = at(steps[0], values[0]).split(",")
        parts.append(f'<circle class="dot" cx="{cx}" cy="{cy}" r="3"/>')
    else:
        if thick is not values:
            parts.append(path(values, "raw"))
        parts.append(path(thick, "curve"))
    label = f"{curve.name}: from {number(values[0])} to {number(values[-1])}"
    return _svg(WIDTH, HEIGHT, label, parts)


def paired_scatter(
    before: Sequence[float],
    after: Sequence[float],
    *,
    names: tuple[str, str],
    labels: Sequence[str],
) -> str:
    """One dot per prompt, its score before across and after upwards; the diagonal is "no change".

    Args:
        before: scores of the first policy.
        after: scores of the second, same order.
        names: of the two policies, for the axes.
        labels: shown when the pointer rests on a dot.
    """
    x, y = np.asarray(before, np.float64), np.asarray(after, np.float64)
    low, high = _range(np.concatenate([x, y]), pad=0.05)
    left, bottom, inner = 46, 36, SIDE - 46 - 10

    def at(a: float, b: float) -> tuple[float, float]:
        scale = inner / (high - low)
        return left + (a - low) * scale, SIDE - bottom - (b - low) * scale

    parts = []
    for tick in ticks(low, high):
        across, down = at(tick, tick)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{left + inner}" y1="{down:.1f}" y2="{down:.1f}"/>'
        )
        parts.append(_text(left - 6, down + 3.5, number(tick), "end"))
        parts.append(_text(across, SIDE - bottom + 14, number(tick), "middle"))
    (x1, y1), (x2, y2) = at(low, low), at(high, high)
    parts.append(
        f'<line class="diagonal" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
    )
    for a, b, label in zip(x, y, labels, strict=True):
        across, down = at(a, b)
        kind = "up" if b > a else "down"
        hint = escape(f"{label}\n{names[0]} {number(a)}, {names[1]} {number(b)}")
        parts.append(
            f'<circle class="{kind}" cx="{across:.1f}" cy="{down:.1f}" r="3.4">'
            f"<title>{hint}</title></circle>"
        )
    parts.append(_text(left + inner / 2, SIDE - 4, names[0], "middle", "axis"))
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(10 {TOP + inner / 2:.0f}) '
        f'rotate(-90)">{escape(names[1])}</text>'
    )
    label = f"{int(np.sum(y > x))} of {x.size} prompts scored higher after"
    return _svg(SIDE, SIDE, label, parts)


def _range(values: np.ndarray, *, pad: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.5 * abs(low) or 0.5
        return low - room, high + room
    return low - pad * (high - low), high + pad * (high - low)


def _step_ticks(steps: np.ndarray) -> list[float]:
    first, last = float(steps[0]), float(steps[-1])
    if first == last:
        return [first]
    inner = [t for t in ticks(first, last, most=3) if 0.2 < (t - first) / (last - first) < 0.8]
    return [first, *inner[:2], last]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
