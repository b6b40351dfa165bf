"""What a run shows while it works and when it has ended.

On a terminal a bar; anywhere else (a log file, a pipe, CI) one plain line about every ten seconds. `rich` allows one
live display per process, so all bars share it: what starts while another bar is shown becomes a line below it.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from dpo_ref.files import TELLERS

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0
SECONDS_WORTH_A_LINE = 2.0  # what ends sooner needs no line of its own in a log
REDRAWS_PER_SECOND = 4  # drawing competes with training for the interpreter


def on_terminal() -> bool:
    """Whether standard output can redraw a line; what environment variables say about colours is not asked."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def say(*sentences: str) -> None:
    """Tell the user each sentence in a line of its own, below a bar that is being drawn."""
    for sentence in sentences:
        print(sentence, flush=True)


TELLERS.append(say)


class PlainLine:
    """One thing in progress, told about now and then."""

    def __init__(self, description: str, total: int | None, first: int) -> None:
        self._description = description
        self._total = total
        self._first = first
        self._started = self._printed = time.monotonic()

    def show(self, done: int, numbers: str) -> None:
        """Print if it is time."""
        now = time.monotonic()
        if now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        left = ""
        if self._total is not None and done > self._first:
            left = clock((now - self._started) / (done - self._first) * (self._total - done)) + " left"
        self._print(done, numbers, left)

    def finish(self, done: int, numbers: str) -> None:
        """Print the end of what took a while."""
        took = time.monotonic() - self._started
        if took >= SECONDS_WORTH_A_LINE:
            self._print(done, numbers, f"took {clock(took)}")

    def close(self) -> None:
        """Nothing is left on the screen to tidy up."""

    def _print(self, done: int, numbers: str, ending: str) -> None:
        count = f"{done:,}" if self._total is None else f"{done:,}/{self._total:,}"
        print(f"{self._description} {count}", *(part for part in (numbers, ending) if part), sep="  ", flush=True)


class Bars:
    """The one live display; opened by its first bar and closed with its last."""

    def __init__(self) -> None:
        self.progress: Any = None  # a rich.progress.Progress, imported when first drawn
        self._open = 0

    def add(self, description: str, total: int | None, first: int) -> tuple[Any, int]:
        """A new bar."""
        if self.progress is None:
            self.progress = self._display()
            self.progress.start()
        self._open += 1
        return self.progress, self.progress.add_task(description, total=total, completed=first, numbers="")

    def remove(self, progress: Any, task: int) -> None:
        """The outermost bar stays on the screen as it was last, others vanish."""
        if progress is not self.progress:
            return
        self._open -= 1
        if self._open:
            progress.remove_task(task)
        else:
            self.close()

    def close(self) -> None:
        """Stop drawing whatever is drawn, so that what is printed next stays below it."""
        if self.progress is not None:
            self.progress.stop()
        self.progress, self._open = None, 0

    def _display(self) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        return Progress(*columns, refresh_per_second=REDRAWS_PER_SECOND)


BARS = Bars()


class BarLine:
    """One thing in progress, as a bar of the live display."""

    def __init__(self, description: str, total: int | None, first: int) -> None:
        self._progress, self._task = BARS.add(description, total, first)

    def show(self, done: int, numbers: str) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, numbers=numbers)

    def finish(self, done: int, numbers: str) -> None:
        """Fill the bar."""
        self.show(done, numbers)

    def close(self) -> None:
        """Hand the bar back."""
        BARS.remove(self._progress, self._task)


def open_line(description: str, total: int | None, first: int = 0) -> PlainLine | BarLine:
    """A line that starts at `first` of `total`; a bar on a terminal, plain text elsewhere."""
    return BarLine(description, total, first) if on_terminal() else PlainLine(description, total, first)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, with how far they are on the terminal; shown from the first on. `total` is counted if it can be."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    line = open_line(description, total)
    done = 0
    try:
        for item in items:
            yield item
            done += 1
            line.show(done, "")
        line.finish(done, "")
    finally:
        line.close()


def numbers_of(metrics: Mapping[str, float]) -> str:
    """The few metrics that fit on a line: loss, accuracy where there are pairs, speed."""
    parts = [f"loss {metrics['loss']:.4f}"]
    if "rewards/accuracies" in metrics:
        parts.append(f"accuracy {metrics['rewards/accuracies']:.2f}")
    if "throughput/pairs_per_second" in metrics:
        unit = "pairs" if "rewards/accuracies" in metrics else "rows"
        parts.append(f"{metrics['throughput/pairs_per_second']:.1f} {unit}/s")
    return "  ".join(parts)


class TrainingProgress:
    """Progress of training steps; `update` gives it the latest metrics, unprefixed, to show beside the count."""

    def __init__(self, description: str = "training") -> None:
        self.description = description
        self._numbers, self._done = "", 0
        self._line: PlainLine | BarLine | None = None
        self._open = partial(open_line, description, None)

    @contextmanager
    def shown(self, total: int, first_step: int = 0) -> Iterator[None]:
        """Inside, `advance` draws the steps, of which `first_step` of `total` were done before."""
        self._open, self._done = partial(open_line, self.description, total, first_step), first_step
        try:
            yield
        finally:
            if self._line is not None:
                self._line.close()
            self._line = None

    def advance(self, steps: int = 1) -> None:
        """So many steps more are done; 0 draws what is to come."""
        self._line = self._line or self._open()
        self._done += steps
        self._line.show(self._done, self._numbers)

    def complete(self) -> None:
        """All steps are done; what comes after them is not counted."""
        if self._line is not None:
            self._line.finish(self._done, self._numbers)
            self._line.close()
        self._line = None

    def update(self, metrics: Mapping[str, float]) -> None:
        """Take over metrics; they are drawn with the next step."""
        self._numbers = numbers_of(metrics)


def run_summary(title: str, rows: Mapping[str, str], next_commands: Sequence[str] = ()) -> None:
    """Print what happened and where it is, and below it the commands to type next.

    On a terminal the rows are framed; the commands stand outside the frame, unwrapped, so that they can be copied.
    """
    BARS.close()
    if on_terminal():
        _print_frame(title, rows)
    else:
        width = max(map(len, rows), default=0)
        print(f"\n{title}", *(f"  {name:{width}}  {text}" for name, text in rows.items()), sep="\n")
    if next_commands:
        print("next:", *(f"  {command}" for command in next_commands), sep="\n")
    sys.stdout.flush()


def _print_frame(title: str, rows: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid: Any = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")  # a long path goes on in the next line, whole
    for name, text in rows.items():
        grid.add_row(Text(name, style="dim"), Text(text))  # Text: brackets in overrides are not markup
    Console().print(Panel(grid, title=Text(title), title_align="left", expand=False))


# --- an example of the data: what is masked is dim, what is scored is coloured


SHOWN = 400  # characters of each part


def _short(text: str) -> str:
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} [...] {text[-half:]}"


def show_example(rows: list[list[str]]) -> None:
    """Print parts of an example: (part, text, "yes" if it is scored)."""
    if not on_terminal():
        print("example (what is scored is marked with |):")
        for part, text, scored in rows:
            mark = "|" if scored == "yes" else " "
            print("\n".join(f"  {part:9} {mark} {line}" for line in _short(text).split("\n")))
        return
    from rich.console import Console
    from rich.text import Text

    styles = {"chosen": "green", "rejected": "red"}
    whole: Any = Text("example: what is masked is dim, what is scored is coloured\n")
    for part, text, scored in rows:
        style = styles.get(part, "cyan") if scored == "yes" else "dim"
        whole.append(f"{part:9} ", style="bold")
        whole.append(_short(text) + "\n", style=style)
    Console().print(whole)
