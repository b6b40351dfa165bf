"""Every group once per epoch, packs within their budget, tensors as laid out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ref.data.packing import collate, optimiser_batches, pack, steps_per_epoch
from dpo_ref.types import TokenGroup
from tests.support.tiny import random_groups

LAYOUTS = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 20), min_size=1, max_size=3)), min_size=1, max_size=12
)


def test_collate_by_hand():
    first = TokenGroup(4, "a", [10, 11], ([12, 13, 2], [14, 2]), (7, 1), ((0, 1),))
    second = TokenGroup(9, "b", [20], ([21, 2], [22, 2]), (3, 4), ((1, 0),))
    batch = collate([first, second])
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 2, 14, 2, 20, 21, 2, 22, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 1, 2]
    assert batch.head_index.tolist() == [1, 2, 3, 1, 5, 7, 8, 7, 10]  # 1 and 7 predict both responses' first tokens
    assert batch.target_ids.tolist() == [12, 13, 2, 14, 2, 21, 2, 22, 2]
    assert batch.response_index.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.lengths.tolist() == [3, 2, 2, 2]
    assert batch.num_bytes.tolist() == [7, 1, 3, 4]
    assert batch.group_index == (4, 9)
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 3], [1, 2])
    assert batch.layout == ((2, (3, 2)), (1, (2, 2)))
    assert torch.equal(batch.to(torch.device("cpu")).input_ids, batch.input_ids)


@settings(max_examples=80, deadline=None)
@given(layout=LAYOUTS, budget=st.integers(1, 200))
def test_packs_hold_every_group_once_within_the_budget(layout, budget):
    groups = random_groups(layout)
    packs = pack(groups, tokens_per_batch=budget)
    assert sorted(g.group_index for p in packs for g in p) == list(range(len(groups)))
    for members in packs:
        assert len(members) == 1 or sum(g.num_tokens for g in members) <= budget
    assert pack(groups, tokens_per_batch=budget, packing="one_group") == [[g] for g in groups]


def test_every_group_once_per_epoch_and_resume_sees_the_same():
    groups = random_groups([(2, (3,))] * 10)
    per_epoch = steps_per_epoch(10, 4)
    assert per_epoch == 3
    stream = optimiser_batches(groups, 4, seed=5)
    first, second = ([next(stream) for _ in range(per_epoch)] for _ in range(2))
    for epoch, batches in enumerate((first, second)):
        assert [e for e, _ in batches] == [epoch] * 3
        assert sorted(g.group_index for _, b in batches for g in b) == list(range(10))
    assert [g.group_index for _, b in first for g in b] != [g.group_index for _, b in second for g in b]
    resumed = optimiser_batches(groups, 4, seed=5, first_step=4)
    assert [next(resumed), next(resumed)] == second[1:]
    other = optimiser_batches(groups, 4, seed=6)
    assert next(other)[1] != first[0][1]


def test_errors():
    with pytest.raises(ValueError, match="tokens_per_batch=0"):
        pack(random_groups([(1, (1,))]), tokens_per_batch=0)
    with pytest.raises(ValueError, match="nothing to train on"):
        next(optimiser_batches([], 4, seed=0))
