"""Evaluation of held-out data takes the memory of one pack and of the items' values, however much is held out."""

import weakref
from functools import partial

import pytest

from dpo_ref.data import packing
from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import WindowedPacks, pack
from dpo_ref.models.loading import Policy
from dpo_ref.objectives.coupled import aot, beta_dpo
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.objectives.unpaired import bco, kto
from dpo_ref.references.policies import LiveReference
from dpo_ref.training.rounds import groups_for
from dpo_ref.training.trainer import evaluate
from tests.support.tiny import random_groups, tiny_model

BUDGET = 700  # tokens a pack
PACK = partial(pack, tokens_per_batch=BUDGET)
OBJECTIVES = {"dpo": dpo, "aot": aot, "beta_dpo": beta_dpo, "bco": bco, "kto": kto}


def groups_of(objective, count):
    """Prompts of 90 tokens, two responses, every tenth of them long: other prompts' may be longer than one's own."""
    layout = [(90 + index % 3, (60, 5) if index % 10 == 0 else (3, 2)) for index in range(count)]
    groups = from_groups(random_groups(layout))
    return groups_for(objective, groups)


class Watched(Policy):
    """Notes how large packs are, and how many earlier ones are still in memory when one is done."""

    def outputs(self, batch):
        logps = super().outputs(batch)
        assert not logps.token_logps.requires_grad
        self.tokens.append(len(batch.input_ids))
        self.alive.append(sum(tensor() is not None for tensor in self.earlier))
        self.earlier.extend(map(weakref.ref, (batch.input_ids, logps.token_logps)))
        return logps


@pytest.mark.parametrize("name", OBJECTIVES)
def test_memory_does_not_grow_with_what_is_held_out(name, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 16)
    objective, model, at_once = bind(OBJECTIVES[name]), tiny_model(), []
    policy = Watched(lambda: model, None)
    vars(policy).update(tokens=[], alive=[], earlier=[])

    def noted(groups):
        at_once.append(len(groups))
        return PACK(groups)

    reference = LiveReference("other", tiny_model(seed=1), "id", "weights")
    values = evaluate(policy, reference, objective, groups_of(objective, 80), noted)
    assert len(values["loss"]) == (80 if objective.pairwise else 160)
    assert max(at_once) <= 16
    assert max(policy.tokens) <= BUDGET
    assert max(policy.alive) <= 2  # ids and log-probs of the pack before
    for value in values.values():
        assert value.untyped_storage().nbytes() == value.nbytes  # no part of a larger one


def test_windowed_packs_are_those_of_each_window_and_can_be_gone_through_again(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 4)
    groups = random_groups([(3 + index, (2, 1)) for index in range(10)])
    packs = WindowedPacks(groups, PACK)
    assert [[group.group_index for group in part] for part, _ in packs] == [[3, 2, 1, 0], [7, 6, 5, 4], [9, 8]]
    assert list(packs) == list(packs)
