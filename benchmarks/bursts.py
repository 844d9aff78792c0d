"""Draws what bursts cost from sweeps' CSV files: `python benchmarks/bursts.py OUT.svg TITLE=SWEEP.csv ...`.

A row of panels a file: TTFT p99, preemptions and failures. Over several rates a panel has a line an arrival process,
over one rate a mark; medians over the seeds with the lowest and the highest. Plain SVG, nothing to install.
"""

from __future__ import annotations

import csv
import statistics
import sys
from html import escape
from pathlib import Path

PANELS = (("ttft_p99_s", "TTFT p99, s"), ("preemptions", "preemptions"), ("failure_share", "failures, %"))
COLOURS = ("#2a9d8f", "#e9a03b", "#d1495b", "#6a4c93", "#1d6fa5")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 320, 210, 52, 46, 34

Points = dict[str, dict[float, list[float]]]


def read(path: Path, figure: str) -> Points:
    """Values by arrivals and rate, in the file's order."""
    found: Points = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for line in csv.DictReader(stream):
            if line[figure]:
                value = float(line[figure]) * (100 if figure == "failure_share" else 1)
                found.setdefault(line["arrivals"], {}).setdefault(float(line["rate_rps"]), []).append(value)
    return found


def ticks(most: float) -> list[float]:
    """From 0, four or five, at 1, 2 or 5 times a power of ten."""
    step = next(size * 10.0**power for power in range(-6, 9) for size in (1, 2, 5) if most / (size * 10.0**power) <= 4)
    return [number * step for number in range(int(most / step) + 2)]


def panel(points: Points, title: str, x0: float, y0: float, colours: dict[str, str]) -> list[str]:
    rates = sorted({rate for by_rate in points.values() for rate in by_rate})
    names = list(points)
    most = max((value for by_rate in points.values() for values in by_rate.values() for value in values), default=0.0)
    marks = ticks(most or 1.0)
    wide, high = WIDTH - LEFT - 16, HEIGHT - TOP - BOTTOM
    bottom = y0 + TOP + high

    def y(value: float) -> float:
        return bottom - value / marks[-1] * high

    def x(place: float, places: int) -> float:
        return x0 + LEFT + (place + 0.5) / places * wide

    parts = [f'<text x="{x0 + LEFT}" y="{y0 + TOP - 10}" class="title">{escape(title)}</text>']
    for mark in marks:
        parts.append(f'<path d="M{x0 + LEFT} {y(mark):.1f}h{wide}" class="grid"/>')
        parts.append(f'<text x="{x0 + LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    labels = [f"{rate:g}" for rate in rates] if len(rates) > 1 else names
    for place, label in enumerate(labels):
        parts.append(
            f'<text x="{x(place, len(labels)):.1f}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>'
        )
    for number, name in enumerate(names):
        colour, line = colours[name], []
        for rate, values in sorted(points[name].items()):
            at = x(rates.index(rate) + (number - len(names) / 2 + 0.5) * 0.08, len(rates)) if len(rates) > 1 else x(
                number, len(names)
            )  # fmt: skip
            middle = y(statistics.median(values))
            line.append(f"{at:.1f} {middle:.1f}")
            parts.append(f'<path d="M{at:.1f} {y(min(values)):.1f}V{y(max(values)):.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="3.5" fill="{colour}"/>')
        parts.append(f'<path d="M{" L".join(line)}" stroke="{colour}" stroke-width="2" fill="none"/>')
    return parts


def draw(files: dict[str, Path]) -> str:
    """The picture."""
    parts: list[str] = []
    names = list(dict.fromkeys(name for path in files.values() for name in read(path, "requests")))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    for row, (title, path) in enumerate(files.items()):
        y0 = 30 + row * HEIGHT
        parts.append(f'<text x="8" y="{y0 + 14}" class="title">{escape(title)}</text>')
        for column, (figure, label) in enumerate(PANELS):
            parts += panel(read(path, figure), label, column * WIDTH, y0, colours)
    legend = [
        f'<circle cx="{14 + 110 * number}" cy="16" r="4.5" fill="{colours[name]}"/>'
        f'<text x="{24 + 110 * number}" y="20">{escape(name)}</text>'
        for number, name in enumerate(names)
    ]
    size = f"{len(PANELS) * WIDTH} {30 + len(files) * HEIGHT}"
    style = (
        "text{font:12px system-ui,sans-serif;fill:#444}.title{font-weight:600}.grid{stroke:#ddd}"
        "rect{fill:#fff}"
    )  # fmt: skip
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">',
            f"<style>{style}</style>",
            '<rect width="100%" height="100%"/>',
            *legend,
            *parts,
            "</svg>\n",
        ]
    )


def main() -> None:
    files = {title: Path(path) for title, _, path in (each.partition("=") for each in sys.argv[2:])}
    Path(sys.argv[1]).write_text(draw(files), encoding="utf-8")


if __name__ == "__main__":
    main()
