"""What a run shows while it works and when it has ended, and the one door to the terminal.

On a terminal a bar; anywhere else (a log file, a pipe, CI) one plain line about every ten seconds. `rich` allows one
live display per process, so all bars share it: what starts while another bar is shown becomes a line below it.

A job of a sweep that has a process of its own shows nothing itself: it tells the process that draws all of them
(`show_on`, `side_by_side.py`).

Whatever is printed passes `Visible`, tracebacks and what libraries say included; what `rich` draws passes `show`.
"""

import codecs
import errno
import io
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol, TypeVar, runtime_checkable

from dpo_ref.files.digests import TELLERS

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
        print(in_one_line(sentence), flush=True)


# --- the standard streams: texts of strangers are shown and never sent, and a stream that is gone ends no run


UNSEEN = re.compile(  # what commands a terminal, turns the direction of writing, or takes up no room
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)
OF_SCRIPTS = "\xad\u061c\u200c\u200d\u200e\u200f"  # which writing and emoji need where they are laid out well
REDRAWN = re.compile(  # what tqdm writes for a download: a line over its line, blanks over it, the way up to it
    r"(\r(?=.*\[\d\d:\d\d)|\r *\r?(?!.)|(?:\x1b\[A)+(?!.))(.*)"
)
SPELLED = "dpo_ref.spelled"  # what a terminal's encoding lacks, in ASCII
SPELLINGS = {
    "\u00a0": " ", "–": "-", "—": "-", "−": "-", "…": "...", "’": "'", "→": "->", "‖": "||", "±": "+-", "·": "*",
    "×": "x", "≤": "<=", "≥": ">=", "α": "alpha", "β": "beta", "γ": "gamma", "λ": "lambda", "π": "pi", "σ": "sigma",
    "Δ": "Delta", "█": "#",
}  # fmt: skip


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def visible(text: str, left: str = "") -> str:
    r"""A text in which what cannot be seen is spelled as in Python: \x1b for an escape, \u202e for text that turns.
    Line ends and tabs stay, and so do the characters of `left`."""
    return UNSEEN.sub(lambda match: match[0] if match[0] in left else _escape(match[0]), text)


def in_one_line(text: str) -> str:
    """A visible text whose line ends are spelled too."""
    return visible(text).replace("\n", r"\n")


def _spell(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(SPELLINGS.get(character) or _escape(character) for character in lacking), error.end


codecs.register_error(SPELLED, _spell)


def _in_encoding(text: str, encoding: str) -> str:
    return text.encode(encoding, SPELLED).decode(encoding)


class Lasting(io.TextIOWrapper):
    """A standard stream that may go: once it cannot be written, what is written to it goes nowhere."""

    def __init__(self, stream: io.TextIOWrapper, encoding: str) -> None:
        stream.flush()
        super().__init__(stream.buffer, encoding, SPELLED, line_buffering=stream.line_buffering, write_through=True)
        self._stream = stream  # which would close what it shares with this one

    def write(self, text: str, /) -> int:
        """The text, as far as the stream takes any."""
        with self._lasting():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """What was written is on its way."""
        with self._lasting():
            super().flush()

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno != errno.EPIPE:  # `| head` has seen what it wanted
                print(f"standard output is gone ({error.strerror}); the run goes on without it", file=sys.stderr)


class Visible(io.TextIOBase):
    """A stream that shows what it is given; `beneath` is the one that draws."""

    def __init__(self, beneath: Any) -> None:
        self.beneath = beneath

    def write(self, text: str, /) -> int:
        """The text, made visible."""
        redrawn = REDRAWN.fullmatch(text)
        self.beneath.write(redrawn[1] + visible(redrawn[2]) if redrawn else visible(text))
        return len(text)

    def flush(self) -> None:
        """What was written is on its way."""
        self.beneath.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.beneath.isatty()

    def fileno(self) -> int:
        """The descriptor."""
        return self.beneath.fileno()

    def writable(self) -> bool:
        """It is."""
        return True

    @property
    def encoding(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What its characters are written in."""
        return self.beneath.encoding

    @property
    def buffer(self) -> Any:
        """The stream of bytes."""
        return self.beneath.buffer


def _of_the_locale(encoding: str) -> str:
    """ASCII where the user's locale says so, for which Python takes UTF-8 (PEP 538 and 540) unless it is told."""
    variables = os.environ
    if variables.get("PYTHONIOENCODING") or variables.get("PYTHONUTF8"):
        return encoding
    character_type = variables.get("LC_CTYPE", "")
    if character_type in ("C.UTF-8", "C.utf8", "UTF-8"):  # what Python sets there by itself
        character_type = ""
    chosen = variables.get("LC_ALL") or character_type or variables.get("LANG")
    return "ascii" if chosen in ("C", "POSIX") else encoding


GUARDED: list[Any] = []  # for as long as the process lives: one that goes closes its descriptor


def _guarded(stream: Any) -> Any:
    if stream is None:  # closed before the start; the next file to be opened would get its descriptor
        stream = open(os.devnull, "w")  # noqa: SIM115
    lasting = Lasting(stream, _of_the_locale(stream.encoding)) if isinstance(stream, io.TextIOWrapper) else stream
    return Visible(lasting)


def guard_streams() -> None:
    """From now on standard output and error show what they are given, and the process lives without them."""
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)
    GUARDED.extend((sys.stdout, sys.stderr))


@cache
def _console_class() -> Any:
    from rich.console import Console
    from rich.segment import Segment

    class VisibleConsole(Console):
        """What it lays out is made visible piece by piece, before widths are counted."""

        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                text = segment.text if segment.control else _in_encoding(visible(segment.text), self.encoding)
                yield Segment(text, segment.style, segment.control)

    return VisibleConsole


def own_console() -> Any:
    """The live display's where there is one: what it prints stands above the bars."""
    if BARS.progress is not None:
        return BARS.progress.console
    stream: Any = sys.stdout
    beneath = stream.beneath if isinstance(stream, Visible) else stream
    return _console_class()(file=beneath, markup=False, emoji=False, highlight=False)


def words(text: str, style: str = "") -> Any:
    """A text for what `show` draws: as wide as it will be on this terminal."""
    from rich.text import Text

    return Text(_in_encoding(visible(text), sys.stdout.encoding or "utf-8"), style)


def show(*drawn: Any) -> None:
    """Print what `rich` lays out, such as tables."""
    for renderable in drawn:
        own_console().print(renderable)


# --- how far something is


TELLERS.append(say)


@runtime_checkable
class ProgressLine(Protocol):
    """One thing in progress, as it is shown."""

    def show(self, done: int, numbers: str) -> None:
        """So much is done."""
        ...

    def tell(self, done: int, measured: str) -> None:
        """What was measured after so much."""
        ...

    def finish(self, done: int, numbers: str) -> None:
        """All is done."""
        ...

    def close(self) -> None:
        """It is not shown any more."""
        ...


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

    def tell(self, done: int, measured: str) -> None:
        """Print what was measured."""
        self._print(done, measured, "")

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
            sys.stdout, sys.stderr = Visible(sys.stdout), Visible(sys.stderr)  # before rich's own, until it stops
        self._open += 1
        return self.progress, self.progress.add_task(visible(description), total=total, completed=first, numbers="")

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
        return Progress(*columns, console=own_console(), refresh_per_second=REDRAWS_PER_SECOND)


BARS = Bars()


class BarLine:
    """One thing in progress, as a bar of the live display."""

    def __init__(self, description: str, total: int | None, first: int) -> None:
        self._progress, self._task = BARS.add(description, total, first)

    def show(self, done: int, numbers: str) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, numbers=numbers)

    def tell(self, done: int, measured: str) -> None:
        """Print what was measured, above the bar."""
        say(f"step {done:,}: {measured}")

    def finish(self, done: int, numbers: str) -> None:
        """Fill the bar."""
        self.show(done, numbers)

    def close(self) -> None:
        """Hand the bar back."""
        BARS.remove(self._progress, self._task)


@runtime_checkable
class Screen(Protocol):
    """Where a process shows what it is at and what became of it."""

    def open_line(self, description: str, total: int | None, first: int) -> ProgressLine:
        """A line that starts at `first` of `total`."""
        ...

    def open_steps(self, description: str, total: int | None, first: int) -> ProgressLine:
        """The line of what takes most of a run: its steps."""
        ...

    def of_one_run(self, sentence: str) -> None:
        """What is worth a line of a run that is alone; of many at once it is said for all."""
        ...

    def summary(self, title: str, rows: Mapping[str, str], next_commands: Sequence[str]) -> None:
        """What happened and where it is."""
        ...


class OwnScreen:
    """The terminal of this process, or what stands for it."""

    def open_line(self, description: str, total: int | None, first: int) -> ProgressLine:
        """A bar on a terminal, plain text elsewhere."""
        return BarLine(description, total, first) if on_terminal() else PlainLine(description, total, first)

    open_steps = open_line

    def of_one_run(self, sentence: str) -> None:
        """Printed."""
        say(sentence)

    def summary(self, title: str, rows: Mapping[str, str], next_commands: Sequence[str]) -> None:
        """On a terminal the rows are framed; the commands stand outside the frame, unwrapped, so that they can be
        copied."""
        BARS.close()
        if on_terminal():
            _print_frame(title, rows)
        else:
            width = max(map(len, rows), default=0)
            lines = (f"  {name:{width}}  {in_one_line(text)}" for name, text in rows.items())
            print(f"\n{in_one_line(title)}", *lines, sep="\n")
        if next_commands:
            print("next:", *(f"  {in_one_line(command)}" for command in next_commands), sep="\n")
        sys.stdout.flush()


SCREENS: list[Screen] = [OwnScreen()]  # the last is this process's


def show_on(screen: Screen) -> None:
    """What this process does is shown there from now on."""
    SCREENS.append(screen)


def say_of_one_run(sentence: str) -> None:
    """Tell what concerns one run alone; where many run at once, whoever shows them says it for all."""
    SCREENS[-1].of_one_run(sentence)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, with how far they are on the terminal; shown from the first on. `total` is counted if it can be."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    line = SCREENS[-1].open_line(description, total, 0)
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
        unit = "pair" if "rewards/accuracies" in metrics else "row"
        parts.append(_speed(metrics["throughput/pairs_per_second"], unit))
    return "  ".join(parts)


def _speed(per_second: float, unit: str) -> str:
    """Units per second, or seconds per unit where fewer than one in ten seconds are done."""
    return f"{per_second:.1f} {unit}s/s" if per_second >= 0.1 else f"{1 / per_second:.0f} s/{unit}"


class TrainingProgress:
    """Progress of training steps; `update` gives it the latest metrics, unprefixed, to show beside the count."""

    def __init__(self, description: str = "training") -> None:
        self.description = description
        self._numbers, self._done = "", 0
        self._line: ProgressLine | None = None
        self._open = partial(SCREENS[-1].open_steps, description, None, 0)

    @contextmanager
    def shown(self, total: int, first_step: int = 0) -> Iterator[None]:
        """Inside, `advance` draws the steps, of which `first_step` of `total` were done before."""
        self._open, self._done = partial(SCREENS[-1].open_steps, self.description, total, first_step), first_step
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

    def tell(self, measured: str) -> None:
        """What was measured of the policy as it is now."""
        self._line = self._line or self._open()
        self._line.tell(self._done, measured)

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
    """Show what happened and where it is, and below it the commands to type next; one line of a job among others."""
    SCREENS[-1].summary(title, rows, next_commands)


def _print_frame(title: str, rows: Mapping[str, str]) -> None:
    from rich.panel import Panel
    from rich.table import Table

    grid: Any = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")  # a long path goes on in the next line, whole
    for name, text in rows.items():
        grid.add_row(words(name, "dim"), words(in_one_line(text)))
    show(Panel(grid, title=words(in_one_line(title)), title_align="left", expand=False))


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
    from rich.text import Text

    styles = {"chosen": "green", "rejected": "red"}
    whole: Any = Text("example: what is masked is dim, what is scored is coloured\n")
    for part, text, scored in rows:
        style = styles.get(part, "cyan") if scored == "yes" else "dim"
        whole.append(f"{part:9} ", style="bold")
        whole.append_text(words(_short(text) + "\n", style))
    show(whole)
