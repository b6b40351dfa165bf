"""`check.html` and its terminal screen: what a training run would be like, before it is run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_ref.data.inspection import Example, Hygiene, quantiles
from dpo_ref.evaluation.check import RanksFacts, RunFacts, RunWarning, StepZero, in_time
from dpo_ref.files.writing import write_text
from dpo_ref.reports import page
from dpo_ref.reports.data import counts_of, example_article, panels, reference_margins_panel
from dpo_ref.reports.tables import MISSING, number, percent
from dpo_ref.tracking.terminal import in_one_line, on_terminal, run_summary, say, show, show_example, words
from dpo_ref.training.cost import Spent

FILE = "check.html"
SHOWN = 160  # characters of each part of the example, in a terminal
FEW = 6  # warnings that a terminal shows; the page has all


class Elsewhere(NamedTuple):
    """The run on a card that is not here: what it takes there, what there is, and hours by the speed estimated."""

    card: str
    needed: int
    available: int
    pairs_per_second: float
    seconds: float


@dataclass(frozen=True, slots=True)
class RunCheck:
    """Everything that a check shows."""

    title: str
    facts: RunFacts
    warnings: Sequence[RunWarning]
    example: Example
    trained: Sequence[str]  # what is trained and what stays, in sentences
    memory: Mapping[str, int]  # bytes by part
    peak: int  # bytes at most
    measured_peak: str | None  # the peak of the steps that were made here, in a sentence
    speed: str  # and where it is from
    spent: Sequence[Spent]
    elsewhere: Sequence[Elsewhere]
    table: str  # of the reference: what is there already
    took: float  # seconds of the check
    margins: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the reference, in nats, where there are any
    told: Mapping[str, str] = field(default_factory=dict)  # of them: how many are negative, how many would be kept

    @property
    def seconds(self) -> float:
        """To the end of the run."""
        return sum(part.seconds for part in self.spent)

    @property
    def verdict(self) -> str:
        """In a line."""
        fit = self.facts.fit
        fits = "" if fit is None else "it fits" if fit.needed <= fit.available else "it does not fit"
        hours = f"{in_time(self.seconds)} to the end" if self.spent else "how long it takes is not known here"
        count = len(self.warnings)
        warned = "no warnings" if not count else f"{count} warning" + ("s" if count > 1 else "")
        return ", ".join(filter(None, (fits, hours, warned)))


def gib(size: int) -> str:
    """Bytes in GiB, in MiB where that is too coarse."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


# --- sentences that page and screen share


def data_line(hygiene: Hygiene) -> str:
    """How many groups there are, and what became of the others."""
    lost = [f"{count:,} {name}" for name, count in hygiene.counts.items() if name != "groups"]
    lost += [f"{count:,} rows left out: {reason}" for reason, count in hygiene.reading.dropped.items()]
    return "; ".join([f"{hygiene.num_train:,} groups to train on, {hygiene.num_eval:,} held out", *lost])


def lengths_line(facts: RunFacts) -> str:
    """Tokens of each part, and the limit."""
    hygiene = facts.hygiene
    parts = {"prompt": hygiene.prompts, "chosen": hygiene.chosen, "rejected": hygiene.rejected}
    parts |= {"response": hygiene.alone}
    told = ", ".join(f"{name} {quantiles(values)}" for name, values in parts.items() if len(values))
    return f"tokens, median: {told}; at most {facts.max_length:,}"


def reference_line(facts: RunFacts) -> str:
    """Which reference, and what it says of the pairs."""
    zero = facts.step_zero
    if not facts.uses_reference:
        return "none: the objective uses none"
    if zero is None:
        return facts.reference
    parts = [facts.reference]
    if zero.prefers_rejected is not None:
        parts.append(f"prefers the rejected response on {percent(zero.prefers_rejected)} of {zero.num_pairs} pairs")
    return ", ".join([*parts, *_saturation(zero)])


def _saturation(zero: StepZero) -> list[str]:
    if zero.at is None:
        return []
    parts = [f"{percent(zero.at.saturated.mean)} saturated at beta={zero.beta:g}"]
    if zero.start.sd == 0:
        return [*parts, "any beta would do to begin with: policy and reference say the same"]
    if zero.start.listed is not None:
        parts.append(f"up to beta={zero.start.listed:g} at most 5 % are")
    return parts


def kept_line(check: RunCheck) -> str:
    """What the reference would keep of the pairs that were looked at; nothing where it does not choose."""
    kept = [f"{name} {said}" for name, said in check.told.items() if name.startswith("data.")]
    return f"{', '.join(kept)} ({len(check.margins)} pairs looked at; steps and time follow)" if kept else ""


def memory_line(check: RunCheck) -> str:
    """The sum, the largest parts, and whether it fits."""
    parts = sorted(check.memory.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {gib(size)}" for name, size in parts[:4] if size)
    fit = check.facts.fit
    there = "" if fit is None else f" of {gib(fit.available)} ({fit.where})"
    return f"{gib(check.peak)}{there}: {largest}"


def ranks_line(together: RanksFacts) -> str:
    """How many there are, who is slowest, who has most to do, and what they send."""
    at, speed = together.slowest
    hidden = f" of {together.step:.2g} s" if together.step else ""
    return (
        f"{len(together.ranks)}; the slowest, rank {at}, computes {speed:.2f} times as fast as the others; the one "
        f"with most to do has {together.busiest:.2f} times the mean's tokens; a rank sends "
        f"{together.sent / 1e6:,.1f} MB a step, {together.sending:.2g} s{hidden} if nothing hides it"
    )


def hours_line(check: RunCheck) -> str:
    """The whole time and its parts."""
    parts = ", ".join(f"{part.part} {in_time(part.seconds)}" for part in check.spent if part.seconds)
    return f"{in_time(check.seconds)}: {parts}"


# --- the terminal


def show_check(check: RunCheck, file: Path) -> None:
    """One screen: an example, what is known in a line each, and the warnings."""
    show_example([[part, _short(text), scored] for part, text, scored in check.example.short_rows()])
    rows = {
        "data": data_line(check.facts.hygiene),
        "lengths": lengths_line(check.facts),
        "reference": reference_line(check.facts),
        "pairs": kept_line(check),
        "table": check.table,
        "trained": check.trained[0],
        "memory": memory_line(check),
        "measured": check.measured_peak or "",
        "speed": check.speed,
        "ranks": ranks_line(check.facts.together) if check.facts.together else "",
        "time": hours_line(check) if check.spent else "",
        "page": str(file),
    }
    run_summary(f"{check.title}: {check.verdict}", {name: text for name, text in rows.items() if text})
    show_warnings(check.warnings)


def _short(text: str) -> str:
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} [...] {text[-half:]}"


def show_warnings(warnings: Sequence[RunWarning]) -> None:
    """Each in a few words: what, what it costs, what mends it; the costliest first."""
    if not warnings:
        return
    if on_terminal():
        show(_warnings_table(warnings[:FEW]))
    else:
        say("warnings, the costliest first:")
        say(*(f"  {w.what}: {w.cost}. Mended by {w.mend}" for w in warnings[:FEW]))
    if len(warnings) > FEW:
        say(f"  and {len(warnings) - FEW} more, on the page")


def _warnings_table(warnings: Sequence[RunWarning]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for title in ("warning, the costliest first", "costs", "mended by"):
        table.add_column(words(title), overflow="fold")
    for warning in warnings:
        cells = (warning.what, warning.cost, warning.mend)
        table.add_row(*(words(in_one_line(text)) for text in cells))
    return table


# --- the page


def check_page(check: RunCheck) -> str:
    """The page as HTML, readable without a network."""
    facts = check.facts
    parts = [
        '<p class="over">Before any training</p>',
        f"<h1>{page.text(check.title)}: {page.text(check.verdict)}</h1>",
        page.alerts([f"{w.what}. Mended by {w.mend}" for w in check.warnings if w.wasted >= 0.5]),
        "<h2>What is likely to go wrong</h2>",
        _warnings(check.warnings),
        "<h2>Time</h2>",
        _time(check),
        "<h2>Memory</h2>",
        _memory(check),
        "<h2>Ranks</h2>" + _ranks(facts.together) if facts.together else "",
        "<h2>On other devices</h2>" + _elsewhere(check) if check.elsewhere else "",
        "<h2>What is trained</h2>",
        *(f'<p class="lead">{page.text(sentence)}</p>' for sentence in check.trained),
        "<h2>The reference, and the first step</h2>",
        page.definitions(_first_step(check)),
        page.pictures([reference_margins_panel(check.margins)]) if len(check.margins) else "",
        "<h2>The data</h2>",
        page.definitions([*counts_of(facts.hygiene), ("lengths", lengths_line(facts))]),
        page.pictures(panels(facts.hygiene, np.zeros(0))),
        "<h2>An example as the model sees it</h2>",
        '<p class="scale">Grey text is read, coloured tokens are scored; their borders are the tokens\' borders.</p>',
        example_article(check.example),
        f"<footer>Made by dpo_ref in {in_time(check.took)}. Nothing was trained or kept.</footer>",
    ]
    return page.page(check.title, "\n".join(filter(None, parts)))


def _warnings(warnings: Sequence[RunWarning]) -> str:
    if not warnings:
        return '<p class="lead">Nothing that is looked for.</p>'
    rows = [[warning.what, warning.cost, warning.mend] for warning in warnings]
    return f'<div class="sentences">{page.plain_table(["what", "costs", "mended by"], rows)}</div>'


def _time(check: RunCheck) -> str:
    told = f'<p class="lead">{page.text(check.speed)}</p>'
    if not check.spent:
        return told
    rows = [[spent.part, spent.of, in_time(spent.seconds)] for spent in check.spent]
    return told + page.plain_table(["part", "of", "time"], [*rows, ["to the end", "", in_time(check.seconds)]])


def _memory(check: RunCheck) -> str:
    rows = [[name, gib(size)] for name, size in check.memory.items()]
    rows.append(["at most", gib(check.peak)])
    if check.facts.fit is not None:
        rows.append([f"there is ({check.facts.fit.where})", gib(check.facts.fit.available)])
    measured = f'<p class="small">{page.text(check.measured_peak)}</p>' if check.measured_peak else ""
    return page.plain_table(["part", "memory"], rows) + measured


def _ranks(together: RanksFacts) -> str:
    names = ["rank", "where", "takes", "has", "TFLOP/s", "tokens of the first batches"]
    rows = [
        [f"{at}", rank.where, gib(rank.needed), MISSING if rank.available is None else gib(rank.available),
         number(rank.flops / 1e12, 3), f"{rank.tokens:,}"]
        for at, rank in enumerate(together.ranks)
    ]  # fmt: skip
    note = "TFLOP/s of products of matrices as wide as the model, made by all ranks at the same time."
    told = f'<p class="lead">{page.text(ranks_line(together))}</p>'
    return f'{told}{page.plain_table(names, rows)}<p class="small">{note}</p>'


def _elsewhere(check: RunCheck) -> str:
    names = ["card", "takes", "has", "fits", "groups a second", "steps take"]
    rows = [
        [at.card, gib(at.needed), gib(at.available), "yes" if at.needed <= at.available else "no",
         number(at.pairs_per_second, 1), in_time(at.seconds)]
        for at in check.elsewhere
    ]  # fmt: skip
    note = "Estimated: memory by parts, speed by operations and the share of a card's peak that the benchmarks reach."
    return f'{page.plain_table(names, rows)}<p class="small">{note}</p>'


def _first_step(check: RunCheck) -> list[tuple[str, str]]:
    facts = check.facts
    rows = [("reference", facts.reference), ("table", check.table), ("pairs", kept_line(check))]
    zero = facts.step_zero
    if zero is None:
        return [(name, text) for name, text in rows if text]
    rows += [
        ("pairs looked at", f"{zero.num_pairs}"),
        ("prefers the rejected", MISSING if zero.prefers_rejected is None else percent(zero.prefers_rejected)),
    ]
    if zero.at is not None:
        rows += [
            (f"saturated at beta={zero.beta:g}", percent(zero.at.saturated.mean)),
            ("loss of the first step", number(zero.at.loss, 3)),
            ("s.d. of the margin, nats", number(zero.start.sd, 2)),
            ("largest beta with at most 5 % saturated", MISSING if zero.start.listed is None else
             "any" if zero.start.sd == 0 else f"{zero.start.listed:g}"),
        ]  # fmt: skip
    return [(name, text) for name, text in rows if text]


def write_check(folder: Path, check: RunCheck) -> Path:
    """Write `check.html` into `folder`; returns where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, check_page(check))
    return folder / FILE
