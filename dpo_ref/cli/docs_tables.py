"""The tables of docs/ that are written by a program.

    python -m dpo_ref.cli.docs_tables objectives > docs/objectives.md
    python -m dpo_ref.cli.docs_tables references      (rewrites its table in docs/references.md)
    python -m dpo_ref.cli.docs_tables metrics > docs/metrics.md

The first comes from the objectives' signatures and behaviour and from the YAML files that configure them; the second
says which reference composes with which objective, found by composing all of them; the third is the table of metrics
in `evaluation/results.py`.
"""

import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from dpo_ref.cli.command_line import compose_command, config_folders
from dpo_ref.cli.resolve import resolve, strength
from dpo_ref.cli.schemas import CONF, groups, locate, look_in, register
from dpo_ref.component import configuration
from dpo_ref.evaluation.results import METRICS, Metric
from dpo_ref.models import experts
from dpo_ref.objectives.interface import OF_TOKENS, Objective, bind, probe_inputs

# --- docs/objectives.md


FIELDS = ("loss", "reward", "convention", "TRL", "HALOs")
COLUMNS = ("objective", "loss", "reward", "convention", "needs", "TRL", "HALOs", "strength", "paper")
SIZES: dict[str, Callable[[Any], Any]] = {  # the policy's log-probs with one of their sizes doubled
    "lengths": lambda policy: replace(policy, lengths=2 * policy.lengths),
    "bytes": lambda policy: replace(policy, num_bytes=2 * policy.num_bytes),
}
WORDS = {
    "whole": "the whole batch",
    "mismatched": "responses of other prompts",
    "old": "the sampling policy",
    "collision": "sum of p^2",
    "running": "a running statistic",
    "rewards": "the rows' scores",
    "divergences": "next-token distributions",
}
PREAMBLE = """\
# Objectives

Written by `python -m dpo_ref.cli.docs_tables objectives > docs/objectives.md`, from `dpo_ref/objectives/` and
`conf/objective/`.

- **log pi** is the policy's log-probability of a whole response, in nats, end of turn included; **log-ratio** is
  log pi - log pi_ref; **length** is in the policy's tokens, **bytes** are of the text in UTF-8. The loss is one number
  a pair (`sft`, `kto`, `bco` and objectives on samples: a response), and a step minimises their mean.
- **margin** is the chosen reward minus the rejected reward. Rewards are what `rewards/*` in the metrics are. Where the
  loss names nothing else it is a fixed function of their margin.
- **strength** is the option that top-level `beta=` sets, with its default. Objectives without one refuse `beta=`.
  Values of different objectives do not compare: look at the units.
- **needs** is found by asking: what the signature takes, and whether the loss changes with lengths or bytes.
- **the whole batch** is the optimiser batch, whatever its packs: a forward pass over all of it comes before the first
  gradient. A reference that has no values of **tokens** is refused where they are needed.
- Every objective on pairs takes `objective.nll_weight`: that many times the chosen response's mean negative token
  log-prob is added to each pair's loss (RPO, arXiv:2404.19733); `cpo` and `orpo` have such a term of their own.
- Every objective on log-probs of pairs takes `objective.kl_weight`: that many times KL(policy || reference) of the
  next token, exact over the vocabulary, is added to each pair's loss: summed over the scored tokens of both responses,
  divided by their number. It and **next-token distributions** need a reference that is a model in memory, which is
  asked at every step (`reference.cache=off`): `initial`, `adapter_base`, `other`, `interpolate` and `moving` are.
- The rewards of arXiv:2407.13709 are references, not objectives: `objective=dpo reference=none` has the
  posterior-probability reward beta log pi(y|x), `objective=dpo reference=prior` the likelihood reward
  beta (log pi(y|x) - log p(y)).
- `tests/objectives/test_objectives_trl.py` runs TRL 1.16's code beside ours: values and gradients are equal where the
  TRL column names an equivalent, and differ by what the row says for `cpo` and `orpo`.
- IPO is where implementations part most. With h the difference of the log-ratios, its target is 1 / (2 tau) for summed
  h (the paper as printed, DPO's authors) or for per-token means (TRL, HALOs); it is 1 / (2 tau^2) for each position
  and tau itself in two programs of Tajwar et al. 2024. At tau 0.1 and h = 0, 2, 5, `ipo_sum` is 25, 9, 0.
"""


class Header(NamedTuple):
    """The comment that opens a YAML file in conf/objective/: title with source, command, and the named fields."""

    title: str
    command: str
    fields: dict[str, str]


def header(path: Path) -> Header:
    """Read it; ValueError naming the file where a part is missing, unless it is a user's own."""
    comment = [line[1:].strip() for line in path.read_text().split("\ndefaults:")[0].splitlines()]
    fields = dict(line.split(": ", 1) for line in comment[2:] if ": " in line)
    if path.parents[1] != CONF:
        return Header((comment[0] or path.stem).removesuffix("."), "", dict.fromkeys(FIELDS, "-") | fields)
    if tuple(fields) != FIELDS or not comment[1].startswith(f"python train.py objective={path.stem}"):
        raise ValueError(f"{path.name}: its comment must be a title, a command, then {', '.join(FIELDS)}")
    return Header(comment[0].removesuffix("."), comment[1], fields)


def _losses(objective: Objective, changed: Callable[[Any], Any] = lambda policy: policy) -> torch.Tensor:
    """On made-up items, of which the policy's are changed."""
    policy, inputs = probe_inputs(kind=objective.inputs["policy"])
    return objective(changed(policy), replace(inputs, running={})).losses


def needs(function: Callable[..., Any]) -> list[str]:
    """What an objective reads: pairs or responses, other arguments left of its star, token values, lengths, bytes."""
    objective = bind(function)
    usual = _losses(objective)
    candidates = {} if objective.of_scores else SIZES
    sizes = [name for name, doubled in candidates.items() if not torch.equal(_losses(objective, doubled), usual)]
    tokens = ["tokens"] if {*objective.inputs.values()} & {*OF_TOKENS} else []
    others = [WORDS.get(name, name) for name in objective.inputs if name != "policy"]
    items = "pairs" if objective.pairwise else "lists" if objective.listwise else "responses"
    return [items, *others, *tokens, *sizes]


def row(path: Path, target: str) -> dict[str, str]:
    """One objective's cells, by column."""
    function, comment = locate(target), header(path)
    key = strength(function)
    default = OmegaConf.select(OmegaConf.load(path), key) or configuration(function)[key].default if key else None
    papers = ", ".join(re.findall(r"arXiv:[\d.]+\d|[\w.]+/\w+\.pdf|this project", comment.title))
    return {
        "objective": f"`{path.stem}`: {comment.title.split(' (')[0]}",
        **comment.fields,
        "needs": ", ".join(needs(function)),
        "strength": f"`{key}` {default}" if key else "-",
        "paper": papers,
    }


def objectives_page() -> str:
    """The whole of docs/objectives.md."""
    rows = [row(path, target) for path, target in sorted(groups()["objective"].items())]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([cells[name] for name in COLUMNS] for cells in rows)]
    return PREAMBLE + "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# --- the table of docs/references.md


PAGE = Path(__file__).parents[2] / "docs" / "references.md"
BEGIN, END = (
    "<!-- written by python -m dpo_ref.cli.docs_tables references -->",
    "<!-- end of what is written by it -->",
)
SAMPLED = "data=on_policy"


def commands(path: Path) -> list[list[str]]:
    """The command lines in the comment that opens a reference's YAML file, as overrides; without one its name."""
    comment = re.sub(r"\\\n# +", "", path.read_text().split("\ndefaults:")[0])
    lines = re.findall(r"^#  +python train\.py (.*)$", comment, re.MULTILINE)
    return [shlex.split(re.split(r" {3,}", line)[0]) for line in lines] or [[f"reference={path.stem}"]]


def refusal(reference: DictConfig, objective: DictConfig, names: tuple[str, str]) -> str | None:
    """Why a reference does not go with an objective, or None."""
    both = reference.copy()
    both.objective, both.beta = objective.objective, None
    choices = {"reference": names[0], "objective": names[1], "data": "lab", "model": "lab"}
    try:
        resolve(both, choices)
    except ValueError as error:
        return str(error).replace(f"objective={names[1]}", "the objective")
    return None


def _row(command: str, reference: DictConfig, kind: str, objectives: dict[str, DictConfig], with_one: set[str]) -> str:
    outcomes: dict[str | None, list[str]] = defaultdict(list)
    for name, objective in objectives.items():
        outcomes[refusal(reference, objective, (kind, name))].append(name)
    good = set(outcomes.pop(None, []))
    scope = "all objectives" if good == set(objectives) else "all that have a reference" if good == with_one else None
    scope = scope or "all that have a reference but those on the right"
    unused = [why for why, names in outcomes.items() if set(names) == set(objectives) - with_one]
    reasons = [f"{_names_in_code(names)}: {why}" for why, names in outcomes.items() if why not in unused]
    return f"| `{command}` | {scope} | {'; '.join(reasons).replace('|', chr(92) + '|')} |"


def _names_in_code(names: Sequence[str] | set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def table() -> str:
    """The table in Markdown."""
    objectives = {
        path.stem: compose_command([f"objective={path.stem}"])[0] for path in sorted(CONF.glob("objective/*.yaml"))
    }
    without = {name for name, cfg in objectives.items() if refusal(cfg, cfg, ("initial", name))}
    with_one = set(objectives) - without
    rows: dict[str, str] = {}
    for path in sorted(CONF.glob("reference/*.yaml")):
        for words in commands(path):
            if SAMPLED in words:
                continue  # which objectives go with such data is not the reference's matter
            overrides = [word for word in words if not word.startswith(("beta=", "data", "stage", "optim"))]
            command = " ".join(word for word in overrides if word.startswith(("reference=", "reference.mean")))
            if command not in rows:
                rows[command] = _row(command, compose_command(overrides)[0], path.stem, objectives, with_one)
    head = ["| reference | goes with | refused, and why |", "|---|---|---|"]
    return "\n".join([*head, *rows.values(), "", f"Objectives without a reference: {_names_in_code(without)}."])


def references_page() -> str:
    """docs/references.md with its table as it should be."""
    register()
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


# --- docs/metrics.md


METRICS_PREAMBLE = """\
# Metrics of an evaluation

Written by `python -m dpo_ref.cli.docs_tables metrics > docs/metrics.md`, from the table in
`dpo_ref/evaluation/results.py`, of which the columns of reports and terminal tables are made too.

- An evaluation writes them to `evaluation.json`, null where a value could not be measured, and logs them as
  `evaluation/<key>`. With `evaluation.every`, training writes those of samples and held-out pairs to `metrics.jsonl`
  under the same names ([training_evaluation.md](training_evaluation.md)).
- Names in angle brackets: `<scorer>` and `<baseline>` are those of the evaluation (`gold`, `initial`); `<model>` is
  `initial` or `loss_reference`; `<text>` is `chosen`, `rejected` or `own`, `<side>` one of the former two.
- **Better** says which way a policy is better, all else equal; none where a number describes and does not judge.
- **Beside it** stand more keys: the metric's own with an ending. `_se` is the standard error, clustered by prompt;
  `_low` and `_high` are the ends of a 95 % interval, bootstrapped over prompts; `_ties` is the share of ties;
  `_median` and `_p95` are quantiles over answers; `_k1` is the plain estimate, the mean log-ratio of answers;
  `_per_token` and `_per_byte` divide the sum over answers by theirs; `_share_cut` is the share of answers cut at the
  limit; `_initial` and `_reference` are the same of these models; `_discrete` counts preferences as win, tie or loss;
  `_length_adjusted` is as if both answers were equally long.
- How they are measured: [diagnostics.md](diagnostics.md), [judge.md](judge.md). The metrics of a training step are in
  `dpo_ref/training/metrics.py`; [coming_from.md](coming_from.md) compares them with TRL's.

| metric | what it is | unit | better | beside it |
|---|---|---|---|---|
"""


NAMED = re.compile(r"\{(\w+)\}")


def _metric_row(metric: Metric) -> str:
    key, title, meaning = (NAMED.sub(r"<\1>", text) for text in (metric.key, metric.title, metric.meaning))
    explained = f"{title}: {meaning}" if meaning else title
    beside = ", ".join(f"`{ending}`" for ending in metric.beside) or "-"
    cells = (f"`{key}`", explained.replace("<", r"\<"), metric.unit, metric.better, beside)
    return f"| {' | '.join(cells)} |\n"


EXPERTS_PREAMBLE = """
## Of a training step of a mixture of experts

The loads are those of all tokens of the optimiser step's packs, of which a prompt counts once, in the layers that have
experts. They are written as `train/<name>`, not with `model.compile=true`.

"""


def metrics_page() -> str:
    """The whole of docs/metrics.md."""
    of_experts = "".join(f"- `{name}`: {meaning}\n" for name, meaning in experts.METRICS.items())
    return METRICS_PREAMBLE + "".join(map(_metric_row, METRICS)) + EXPERTS_PREAMBLE + of_experts


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["objectives", *own]:
            look_in(config_folders(own))
            print(objectives_page(), end="")
        case ["references"]:
            PAGE.write_text(references_page())
        case ["metrics"]:
            print(metrics_page(), end="")
        case _:
            sys.exit("python -m dpo_ref.cli.docs_tables objectives > docs/objectives.md, references, or metrics")
