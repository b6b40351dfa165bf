"""Which pairs a run trains on where the reference chooses or weighs them, and what is left of that in its folder."""

import torch

from dpo_ref.cli.resolve import RunConfig
from dpo_ref.files.writing import write_json
from dpo_ref.models.asked import Workspace
from dpo_ref.models.loading import TrainedModel
from dpo_ref.references.interface import Reference
from dpo_ref.reports.data import reference_margins_panel
from dpo_ref.reports.plots import write_png
from dpo_ref.tracking.terminal import say
from dpo_ref.training.reference_margins import by_reference, chosen_pairs
from dpo_ref.training.rounds import OfflineRounds, Rounds

NAME = "reference_margins"  # of the files in the run's folder


def asks_reference(config: RunConfig) -> bool:
    """Whether the reference chooses or weighs training pairs: then it scores all of them."""
    return bool(config.data.bound(by_reference)().options)


def choose_pairs(
    config: RunConfig, work: Workspace, policy: TrainedModel, reference: Reference, rounds: Rounds
) -> tuple[Rounds, dict[str, int]]:
    """The round of the pairs that the reference keeps, and what became of the others; says it, and writes the margins
    into the run's folder. Raises ValueError where none is kept."""
    choice = config.data.bound(by_reference)()
    with policy.precision(), torch.no_grad():
        chosen = chosen_pairs(choice, reference, rounds.known, rounds.pack, work.device)
    say(chosen.line(choice))
    write_json(work.directory / f"{NAME}.json", chosen.record(choice, reference))
    write_png(work.directory / f"{NAME}.png", [reference_margins_panel(chosen.margins, chosen.kept)])
    return OfflineRounds(chosen.groups, config.trainer, rounds.pack, config.seed), chosen.counts
