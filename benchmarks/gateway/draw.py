"""Draws the benchmark's picture from its CSV files: `python draw.py FOLDER` makes FOLDER/gateway.svg.

It runs in an environment of its own that has matplotlib, so it imports nothing of this repository.
"""

import csv
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl  # type: ignore[import-not-found]

mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "burstgate", "font.size": 9})

import matplotlib.pyplot as plt  # type: ignore[import-not-found]  # noqa: E402 (the backend is chosen first)

TITLES = {
    "unary": "unary chat, 0.6 KB",
    "stream": "128-chunk stream",
    "paced": "128-chunk stream, paced",
    "prompt": "100 KB prompt",
}
WIDE = 50


def medians(path: Path, column: str) -> dict[str, float]:
    """The median of a column for each gateway, in the file's order."""
    values: dict[str, list[float]] = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for line in csv.DictReader(stream):
            if line[column]:
                values.setdefault(line["gateway"], []).append(float(line[column]))
    return {gateway: statistics.median(some) for gateway, some in values.items()}


def draw(axes: Any, title: str, values: dict[str, float], unit: str) -> None:
    """Horizontal bars, their values beside them; where one would leave nothing of the others, on a logarithmic axis."""
    names = sorted(values, key=values.__getitem__, reverse=True)
    colours = ["#d1495b" if name.startswith("burstgate") else "#8d99ae" for name in names]
    bars = axes.barh(names, [values[name] for name in names], color=colours)
    axes.bar_label(bars, [f"{values[name]:,.0f}" for name in names], padding=3, fontsize=8)
    is_wide = max(values.values()) > WIDE * min(values.values())
    if is_wide:
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xticks([])
    axes.set_xticks([], minor=True)
    axes.set_title(f"{title}: {unit}{', logarithmic' if is_wide else ''}", fontsize=9, loc="left")
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def main() -> None:
    """One panel for each figure that is there."""
    folder = Path(sys.argv[1])
    panels = [
        (title, found, "CPU µs")
        for figure, title in TITLES.items()
        if (folder / f"{figure}.csv").is_file() and (found := medians(folder / f"{figure}.csv", "cpu_us"))
    ]
    if (folder / "latency.csv").is_file():
        for column in ("p50_us", "p99_us"):
            panels += [(f"latency, {column[:3]}", medians(folder / "latency.csv", column), "µs")]
    if not panels:
        return
    rows = (len(panels) + 1) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(10, 1.9 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw(axes, *panel)
    figure.savefig(folder / "gateway.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
