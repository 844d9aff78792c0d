"""What the samples come to: a CSV for each figure, and the bars of the replay's issue with the rivals beside them."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from benchmarks.gateway.report import QUIET_CORES, Verdict, markdown, median, ratio
from benchmarks.replay.measure import Lag, Rung, Start, highest_kept_rps
from benchmarks.replay.tools import FLOOR, OURS

Sample = Lag | Rung | Start


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Work that is done without a server: a conversion, or a simulation."""

    figure: str
    work: str
    value: float
    unit: str


def write_samples(folder: Path, samples: Sequence[Sample | Batch]) -> None:
    """replay-FIGURE.csv for each figure among them."""
    for figure in dict.fromkeys(sample.figure for sample in samples):
        own = [sample for sample in samples if sample.figure == figure]
        with (folder / f"replay-{figure}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(own[0].__struct_fields__)
            for sample in own:
                writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in msgspec.structs.astuple(sample)])


def machine(versions: Iterable[str], cores: int, *, is_compiled: bool) -> str:
    """Date, processor, cores, kernel and the tools' versions; nothing that names the machine."""
    model = platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    ours = "burstgate compiled" if is_compiled else "burstgate not compiled"
    return "; ".join((f"{today}; {model}, {cores} cores, Linux {platform.release()}, {ours}", *versions))


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


class Results:
    """All samples of a run."""

    def __init__(self) -> None:
        self.samples: list[Sample | Batch] = []
        self.absent: dict[str, str] = {}
        """Tools that could not be had, and why."""

    def lags(self, figure: str, tool: str) -> list[Lag]:
        """The repeats."""
        return [s for s in self.samples if isinstance(s, Lag) and s.figure == figure and s.tool == tool]

    def kept_rps(self, tool: str) -> float | None:
        """None where no rate was kept, or none tried."""
        return highest_kept_rps([s for s in self.samples if isinstance(s, Rung) and s.tool == tool])

    def start(self, tool: str) -> Start | None:
        return next((s for s in self.samples if isinstance(s, Start) and s.tool == tool), None)

    def tools(self, kind: type) -> list[str]:
        """Those with a sample of a kind, in order of their turn."""
        return list(dict.fromkeys(s.tool for s in self.samples if isinstance(s, kind)))  # type: ignore[union-attr]

    def verdicts(self) -> list[Verdict]:
        """A line for each bar whose figure was measured."""
        found: list[Verdict] = []
        for figure, bar_ms in (("lag-100", 1.0), ("lag-1000", 2.0)):
            if ours := self.lags(figure, OURS):
                value = median(s.lag_p99_ms for s in ours)
                work = f"dispatch lag p99, {ours[0].rows:,} bursty requests at {ours[0].rate_rps:g}/s"
                wrong = sum(s.arrived != s.rows for s in ours)
                floor = self.lags(figure, FLOOR)
                shown = f"{_ms(value)} ms" + (f", floor {_ms(median(s.lag_p99_ms for s in floor))}" if floor else "")
                found.append(Verdict(work, shown, value, bar_ms, errors=wrong))
        rivals = [(rps, tool) for tool in self.tools(Rung) if tool != OURS and (rps := self.kept_rps(tool)) is not None]
        if OURS in self.tools(Rung):
            kept = self.kept_rps(OURS)
            best_rps, best = max(rivals, default=(None, "no rival"))
            shown = f"{kept or 0:,.0f}/s, {best} {best_rps or 0:,.0f}/s"
            work = "highest rate with lag p99 <= 10 ms, against the best"
            found.append(Verdict(work, shown, ratio(kept, best_rps), 3.0, at_least=True))
        if (start := self.start(OURS)) is not None:
            work = f"{start.rows:,}-row trace: start to first request"
            shown = "-" if start.start_s is None else f"{start.start_s:.2f} s"
            found.append(Verdict(work, shown, start.start_s, 1.0))
            found.append(Verdict("the same: peak memory", f"{start.rss_mb:.0f} MB", start.rss_mb, 200.0))
        for sample in self.samples:
            if isinstance(sample, Batch):
                bar = 1e6 if sample.figure == "convert" else 100.0
                shown = f"{sample.value:,.0f} {sample.unit}"
                found.append(Verdict(sample.work, shown, sample.value, bar, at_least=True))
        return found

    def lag_lines(self) -> list[tuple[str, ...]]:
        lines = []
        for figure in ("lag-100", "lag-1000"):
            for tool in self.tools(Lag):
                if not (own := self.lags(figure, tool)):
                    continue
                ours = median(s.lag_p99_ms for s in self.lags(figure, OURS))
                p99 = median(s.lag_p99_ms for s in own)
                against = ratio(p99, ours)
                lines.append(
                    (
                        f"{own[0].rate_rps:g}/s",
                        tool,
                        own[0].zero,
                        _ms(median(s.lag_p50_ms for s in own)),
                        _ms(p99),
                        _ms(median(s.lag_max_ms for s in own)),
                        _ms(median(s.fitted_p99_ms for s in own)),
                        "-" if against is None else f"{against:.1f}",
                        f"{min(s.arrived for s in own):,} of {own[0].rows:,}",
                        f"{statistics.median(s.body_bytes or 0 for s in own):.0f}",
                        f"{statistics.median(s.foreign_cores for s in own):.2f}",
                    )
                )
        return lines

    def other_lines(self) -> list[tuple[str, ...]]:
        lines = []
        for tool in dict.fromkeys((*self.tools(Rung), *self.tools(Start))):
            kept, start = self.kept_rps(tool), self.start(tool)
            rate = "-" if tool not in self.tools(Rung) else "none" if kept is None else f"{kept:,.0f}"
            first = "-"
            if start is not None:
                first = f"> {start.limit_s:.0f}" if start.start_s is None else f"{start.start_s:.2f}"
            lines.append((tool, rate, first, "-" if start is None else f"{start.rss_mb:,.0f}"))
        return lines


def tables(results: Results, versions: Iterable[str], cores: int, *, is_compiled: bool) -> str:
    """The bars, and beneath them what they are made of."""
    parts = [machine(versions, cores, is_compiled=is_compiled)]
    if verdicts := results.verdicts():
        lines = [
            (
                v.work,
                v.shown,
                "-" if v.value is None else f"{v.value:,.2f}" if v.value < 1000 else f"{v.value:,.0f}",
                f"{'>=' if v.at_least else '<='} {v.bar:,.0f}",
                v.verdict,
            )
            for v in verdicts
        ]
        parts.append(markdown(("work", "measured", "value", "bar", "verdict"), lines))
    if lag_lines := results.lag_lines():
        head = (
            "rate",
            "tool",
            "zero",
            "lag p50 ms",
            "p99 ms",
            "max ms",
            "p99, fitted zero",
            "x ours",
            "arrived",
            "bytes",
            "others' cores",
        )
        parts.append(markdown(head, lag_lines))
    if other_lines := results.other_lines():
        parts.append(markdown(("tool", "rate kept, 1/s", "start to first request s", "peak RSS MB"), other_lines))
    parts += [f"{tool}: not measured: {why}" for tool, why in results.absent.items()]
    noise = [s.foreign_cores for s in results.samples if isinstance(s, Lag)]
    if noise and statistics.median(noise) > QUIET_CORES:
        parts.append(
            f"The machine was not quiet: others used {statistics.median(noise):.2f} cores. These are no results."
        )
    return "\n\n".join(parts) + "\n"
