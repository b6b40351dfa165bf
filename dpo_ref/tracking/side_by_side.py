"""Jobs that run at the same time, each in a process of its own, and one process that shows all of them.

A job shows nothing itself. It tells what it is at (`TellingScreen`, in the job's process). What it prints comes line
by line, and the process that started it puts the job's name before it. On a terminal a line per job is drawn below
that; anywhere else one is printed about every ten seconds.
"""

import heapq
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from dpo_ref.tracking.terminal import (
    REDRAWS_PER_SECOND,
    SECONDS_BETWEEN_LINES,
    ProgressLine,
    Visible,
    clock,
    in_one_line,
    on_terminal,
    own_console,
    say,
    visible,
    words,
)

# --- what a job tells


SECONDS_BETWEEN_MESSAGES = 0.2


@dataclass(frozen=True, slots=True)
class Activity:
    """One thing that a job is at: `done` of `total`, of which `first` were done before it started."""

    description: str
    total: int | None
    first: int
    done: int
    started: float  # time.monotonic(), which all processes of a machine share
    numbers: str = ""
    takes_most: bool = False  # of the job's time

    @property
    def count(self) -> str:
        """How far it is, as text."""
        return f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"

    def seconds_left(self, now: float) -> float | None:
        """Of the job, at the pace up to now; None where that or the end is not known."""
        if not self.takes_most or self.total is None or self.done <= self.first:
            return None
        return (now - self.started) / (self.done - self.first) * (self.total - self.done)


@dataclass(frozen=True, slots=True)
class JobProgress:
    """What a job is at, the outermost activity first, and what it measured last."""

    activities: tuple[Activity, ...] = ()
    measured: str = ""


Message = JobProgress | str  # of a job that has ended: what it came to


class TellingLine:
    """An activity of a job, told."""

    def __init__(self, screen: "TellingScreen", activity: Activity) -> None:
        self._screen, self.activity = screen, activity

    def show(self, done: int, numbers: str) -> None:
        """So much is done."""
        self.activity = replace(self.activity, done=done, numbers=numbers or self.activity.numbers)
        self._screen.tell_if_due()

    def tell(self, done: int, measured: str) -> None:
        """What was measured stays beside the job's name until the next time."""
        self.activity = replace(self.activity, done=done)
        self._screen.measured = f"{measured}  ({f'step {done:,}' if done else 'before training'})"
        self._screen.tell()

    def finish(self, done: int, numbers: str) -> None:
        """All is done."""
        self.show(done, numbers)

    def close(self) -> None:
        """The activity has ended."""
        self._screen.lines = [line for line in self._screen.lines if line is not self]
        self._screen.tell()


class TellingScreen:
    """The screen of a job that another process shows."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send, self._told_at = send, 0.0
        self.lines: list[TellingLine] = []
        self.measured = ""

    def open_line(self, description: str, total: int | None, first: int) -> ProgressLine:
        """Tell about a further activity, within those that are open."""
        return self._open(Activity(description, total, first, first, time.monotonic()))

    def open_steps(self, description: str, total: int | None, first: int) -> ProgressLine:
        """Tell about the activity by which the job's time is told."""
        return self._open(Activity(description, total, first, first, time.monotonic(), takes_most=True))

    def _open(self, activity: Activity) -> ProgressLine:
        line = TellingLine(self, activity)
        self.lines.append(line)
        self.tell()
        return line

    def of_one_run(self, sentence: str) -> None:
        """Not told."""

    def summary(self, title: str, rows: Mapping[str, str], next_commands: Sequence[str]) -> None:
        """Tell in one line what the job came to; its files are where those of all jobs are."""
        results = [f"{name} {text}".strip() for name, text in rows.items() if not Path(text).exists()]
        self._send("; ".join(results) or title)

    def tell_if_due(self) -> None:
        """Tell, but not again and again within a moment."""
        if time.monotonic() - self._told_at >= SECONDS_BETWEEN_MESSAGES:
            self.tell()

    def tell(self) -> None:
        """Tell what the job is at."""
        self._told_at = time.monotonic()
        self._send(JobProgress(tuple(line.activity for line in self.lines), self.measured))


# --- what is known of all jobs


State = Literal["waiting", "running", "done", "failed", "stopped"]
ENDED: tuple[State, ...] = ("done", "failed", "stopped")


@dataclass(slots=True)
class JobRow:
    """One job, as it is shown."""

    name: str
    state: State = "waiting"
    began: float = 0.0
    took: float = 0.0  # seconds, of one that has ended
    progress: JobProgress = field(default_factory=JobProgress)
    outcome: str = ""

    def seconds_left(self, now: float) -> float | None:
        """Of a job that runs; None where that cannot be told yet."""
        return self.progress.activities[0].seconds_left(now) if self.progress.activities else None

    def left(self, now: float) -> str:
        """The same as text."""
        left = self.seconds_left(now)
        return "" if left is None else f"{clock(left)} left"


def seconds_left(rows: Sequence[JobRow], at_a_time: int, now: float) -> float | None:
    """Until all jobs have ended, if those of which nothing is known take as long as the others; None where nothing is
    known of any."""
    running = {row.name: row for row in rows if row.state == "running"}
    known = {name: left for name, row in running.items() if (left := row.seconds_left(now)) is not None}
    whole = [row.took for row in rows if row.state == "done"]
    whole += [now - running[name].began + left for name, left in known.items()]
    if not whole:
        return None
    usual = sum(whole) / len(whole)
    busy = [known.get(name, max(0.0, usual - (now - row.began))) for name, row in running.items()]
    free = [*busy, *[0.0] * (at_a_time - len(busy))]
    heapq.heapify(free)
    for row in rows:
        if row.state == "waiting":
            heapq.heapreplace(free, free[0] + usual)
    return max(free)


@runtime_checkable
class JobsView(Protocol):
    """Shows jobs as they run."""

    rows: list[JobRow]

    def __enter__(self) -> "JobsView": ...

    def __exit__(self, *_: object) -> None: ...

    def printed(self, index: int, line: str, stream: Any) -> None:
        """A line that a job has printed."""
        ...

    def changed(self, index: int) -> None:
        """Something new is known of a job."""
        ...

    def refresh(self) -> None:
        """Time has gone by."""
        ...


def jobs_view(names: Sequence[str], at_a_time: int) -> JobsView:
    """A display on a terminal, plain lines elsewhere."""
    rows = [JobRow(name) for name in map(in_one_line, names)]
    return LiveJobs(rows, at_a_time) if on_terminal() else PlainJobs(rows, at_a_time)


class _Said:
    """What jobs print on standard output: what all of them say is said once, as by the first."""

    def __init__(self) -> None:
        self._by: dict[str, int] = {}

    def is_new(self, index: int, line: str) -> bool:
        return self._by.setdefault(line, index) == index


def _overview(rows: Sequence[JobRow], at_a_time: int, now: float) -> str:
    states = [row.state for row in rows]
    counts = [f"{count} {state}" for state in (*ENDED, "running", "waiting") if (count := states.count(state))]
    left = None if set(states) <= set(ENDED) else seconds_left(rows, at_a_time, now)
    return ", ".join(counts) + ("" if left is None else f"; about {clock(left)} left")


# --- elsewhere than on a terminal: plain lines


class PlainJobs:
    """A line per job when something was measured, when it ends, and about every ten seconds."""

    def __init__(self, rows: list[JobRow], at_a_time: int) -> None:
        self.rows, self._at_a_time = rows, at_a_time
        self._width = max(len(row.name) for row in rows)
        self._said, self._measured = _Said(), [""] * len(rows)
        self._printed = time.monotonic()

    def __enter__(self) -> "PlainJobs":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def printed(self, index: int, line: str, stream: Any) -> None:
        """Under the job's name."""
        if stream is sys.stderr or self._said.is_new(index, line):
            stream.write(f"{self._named(index, line)}\n")
            stream.flush()

    def changed(self, index: int) -> None:
        """Print what was measured and what the job came to; how far it is can wait."""
        row = self.rows[index]
        if row.progress.measured != self._measured[index]:
            self._measured[index] = row.progress.measured
            say(self._named(index, row.progress.measured))
        if row.state in ENDED:
            say(self._named(index, f"{row.state} after {clock(row.took)}  {row.outcome}".rstrip()))

    def refresh(self) -> None:
        """Print how far all are, if it is time."""
        now = time.monotonic()
        if now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        for index, row in enumerate(self.rows):
            if row.state == "running" and row.progress.activities:
                say(self._named(index, self._at(row, now)))
        say(f"all jobs: {_overview(self.rows, self._at_a_time, now)}")

    def _at(self, row: JobRow, now: float) -> str:
        outer, inner = row.progress.activities[0], row.progress.activities[-1]
        parts = [f"{inner.description} {inner.count}", outer.numbers, row.left(now)]
        return "  ".join(part for part in parts if part)

    def _named(self, index: int, text: str) -> str:
        return f"{self.rows[index].name:{self._width}} | {in_one_line(text)}"


# --- on a terminal: one display


BAR = 10  # characters


class LiveJobs:
    """A line per job, drawn anew four times a second; what is printed goes above."""

    def __init__(self, rows: list[JobRow], at_a_time: int) -> None:
        self.rows, self._at_a_time = rows, at_a_time
        self._width = max(len(row.name) for row in rows)
        self._said = _Said()
        self._console, self._drawn_at = own_console(), 0.0

    def __enter__(self) -> "LiveJobs":
        from rich.live import Live

        self._live: Any = Live(self._drawn(), console=self._console, auto_refresh=False)
        self._live.start()
        sys.stdout, sys.stderr = Visible(sys.stdout), Visible(sys.stderr)  # before rich's own, until it stops
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update(self._drawn())
        self._live.stop()

    def printed(self, index: int, line: str, stream: Any) -> None:
        """Above the display, under the job's name."""
        if stream is sys.stderr or self._said.is_new(index, line):
            stream.write(f"{self.rows[index].name:{self._width}} | {in_one_line(line)}\n")
            stream.flush()

    def changed(self, index: int) -> None:
        """It is drawn soon."""

    def refresh(self) -> None:
        """Draw, if it is time."""
        now = time.monotonic()
        if now - self._drawn_at >= 1 / REDRAWS_PER_SECOND:
            self._drawn_at = now
            self._live.update(self._drawn(), refresh=True)

    def _drawn(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        now = time.monotonic()
        lines = [self._entries(row, now) for row in self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        grid: Any = Table.grid(padding=(0, 1))
        for width in (*widths[:1], BAR, *widths[1:]):
            grid.add_column(width=width, no_wrap=True, overflow="ellipsis")
        rest = max(10, self._console.width - sum(widths) - BAR - 5)  # and the blanks between
        grid.add_column(width=rest, no_wrap=True, overflow="ellipsis")
        for row, line in zip(self.rows, lines, strict=True):
            grid.add_row(words(line[0], "bold"), _bar(row), *map(words, line[1:]))
        return Group(words(_overview(self.rows, self._at_a_time, now), "dim"), grid)

    def _entries(self, row: JobRow, now: float) -> list[str]:
        """Name, what it is at, count, time, and the rest."""
        progress = row.progress
        if row.state != "running":
            told = (row.outcome, progress.measured) if row.state == "failed" else (progress.measured, row.outcome)
            return [row.name, row.state, "", clock(row.took) if row.took else "", next(filter(None, told), "")]
        if not progress.activities:
            return [row.name, "at work", "", clock(now - row.began), progress.measured]
        outer, inner = progress.activities[0], progress.activities[-1]
        rest = "  ".join(part for part in (progress.measured, outer.numbers) if part)
        return [row.name, visible(inner.description), inner.count, row.left(now), rest]


def _bar(row: JobRow) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    if row.state == "done":
        return ProgressBar(1, 1, width=BAR)
    if not row.progress.activities:
        return Text()
    outer = row.progress.activities[0]
    return ProgressBar(outer.total or 1, outer.done if outer.total else 0, width=BAR)
