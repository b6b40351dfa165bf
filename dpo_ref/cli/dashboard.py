"""The standard dashboard of a W&B project: policies by what was measured of them, the curves of training, its cost.

    python -m dpo_ref.cli.dashboard <user or team> <project>

Needs `pip install -r requirements-wandb.txt` and an API key: a view is stored by the service. Runs are grouped by
what they were trained with; panels that need evaluations (`evaluate.py`, `evaluation.every`) stay empty before there
are any.
"""

import sys
from collections.abc import Sequence

from dpo_ref.cli import stopping

if __name__ == "__main__":
    stopping.end_at_once()

from dpo_ref.evaluation import results
from dpo_ref.evaluation.results import Metric
from dpo_ref.tracking.redaction import without_keys
from dpo_ref.tracking.terminal import guard_streams
from dpo_ref.tracking.weights_and_biases import Curves, Plane, Section, save_dashboard

NAMES = {"scorer": "gold", "baseline": "initial", "model": "initial"}
WHILE_TRAINING = (results.SCORE, results.WIN_RATE, results.KL, results.LENGTH, results.ENDED)
CHOSEN, REJECTED = (results.LOGRATIO.of(side=side) for side in ("chosen", "rejected"))


def _key(metric: Metric) -> str:
    return f"evaluation/{metric.of(**NAMES)}"


def _title(metric: Metric) -> str:
    title = metric.title.format(**NAMES)
    return title[0].upper() + title[1:]


def _while_training_and_held_out(title: str, key: str) -> Curves:
    return Curves(title, (f"train/{key}", f"eval/{key}"))


SECTIONS = (
    Section(
        "Policies",
        (
            Plane("Reward against KL", _key(results.KL), _key(results.SCORE)),
            Plane("Win rate against KL", _key(results.KL), _key(results.WIN_RATE)),
            Plane("Win rate against length", _key(results.LENGTH), _key(results.WIN_RATE)),
            Plane("Win rate against the end token's shift", _key(results.END_CHOSEN), _key(results.WIN_RATE)),
        ),
    ),
    Section("Policies while training", [Curves(_title(metric), (_key(metric),)) for metric in WHILE_TRAINING]),
    Section(
        "Training",
        (
            _while_training_and_held_out("Loss", "loss"),
            _while_training_and_held_out("Implicit-reward accuracy", results.ACCURACY.key),
            _while_training_and_held_out("Margins", results.MARGIN.key),
            Curves("Log-ratios, policy to reference", (f"train/{CHOSEN}", f"train/{REJECTED}")),
            _while_training_and_held_out("Log-ratio at the end token", results.END_CHOSEN.key),
            Curves("Gradient norm", ("train/grad_norm",)),
        ),
    ),
    Section(
        "Cost",
        (
            Curves("Pairs per second", ("train/throughput/pairs_per_second",)),
            Curves("Peak memory, GiB", ("train/memory/peak_gib",)),
        ),
        is_open=False,
    ),
)


def main(arguments: Sequence[str]) -> None:
    """The command: two words, the user or team and the project."""
    if len(arguments) != 2:
        raise ValueError("python -m dpo_ref.cli.dashboard <user or team> <project>")
    entity, project = arguments
    print(save_dashboard(entity, project, SECTIONS))


if __name__ == "__main__":
    guard_streams()
    with stopping.in_one_line():
        try:
            main(sys.argv[1:])
        except ValueError as error:
            sys.exit(f"error: {without_keys(str(error))}")
