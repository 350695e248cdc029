"""Latencies of a run as an SVG picture: the time to the first token, the time between tokens, and that over time.

Written by hand: three panels need no plotting library. Knows nothing but numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from .engine import Run

WIDTH, HEIGHT = 340, 260  # of a panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 44  # margins inside a panel
SLICES = 120  # of the time axis

Point = tuple[float, float]


def svg(run: Run, title: str) -> str:
    """A whole SVG document."""
    first = [1000 * r.ttft for r in run.requests if r.ttft is not None]
    between = [1000 * gap for _, gap in run.gaps]
    panels = [
        _panel("Time to first token", "share of requests, %", "ms", [("line", _by_share(first))]),
        _panel("Time between tokens", "share of tokens, %", "ms", [("line", _by_share(between))]),
        _panel(
            "Time between tokens, over the run", "seconds", "ms (median, most)",
            [("most", _over_time(run.gaps, -1)), ("line", _over_time(run.gaps, 0.5))],
        ),
    ]  # fmt: skip
    body = "\n".join(f'<g transform="translate({i * WIDTH},24)">{panel}</g>' for i, panel in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * WIDTH} {HEIGHT + 24}" '
        f'width="{3 * WIDTH}" height="{HEIGHT + 24}" font-family="sans-serif" font-size="11">\n'
        "<style>text{fill:#444}.axis{stroke:#999}.grid{stroke:#eee}"
        ".line{fill:none;stroke:#1565c0;stroke-width:1.6}.most{fill:none;stroke:#ef9a9a}</style>\n"
        '<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{LEFT}" y="18" font-size="13">{_escape(title)}</text>\n{body}\n</svg>\n'
    )


def _by_share(values: Sequence[float]) -> list[Point]:
    """(percent of the values that are at most y, y); at most 201 points."""
    ordered = sorted(values)
    count = min(len(ordered), 201)
    picks = [round(i * (len(ordered) - 1) / max(1, count - 1)) for i in range(count)]
    return [(100 * (i + 1) / len(ordered), ordered[i]) for i in picks]


def _over_time(gaps: Sequence[Point], quantile: float) -> list[Point]:
    """(second of the run, ms) for each slice of time that has tokens; quantile -1 is the largest."""
    end = max((moment for moment, _ in gaps), default=0.0)
    slices: dict[int, list[float]] = {}
    for moment, gap in gaps:
        slices.setdefault(min(SLICES - 1, int(SLICES * moment / end)) if end else 0, []).append(1000 * gap)
    points = []
    for index, values in sorted(slices.items()):
        values.sort()
        points.append(((index + 0.5) * end / SLICES, values[-1 if quantile < 0 else int(quantile * (len(values) - 1))]))
    return points


def _panel(title: str, x_label: str, y_label: str, lines: Sequence[tuple[str, Sequence[Point]]]) -> str:
    """Axes from zero, a few ticks, and a polyline per (css class, points)."""
    points = [point for _, line in lines for point in line]
    x_ticks, y_ticks = (_ticks(max((p[axis] for p in points), default=1.0)) for axis in (0, 1))
    x_top, y_top = x_ticks[-1], y_ticks[-1]
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(value: float) -> float:
        return round(LEFT + wide * value / x_top, 1)

    def y(value: float) -> float:
        return round(TOP + high * (1 - value / y_top), 1)

    out = [f'<text x="{LEFT}" y="{TOP - 12}" font-weight="bold">{_escape(title)}</text>']
    for tick in y_ticks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + wide}" y1="{y(tick)}" y2="{y(tick)}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        out.append(f'<text x="{x(tick)}" y="{TOP + high + 16}" text-anchor="middle">{tick:g}</text>')
    out.append(f'<path class="axis" fill="none" d="M{LEFT},{TOP}V{TOP + high}H{LEFT + wide}"/>')
    for css, line in lines:
        if line:
            path = " ".join(f"{x(a)},{y(b)}" for a, b in line)
            out.append(f'<polyline class="{css}" points="{path}"/>')
    out.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 10}" text-anchor="middle">{_escape(x_label)}</text>')
    middle = TOP + high / 2
    turned = f'transform="rotate(-90 14 {middle})"'
    out.append(f'<text x="14" y="{middle}" text-anchor="middle" {turned}>{_escape(y_label)}</text>')
    return "".join(out)


def _ticks(most: float) -> list[float]:
    """0 and round steps up to the first that is not below `most`: three to six of them."""
    if most <= 0:
        return [0.0, 1.0]
    magnitude = 1.0
    while magnitude * 10 <= most:
        magnitude *= 10
    while magnitude > most:
        magnitude /= 10
    step = next(s * magnitude for s in (0.2, 0.5, 1, 2, 5) if s * magnitude * 5 >= most)
    count = 1
    while count * step < most:
        count += 1
    return [i * step for i in range(count + 1)]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
