"""What is shown of one evaluated policy: `report.html`, one page that holds everything, needs no network and reads on
a phone; its pictures as PNG; and its run in the tracker, in the group of the training. Metrics are drawn over the
optimiser step up to which the policy was trained, and are the run's summary too: flat numbers under `evaluation/`,
with `_se`, `_low` and `_high` beside them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_ref.component import Component
from dpo_ref.evaluation.policy import PolicyToEvaluate
from dpo_ref.evaluation.results import AT_TEMPERATURE, LENGTH, REPETITION, SCORE, WIN_RATE, Evaluated, Evaluation
from dpo_ref.files.writing import write_text
from dpo_ref.reports import page, tables
from dpo_ref.reports.diagnostics import diagnostics_panels, diagnostics_section
from dpo_ref.reports.judge import judge_section
from dpo_ref.reports.page import by_question, select
from dpo_ref.reports.plots import BROKEN, INITIAL, Panel, colours, comparison_panels, labels, write_panels, write_png
from dpo_ref.reports.tables import columns, judge_columns, settings, titles
from dpo_ref.tracking.tracker import RunInfo, Tracker, evaluation_artifacts
from dpo_ref.tracking.weights_and_biases import known_id

SHOWN_PER_SELECTION = 30
DIAGNOSTICS = "diagnostics.png"

SECTIONS = (judge_section, diagnostics_section)  # each reads the files of its topic, if they are there


def sample_sections(evaluated: Sequence[Evaluated]) -> str:
    """Side-by-side answers of the first policy and each of the others; the best one's are shown open."""
    baseline, *policies = evaluated
    names = titles([policy.evaluation for policy in evaluated])
    champion = tables.best([policy.evaluation for policy in policies])
    return "".join(
        page.samples(
            select(policy, baseline, SHOWN_PER_SELECTION),
            (names[0], name),
            policy.evaluation.scorer,
            opened=policy.evaluation is champion,
        )
        for policy, name in zip(policies, names[1:], strict=True)
    )


def _pictures(evaluated: Sequence[Evaluated]) -> list[Panel]:
    """All pictures of a report."""
    evaluations = [policy.evaluation for policy in evaluated]
    curves = list(map(TemperatureCurve, evaluations, labels(evaluations), colours(evaluations)))
    return [*comparison_panels(evaluated), *temperature_panels(curves)]


def report(evaluated: Sequence[Evaluated], sections: Sequence[str] = ()) -> str:
    """The page on a few policies, the baseline first; `sections` are of single topics, as HTML. Raises ValueError for
    no policies."""
    if not evaluated:
        raise ValueError("there is nothing to report on; evaluate a policy first")
    evaluations = [policy.evaluation for policy in evaluated]
    title = tables.headline(evaluations)
    drift = tables.drift(evaluations[0], evaluations[1:])
    parts = [
        '<p class="over">Policy evaluation</p>',
        f"<h1>{page.text(title)}</h1>",
        f'<p class="lead">{page.text(drift)}</p>' if drift else "",
        page.alerts([*tables.broken(evaluations), *tables.lacking(evaluations)]),
        page.pictures(_pictures(evaluated)),
        "<h2>Numbers</h2>",
        page.policy_table(
            list(map(page.Row, evaluations, titles(evaluations), colours(evaluations))),
            [*columns(evaluations[0].scorer), *judge_columns(evaluations)],
        ),
        "<h2>Answers side by side</h2>" + sample_sections(evaluated) if len(evaluated) > 1 else "",
        *sections,
        "<h2>How it was measured</h2>",
        page.definitions(settings(evaluations[-1])),
        "<footer>Made by dpo_ref. All numbers are in evaluation.json, all answers in generations.jsonl.</footer>",
    ]
    return page.page(title, "\n".join(parts))


def write_report(folder: Path, evaluated: Sequence[Evaluated]) -> Path:
    """Write `report.html`, `report.png`, with a diagnosis `diagnostics.png`, and each of their pictures in `panels/`
    into `folder`; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    write_text(path, report(evaluated, [section(folder) for section in SECTIONS]))
    pictures, of_tokens = _pictures(evaluated), diagnostics_panels(folder)
    write_png(folder / "report.png", pictures)
    (folder / DIAGNOSTICS).unlink(missing_ok=True)  # of another diagnosis
    if of_tokens:
        write_png(folder / DIAGNOSTICS, of_tokens)
    write_panels(folder / "panels", [*pictures, *of_tokens])
    return path


# --- what sampling at other temperatures does, where `generation.temperature` was a list: a line per policy


APART = 0.012  # between two policies at one temperature
KEY = re.compile(AT_TEMPERATURE.of(temperature="([^/]+)", key="(.+)"))


@dataclass(frozen=True, slots=True)
class TemperatureCurve:
    """A policy as a line."""

    evaluation: Evaluation
    name: str
    colour: str


@dataclass(frozen=True, slots=True)
class ShownAnswers:
    """A metric to draw: its key, the panel's title and caption, a factor for its unit, and the line of no change."""

    key: str
    title: str
    caption: str
    scale: float = 1.0
    level: float = math.nan


def temperatures(evaluation: Evaluation, key: str) -> list[float]:
    """The temperatures at which a metric was measured, ascending."""
    matches = (KEY.fullmatch(name) for name in evaluation.metrics)
    return sorted(float(match[1]) for match in matches if match and match[2] == key)


def at_temperature(evaluation: Evaluation, temperature: float, key: str) -> float:
    """A metric at one of the temperatures; nan where it was not measured."""
    return evaluation.get(AT_TEMPERATURE.of(temperature=f"{temperature:g}", key=key))


def _bar(evaluation: Evaluation, temperature: float, key: str) -> float:
    """Half the 95 % interval."""
    low, high, error = (at_temperature(evaluation, temperature, f"{key}{part}") for part in ("_low", "_high", "_se"))
    halves = [half for half in ((high - low) / 2, 1.96 * error) if not math.isnan(half)]
    return halves[0] if halves else 0.0


def _panel(curves: Sequence[TemperatureCurve], metric: ShownAnswers, with_legend: bool) -> Panel:
    def draw(axes: Any) -> None:
        for index, curve in enumerate(curves):
            at = temperatures(curve.evaluation, metric.key)
            beside = APART * (index - (len(curves) - 1) / 2)  # bars of equal temperatures stay apart
            x = [temperature + beside for temperature in at]
            values = [metric.scale * at_temperature(curve.evaluation, temperature, metric.key) for temperature in at]
            bars = [metric.scale * _bar(curve.evaluation, temperature, metric.key) for temperature in at]
            dashes = (0, (4, 3)) if curve.evaluation.baseline is None else "-"
            axes.errorbar(x, values, yerr=bars, marker="o", linestyle=dashes, color=curve.colour, markersize=5,
                          linewidth=1.6, elinewidth=1.0, capsize=2, label=curve.name)  # fmt: skip
            judged = curve.evaluation.generation.get("temperature")  # the verdict is on these answers
            if curve.evaluation.degenerate and judged in at:
                axes.plot(x[at.index(judged)], values[at.index(judged)], "X", color=BROKEN, markersize=9,
                          linestyle="none", zorder=4)  # fmt: skip
        if not math.isnan(metric.level):
            axes.axhline(metric.level, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_title(metric.title)
        axes.set_xlabel("sampling temperature")
        if with_legend:
            axes.legend(loc="best")

    return Panel(f"{metric.caption} Bars are 95 % intervals.", draw)


def temperature_panels(curves: Sequence[TemperatureCurve]) -> list[Panel]:
    """Reward, win rate, length and repetition against the sampling temperature; none where a single one was used."""
    if not curves:
        return []
    last = curves[-1].evaluation
    scorer, baseline = last.scorer, last.baseline
    metrics = [
        ShownAnswers(
            last.key(SCORE), f"{scorer.capitalize()} reward by temperature", "Mean reward at each temperature."
        ),
        ShownAnswers(
            last.key(WIN_RATE),
            f"Win rate against {baseline} by temperature, %",
            "Both policies sampled at the same temperature; ties half.",
            scale=100.0,
            level=50.0,
        ),
        ShownAnswers(LENGTH.key, "Tokens by temperature", "Mean length of the answers, the end token counted."),
        ShownAnswers(REPETITION.key, "Repetition by temperature", "Share of an answer's 4-grams that are repeats."),
    ]
    panels = []
    for metric in metrics:
        members = [curve for curve in curves if len(temperatures(curve.evaluation, metric.key)) > 1]
        panels += [_panel(members, metric, with_legend=not panels)] if members else []
    return panels


# --- in the tracker


PREFIX = "evaluation/"
ANSWERS = ("prompt", "answer", "score", "tokens", "finish_reason", "baseline_answer", "baseline_score")
SHOWN = 200  # answers in the table
LONGEST_SHOWN = 2000  # characters of a prompt or an answer; the artifact has all of it


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} [...]"


def _answers(evaluated: Evaluated, baseline: Evaluated | None) -> list[list[Any]]:
    """The answers with their scores and lengths, and the baseline's to the same prompts; columns are `ANSWERS`."""
    others, rows = by_question(baseline) if baseline else {}, []
    for question, (answer, score) in list(by_question(evaluated).items())[:SHOWN]:
        counterpart = [_short(others[question][0].output), others[question][1]] if question in others else [None, None]
        row = [_short(answer.prompt[-1]["content"]), _short(answer.output), score, answer.num_tokens]
        rows.append([*row, answer.finish_reason, *counterpart])
    return rows


def track_evaluation(
    tracking: Component,
    config: dict[str, Any],
    subject: PolicyToEvaluate,
    evaluated: Evaluated,
    baseline: Evaluated | None,
    files: Sequence[Path] = (),
) -> None:
    """Log an evaluation as a run of its own that names the training it belongs to. `files` are pages and pictures."""
    run = subject.run
    training, step, group = None, 0, subject.name
    if run is not None:
        training, step, group = known_id(run.folder, "train"), run.summary["steps"], run.group
    about = {"id": training, "policy": subject.name, "steps": step}
    about |= subject.summary("objective", "reference", "beta", "seed", "identities")
    info = RunInfo(
        subject.folder, {**config, "training": about}, f"evaluate {subject.name}", group, "evaluate", resume=False
    )
    tracker, metrics = tracking(info), evaluated.evaluation.metrics
    values = {f"{PREFIX}{name}": value for name, value in metrics.items()}
    tracker.log(values, step=step)
    tracker.table("generations", ANSWERS, _answers(evaluated, baseline), step=step)
    tracker.histogram(f"{PREFIX}scores", evaluated.scores, step=step)
    tracker.histogram(f"{PREFIX}tokens", [float(answer.num_tokens) for answer in evaluated.generations], step=step)
    log_files(tracker, files)
    reasons = evaluated.evaluation.degenerate
    verdict = {"degenerate": bool(reasons), "degenerate_because": "; ".join(reasons)}
    verdict |= {"missing": "; ".join(tables.lacking([evaluated.evaluation]))}
    tracker.summary(
        {**values, **{f"{PREFIX}{name}": value for name, value in verdict.items()}, "training_run": training}
    )
    for artifact in evaluation_artifacts(training or subject.name, subject.folder, about):
        tracker.artifact(artifact)
    tracker.finish(0)


def log_files(tracker: Tracker, files: Sequence[Path]) -> None:
    """Pictures as images, under their names; everything else as files."""
    for path in files:
        if path.suffix == ".png":
            tracker.image(path.stem, path)
        else:
            tracker.file(path)
