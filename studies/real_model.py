"""Does a pretrained model do what the lab does? (RQ1 and RQ3 once more; plan: conf/experiment/real_model.yaml)"""

import gzip
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dpo_ref.evaluation.sweep import collect
from dpo_ref.files.writing import write_lines
from dpo_ref.reports.plots import Panel
from dpo_ref.tracking.terminal import say
from studies.intervals import Interval, over_runs_and_prompts
from studies.pictures import look
from studies.records import Finding, Record, apart, findings_table, markdown, rounded, row_of, shown, wrap
from studies.runner import Runs, read_run, run

MINUTES = 60
MODEL, PAIRS = "DPO_REF_REAL_MODEL", "DPO_REF_REAL_PAIRS"


@dataclass(frozen=True, slots=True)
class Scale:
    """What of the plan is run: where, with which strengths, references and seeds, on how many pairs, and how it is
    evaluated."""

    where: str
    betas: tuple[str, ...]
    references: tuple[str, ...]
    seeds: tuple[str, ...]
    pairs: tuple[str, ...]
    evaluation: tuple[str, ...]


ON_GPU = Scale(
    "GPU", ("0.01", "0.03", "0.1", "0.5"), ("initial", "fine-tuned"), ("0", "1"), (),
    ("generation.samples_per_prompt=2", "generation.max_new_tokens=256"),
)  # fmt: skip
ON_CPU = Scale(
    "CPU", ("0.01", "0.5"), ("initial",), ("0",), ("data.limit=128",),
    ("generation.samples_per_prompt=1", "generation.max_new_tokens=256"),
)  # fmt: skip


def scale() -> Scale:
    """The whole plan where there is a GPU, else the part of it for a CPU."""
    return ON_GPU if torch.cuda.is_available() else ON_CPU


def _folder(variable: str) -> Path:
    """The folder that a variable names. Raises ValueError where it names none."""
    path = Path(os.environ.get(variable, "")).expanduser()
    if not os.environ.get(variable) or not path.is_dir():
        raise ValueError(f"{variable} must name a folder: see conf/experiment/real_model.yaml")
    return path


# --- the halves of the pairs


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def halves(path: Path) -> tuple[list[str], list[str]]:
    """The lines of a file of pairs in two halves that share no prompt: prompts by turns, as they first appear."""
    turns: dict[str, int] = {}
    lines: tuple[list[str], list[str]] = ([], [])
    for row in _rows(path):
        prompt = json.dumps(row["prompt"], sort_keys=True)
        lines[turns.setdefault(prompt, len(turns)) % 2].append(json.dumps(row))
    return lines


def _write_halves(folder: Path, pairs: Path) -> tuple[Path, Path]:
    files = folder / "policy_pairs.jsonl", folder / "other_pairs.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    for file, lines in zip(files, halves(pairs / "pairs_train.jsonl.gz"), strict=True):
        if not file.exists():
            write_lines(file, (f"{line}\n" for line in lines))
    return files


# --- running


def _trained(folder: Path) -> tuple[Runs, Scale]:
    """What is left of training and evaluation; the policies."""
    plan, model, pairs = scale(), _folder(MODEL), _folder(PAIRS)
    say(f"real_model: the part of the plan for a {plan.where}")
    own, other = _write_halves(folder, pairs)
    common = ("+experiment=real_model", f"model.path={model}", f"data.eval_path={pairs / 'pairs_test.jsonl.gz'}")
    asked = list(plan.evaluation)
    references: dict[str, tuple[str, ...]] = {"initial": ("reference=initial",)}
    if plan is ON_GPU:
        of_other = (*common, f"data.path={other}", *plan.pairs)
        _one(folder / "reward_model", *of_other, "objective=reward_model", "reference=auto", "optim.lr=1e-5")
        _one(folder / "fine_tuned", *of_other, "objective=sft", "reference=auto", "optim.lr=2e-5")
        references["fine-tuned"] = ("reference=other", f"reference.path={folder / 'fine_tuned' / 'policy'}")
        asked += ["scorer=reward_model", f"scorer.path={folder / 'reward_model' / 'policy'}"]
    else:
        asked += ["prompts=data", "data@prompts.data=jsonl", f"prompts.data.path={own}", "prompts.limit=24"]
        asked += [f"prompts.data.eval_path={pairs / 'pairs_test.jsonl.gz'}"]
    names = []
    for reference in plan.references:
        for beta in plan.betas:
            for seed in plan.seeds:
                names.append(folder / "runs" / f"{reference}_{beta}_{seed}")
                words = (*references[reference], f"beta={beta}", f"seed={seed}", f"data.path={own}", *plan.pairs)
                _one(names[-1], *common, *words)
    run(folder / "evaluated", "evaluate.py", f"sweep=[{','.join(map(str, names))}]", *asked, environment={})
    return Runs([read_run(job) for name in names for job in collect(name)]), plan


def _one(folder: Path, *words: str) -> None:
    run(folder, "train.py", *words, environment={})


Cells = Mapping[tuple[str, str], Runs]  # by reference and beta


def record(folder: Path) -> Record:
    """Run what is left of the plan, and what came of it."""
    runs, plan = _trained(folder)
    metrics = ("kl", "tokens", "ended", "end", "accuracy", "length_baseline", *(("reward",) if plan is ON_GPU else ()))
    cells = {
        (reference, beta): runs.where(lambda one, name=f"{reference}_{beta}_": one.folder.parent.name.startswith(name))
        for reference in plan.references
        for beta in plan.betas
    }
    rows = [row_of(cell, metrics, reference=reference, beta=beta) for (reference, beta), cell in cells.items()]
    findings = [_falling(cells, reference, plan.betas) for reference in plan.references]
    if plan is ON_GPU:
        findings += [*_loose(cells, plan.betas), _better_reference(cells, plan)]
    return Record({"cells": rows}, findings, {"where": plan.where})


def _mean(cells: Cells, reference: str, beta: str, metric: str) -> float:
    return cells[reference, beta].mean(metric).mean


def _in_order(statement: str, value: float, holds: bool) -> Finding:
    """What two seeds can tell: whether means are in the order of the plan."""
    return Finding(statement, rounded(Interval(value, value, value)), holds)


def _falling(cells: Cells, reference: str, betas: Sequence[str]) -> Finding:
    kl = [_mean(cells, reference, beta, "kl") for beta in betas]
    statement = f"KL falls with beta, reference {reference} (that of {betas[0]} over that of {betas[-1]})"
    return _in_order(statement, kl[0] / kl[-1], all(more > less for more, less in pairwise(kl)))


def _loose(cells: Cells, betas: Sequence[str]) -> list[Finding]:
    def gap(metric: str) -> float:
        return _mean(cells, "initial", betas[0], metric) - _mean(cells, "initial", betas[-1], metric)

    words = f"at beta {betas[0]} less at {betas[-1]}, reference initial"
    return [
        _in_order(f"tokens {words}: above 0", gap("tokens"), gap("tokens") > 0),
        _in_order(f"log-ratio of the end token {words}: below 0", gap("end"), gap("end") < 0),
    ]


def _better_reference(cells: Cells, plan: Scale) -> Finding:
    """Scores are the reward model's here, and paired by seed and prompt as the lab's gold is."""
    best = {
        name: max(plan.betas, key=lambda beta, name=name: _mean(cells, name, beta, "reward"))
        for name in plan.references
    }
    tuned, initial = cells["fine-tuned", best["fine-tuned"]], cells["initial", best["initial"]]
    statement = "reward model's score at the best beta, fine-tuned reference less initial"
    return apart(statement, over_runs_and_prompts(tuned.less(initial), initial.initials))


# --- as it is shown

COLUMNS = {
    "kl": ("KL, nats", 2), "tokens": ("tokens", 0), "ended": ("ended", 2), "end": ("end token, nats", 2),
    "accuracy": ("accuracy", 3), "length_baseline": ("the longer one", 3), "reward": ("reward model", 2),
}  # fmt: skip


def parts(found: Record) -> dict[str, str]:
    """What is written into the page."""
    rows = found.rows["cells"]
    keys = [key for key in COLUMNS if key in rows[0]]
    titles = ["reference", "β", "runs", *(COLUMNS[key][0] for key in keys)]
    lines = [
        [row["reference"], row["beta"], str(row["runs"]), *(shown(row[key], COLUMNS[key][1]) for key in keys)]
        for row in rows
    ]
    return {"real_model": markdown(titles, lines), "real_model tests": findings_table(found, 2)}


def answer(found: Record) -> str:
    """What was found, in a paragraph."""
    rows = found.rows["cells"]
    loose, tight = rows[0], next(row for row in reversed(rows) if row["reference"] == rows[0]["reference"])
    about, ends = f"SmolLM2-135M, on a {found.also['where']}, reference initial:", []
    for row in (loose, tight):
        kl, tokens, end, accuracy = (row[key].mean for key in ("kl", "tokens", "end", "accuracy"))
        ends.append(
            f"at β = {row['beta']} KL is {kl:.2f} nats, answers have {tokens:.0f} tokens, the end token moved by "
            f"{end:.2f} nats, and {accuracy:.1%} of held-out pairs are ranked right"
        )
    longer = loose["length_baseline"].mean
    return wrap(f"{about} {'; '.join(ends)}. Choosing the longer answer is right in {longer:.1%}.")


def panels(found: Record) -> list[Panel]:
    """KL, length and the end token against beta."""

    def against(key: str, title: str, label: str) -> Panel:
        return Panel(title, _drawn(found.rows["cells"], key, title, label))

    return [
        against("kl", "Distance from the initial policy", "nats an answer"),
        against("tokens", "Length of the answers", "tokens"),
        against("end", "The end token of chosen answers", "log-ratio, nats"),
        against("accuracy", "Accuracy on held-out pairs", "share"),
    ]


def _drawn(rows: Sequence[Mapping[str, Any]], key: str, title: str, label: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for index, reference in enumerate(dict.fromkeys(row["reference"] for row in rows)):
            own = [row for row in rows if row["reference"] == reference]
            betas, means = [float(row["beta"]) for row in own], [row[key].mean for row in own]
            axes.plot(betas, means, label=f"reference {reference}", linewidth=1.6, **look(index))
        axes.set_xscale("log")
        axes.set_title(title)
        axes.set_xlabel("β (larger: closer to the reference)")
        axes.set_ylabel(label)
        axes.legend(loc="best")

    return draw
