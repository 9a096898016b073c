"""Line charts as static SVG: no script, no fonts, no colours of their own beyond the page's `--line-N`."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from markupsafe import Markup

from llmtrain.engine.display import compact

# In SVG units; small, so that the ticks stay readable where the chart is scaled to the width of a phone.
WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22
# A curve is drawn with at most this many points; each is the mean of its share of the steps.
MAX_POINTS = 300
NUM_COLOURS = 6

Points = Sequence[tuple[float, float]]


def line_chart(title: str, series: Mapping[str, Points]) -> Markup:
    """A `<figure>`: title, legend with each curve's last value, and the curves over the step.

    Points are (step, value); those that are not finite are left out. Empty where nothing is left.
    """
    curves = {name: thin([point for point in points if math.isfinite(point[1])]) for name, points in series.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return Markup("")
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points]
    across, up = _Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT), _Axis(*_padded(values), HEIGHT - BOTTOM, TOP)
    drawing = "".join(_curve(points, number, across, up) for number, points in enumerate(curves.values()))
    legend = "".join(_legend(name, points, number) for number, (name, points) in enumerate(curves.items()))
    return Markup(
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> {legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over the steps">'
        f"{_grid(across, up)}{drawing}</svg></figure>"
    )


def thin(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours; the last one is kept as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil((len(points) - 1) / (most - 1))
    groups = [points[start : min(start + size, len(points) - 1)] for start in range(0, len(points) - 1, size)]
    means = [(sum(step for step, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [number * gap for number in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


class _Axis:
    """Values `low` to `high` laid over SVG coordinates `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return f"{self.start + share * (self.end - self.start):.1f}"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    space = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - space, high + space


def _curve(points: Points, number: int, across: _Axis, up: _Axis) -> str:
    colour = f"var(--line-{number % NUM_COLOURS})"
    if len(points) == 1:
        return f'<circle cx="{across(points[0][0])}" cy="{up(points[0][1])}" r="3" fill="{colour}"/>'
    places = " ".join(f"{across(step)},{up(value)}" for step, value in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>'


def _legend(name: str, points: Points, number: int) -> str:
    swatch = f'<i style="background:var(--line-{number % NUM_COLOURS})"></i>'
    return f'<span class="key">{swatch}{escape(name)} <b>{points[-1][1]:.4g}</b></span>'


def _grid(across: _Axis, up: _Axis) -> str:
    parts = []
    for value in ticks(up.low, up.high):
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y}" dy="0.35em" text-anchor="end">{compact(value)}</text>')
    for value in ticks(across.low, across.high):
        parts.append(f'<text x="{across(value)}" y="{HEIGHT - 6}" text-anchor="middle">{compact(value)}</text>')
    return "".join(parts)
