"""Pairs and advantages from rewards: numbers by hand, frequencies, and what gives no pair."""

import math
import random

import pytest
import torch

from dpo_ref.objectives.interface import Sampled, bind
from dpo_ref.training.advantages import ADVANTAGES, PAIRS, all_with, best_of_n, bradley_terry
from dpo_ref.training.on_policy import grouping_of
from dpo_ref.types import ResponseLogps

REWARDS = [0.5, 1.0, 0.0, 0.5]


def chance():
    return random.Random(0)


def test_best_vs_worst_is_an_ordered_pair_of_the_extremes():
    picked = PAIRS["best_vs_worst"](REWARDS, chance())
    assert (picked.places, picked.pairs, picked.advantages) == ((1, 2), ((0, 1),), None)


@pytest.mark.parametrize("name", ["best_vs_worst", "random_two"])
def test_equal_rewards_give_no_pair(name):
    assert PAIRS[name]([0.3, 0.3], chance()) is None


def test_random_two_orders_by_reward_and_draws_every_pair():
    drawn = [PAIRS["random_two"]([3.0, 1.0, 2.0], source) for source in [chance()] for _ in range(200)]
    assert {picked.places for picked in drawn} == {(0, 1), (0, 2), (2, 1)}


@pytest.mark.parametrize(("gap", "scale"), [(0.0, 5.0), (0.5, 2.0), (1.0, 3.0)])
def test_bradley_terry_frequencies(gap, scale):
    """P(the better one is preferred) = sigmoid(scale gap), to 4 standard errors of 4,000 draws."""
    source, rewards = chance(), [gap, 0.0]
    wins = sum(bradley_terry(rewards, source, scale).places == (0, 1) for _ in range(4000)) / 4000
    expected = 1 / (1 + math.exp(-scale * gap))
    assert wins == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000) + 1e-9)


def test_best_of_n_keeps_the_first_best_alone():
    assert best_of_n([0.1, 0.9, 0.9], chance()).places == (1,)


BY_HAND = {
    "none": [0.5, 1.0, 0.0, 0.5],
    "group_mean": [0.0, 0.5, -0.5, 0.0],
    "leave_one_out": [0.0, 2 / 3, -2 / 3, 0.0],  # 1 - mean(0.5, 0, 0.5)
    "group_standardised": [0.0, 0.5 / math.sqrt(0.5 / 3), -0.5 / math.sqrt(0.5 / 3), 0.0],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_advantages_by_hand(name):
    assert list(ADVANTAGES) == list(BY_HAND)
    assert all_with(name)(REWARDS, chance()).advantages == pytest.approx(BY_HAND[name])


def test_standardised_advantages_of_equal_rewards_are_zero():
    assert ADVANTAGES["group_standardised"]([0.7] * 4) == [0.0] * 4


def test_leave_one_out_does_not_depend_on_the_own_reward():
    """The baseline of a sample, reward less advantage, stays when its own reward changes."""
    for own in (0.0, 5.0):
        rewards = [own, 1.0, 2.0]
        assert rewards[0] - ADVANTAGES["leave_one_out"](rewards)[0] == pytest.approx(1.5)


def own_gradient(policy: ResponseLogps, advantages: torch.Tensor) -> Sampled:
    return Sampled(-advantages * policy.sums)


def test_an_objective_that_names_no_advantage_needs_one_given():
    objective = bind(own_gradient)
    assert grouping_of(objective, None, None, "none")(REWARDS, chance()).advantages == pytest.approx(BY_HAND["none"])
    with pytest.raises(ValueError, match=r"objective=own_gradient names no advantage of its own.*data\.advantage="):
        grouping_of(objective, None, None, None)
