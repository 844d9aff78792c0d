"""`burstgate top`: the installation at a glance, in a terminal of 80 by 24 or more.

It reads the control plane (proxy/glance.py) every `interval_s` and draws what it finds; while nobody answers, it says
so, keeps what it knew, and tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid
from textual.css.query import NoMatches
from textual.widgets import DataTable, Footer, Sparkline, Static

from proxy.glance import (
    FAILURE_COLUMNS,
    MODEL_COLUMNS,
    SORTS,
    UPSTREAM_COLUMNS,
    Control,
    ControlAway,
    Glance,
    Readings,
    failure_rows,
    figures,
    head_line,
    model_rows,
    outcome_line,
    upstream_rows,
)

POINTS: Final = 120
"""Of a sparkline: two minutes of seconds."""
_TABLES = {"upstreams": UPSTREAM_COLUMNS, "models": MODEL_COLUMNS, "failures": FAILURE_COLUMNS}
_FIGURES = ("requests/s", "tokens/s", "in flight", "ttft", "failed/s")


class Top(App[None]):
    """The screen."""

    TITLE = "burstgate top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #head { height: 1; background: $primary; color: $text; padding: 0 1; }
    #note { height: auto; padding: 0 1; background: $error; color: $text; display: none; }
    #note.shown { display: block; }
    Grid { grid-size: 3; grid-columns: 11 1fr 30; grid-rows: 1; height: 5; padding: 0 1; }
    Sparkline { height: 1; }
    #outcomes { height: 1; padding: 0 1; color: $text-muted; }
    DataTable { height: auto; max-height: 1fr; padding: 0 1; }
    #failures { height: 1fr; }
    .away { opacity: 50%; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("s", "sort", "sort"),
        Binding("f", "only('failures')", "failures"),
        Binding("u", "only('upstreams')", "upstreams"),
        Binding("p", "pause", "pause"),
    ]

    def __init__(self, control: Control, interval_s: float) -> None:
        super().__init__()
        self._control = control
        self._interval_s = interval_s
        self._readings = Readings()
        self._seen: Glance | None = None
        self._sort = SORTS[0]
        self._only: str | None = None
        """The one table that is shown; None: all."""
        self._is_paused = False
        self._problem: str | None = None
        self._points = {name: deque[float](maxlen=POINTS) for name in _FIGURES}

    def compose(self) -> ComposeResult:
        """Head, figures, tables, keys."""
        yield Static(f"{self._control.url}", id="head")
        yield Static(id="note")
        with Grid():
            for name in _FIGURES:
                yield Static(name)
                yield Static("-", id=_id(name))
                yield Sparkline(id=f"{_id(name)}-line")
        yield Static(id="outcomes")
        for name in _TABLES:
            yield DataTable(id=name, cursor_type="row", zebra_stripes=True)
        yield Footer()

    def on_mount(self) -> None:
        """Begin to read."""
        for name, columns in _TABLES.items():
            self.query_one(f"#{name}", DataTable).add_columns(*columns)
        self.run_worker(self._follow(), exclusive=True)

    async def on_unmount(self) -> None:
        """The end."""
        await self._control.close()

    async def _follow(self) -> None:
        """Read and draw until the end, at set times."""
        due_s = time.monotonic()
        while True:
            if not self._is_paused:
                await self._look()
            due_s = max(due_s + self._interval_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())

    async def _look(self) -> None:
        try:
            reading = await self._control.read()
        except ControlAway as error:
            self._problem = f"{self._control.url}: the control plane is away ({error}); trying again"
        else:
            self._problem = None if reading.problem is None else f"not known: {reading.problem}"
            self._seen = self._readings.add(reading)
            if self._seen is not None:
                self._note(self._seen)
        if not self._is_paused:
            with contextlib.suppress(NoMatches):  # the screen is being taken down
                self._draw()

    def _note(self, seen: Glance) -> None:
        values = (
            seen.requests_per_s, seen.response_tokens_per_s, float(seen.in_flight), seen.ttft_s[1] or 0.0,
            seen.failures_per_s,
        )  # fmt: skip
        for points, value in zip(self._points.values(), values, strict=True):
            points.append(value)

    # Drawing ----------------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        note = self.query_one("#note", Static)
        note.set_class(self._problem is not None or self._is_paused, "shown")
        note.update(Text(self._problem or ("paused: p goes on" if self._is_paused else "")))
        seen = self._seen
        is_away = self._problem is not None and "away" in self._problem
        self.query_one(Grid).set_class(is_away, "away")
        if seen is None:
            return
        self.query_one("#head", Static).update(Text(f"{head_line(seen)}  by {self._sort}"))
        for name, value in figures(seen):
            self.query_one(f"#{_id(name)}", Static).update(Text(value))
            self.query_one(f"#{_id(name)}-line", Sparkline).data = list(self._points[name])
        self.query_one("#outcomes", Static).update(Text(f"failures   {outcome_line(seen)}"))
        self._fill("upstreams", upstream_rows(seen, self._sort))
        self._fill("models", model_rows(seen, self._sort))
        self._fill("failures", failure_rows(seen))

    def _fill(self, name: str, rows: Sequence[tuple[str, ...]]) -> None:
        table = self.query_one(f"#{name}", DataTable)
        table.display = self._only in (None, name)
        table.set_class(self._only is None and name != "failures", "few")
        shown = [tuple(table.get_row_at(place)) for place in range(table.row_count)]
        if shown == [tuple(row) for row in rows]:
            return
        place = table.cursor_row
        table.clear()
        for row in rows:
            table.add_row(*row)
        table.move_cursor(row=min(place, max(0, len(rows) - 1)))

    # Keys -------------------------------------------------------------------------------------------------------------

    def action_sort(self) -> None:
        """Upstreams and models by the next figure."""
        self._sort = SORTS[(SORTS.index(self._sort) + 1) % len(SORTS)]
        self._draw()

    def action_only(self, name: str) -> None:
        """That table alone, or all again."""
        self._only = None if self._only == name else name
        for each in _TABLES:
            self.query_one(f"#{each}", DataTable).display = self._only in (None, each)
        if self._only is not None:
            self.query_one(f"#{name}", DataTable).focus()

    def action_pause(self) -> None:
        """Stand still, or go on."""
        self._is_paused = not self._is_paused
        self._draw()


def _id(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-")
