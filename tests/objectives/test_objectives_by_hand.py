"""Losses and rewards of every pairwise objective on one pair, derived by hand.

Log-ratios 2 and -1 against the reference; log pi -3 and -6; 4 and 7 tokens, 13 and 22 bytes.
"""

import math

import pytest
import torch

from dpo_ref.cli import schemas
from dpo_ref.objectives import pairwise, reference_free
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.pairwise import dpo_per_byte, dpo_positive, wpo
from dpo_ref.types import PairLogps

E = math.e


def pair(chosen, rejected):
    sums = (torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected))
    return PairLogps(*sums, *(torch.tensor([size]) for size in (4, 7, 13, 22)))


def up(x):
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


ODDS = [math.exp(-a) / (1 - math.exp(-a)) for a in (3 / 4, 6 / 7)]
Q = sigmoid(1.5)
BY_HAND = {  # options; loss; rewards
    pairwise.dpo: ({"beta": 0.5}, up(1.5), 1, -0.5),
    pairwise.cdpo: ({"beta": 0.5, "label_smoothing": 0.2}, 0.8 * up(1.5) + 0.2 * up(-1.5), 1, -0.5),
    pairwise.robust_dpo: ({"beta": 0.5, "label_smoothing": 0.2}, (0.8 * up(1.5) - 0.2 * up(-1.5)) / 0.6, 1, -0.5),
    pairwise.hypo: ({"beta": 0.5, "threshold": 0.0}, up(1.5), 1, -0.5),
    pairwise.hinge: ({"beta": 0.2}, 1 - 0.6, 0.4, -0.2),
    pairwise.exo: (
        {"beta": 0.5, "label_smoothing": 0.2},
        Q * math.log(Q / 0.8) + (1 - Q) * math.log((1 - Q) / 0.2),
        1,
        -0.5,
    ),
    pairwise.discopop: (
        {"beta": 0.1, "tau": 0.3},
        up(0.3) * (1 - sigmoid(1)) + math.exp(-0.3) * sigmoid(1),
        0.2,
        -0.1,
    ),
    pairwise.ipo_sum: ({"tau": 0.5}, (3 - 1) ** 2, 1, -0.5),
    pairwise.ipo_mean: ({"tau": 1.0}, (2 / 4 + 1 / 7 - 1 / 2) ** 2, 2 / 4, -1 / 7),
    pairwise.sppo: ({"beta": 0.5}, (2 - 1) ** 2 + (-1 + 1) ** 2, 1, -0.5),
    pairwise.cal_dpo: (
        {"beta": 0.25, "calibration_weight": 0.3},
        up(3) + 0.3 * ((2 - 2) ** 2 + (-1 + 2) ** 2),
        0.5,
        -0.25,
    ),
    pairwise.dpo_norm: ({"beta": 2.8}, up(1.4 + 0.4), 1.4, -0.4),
    pairwise.dpo_per_byte: ({"beta": 28.6}, up(4.4 + 1.3), 4.4, -1.3),
    pairwise.r_dpo: ({"beta": 0.5, "alpha": 0.25}, up(1 + 1 - (-0.5 + 1.75)), 2, 1.25),
    pairwise.forward_kl_dpo: ({"beta": 0.5}, up(0.5 * (E - E**-2)), 0.5 * (1 - E**-2), 0.5 * (1 - E)),
    pairwise.js_dpo: (
        {"beta": 0.5},
        up(0.5 * math.log((1 + E) / (1 + E**-2))),
        0.5 * math.log(2 * E**2 / (1 + E**2)),
        0.5 * math.log(2 / E / (1 + 1 / E)),
    ),
    pairwise.alpha_divergence_dpo: ({"beta": 0.5, "alpha": 0.5}, up(E**0.5 - 1 / E), 1 - 1 / E, 1 - E**0.5),
    pairwise.chi_po: ({"beta": 0.5}, up(0.5 * (E**2 + 2 - 1 / E + 1)), 0.5 * (E**2 + 1), 0.5 * (1 / E - 2)),
    pairwise.dpo_shift: ({"beta": 0.5, "shift": 0.4}, up(1 + 0.4 * 0.5), 1, -0.2),
    pairwise.dpo_positive: ({"beta": 0.5, "penalty": 2.0}, up(1.5), 1, -0.5),
    pairwise.nca: ({"beta": 0.5}, up(1) + up(-1) / 2 + up(0.5) / 2, 1, -0.5),
    pairwise.apo_zero: ({"beta": 0.5}, sigmoid(-1) + sigmoid(-0.5), 1, -0.5),
    pairwise.apo_down: ({"beta": 0.5}, sigmoid(1) + sigmoid(-1.5), 1, -0.5),
    reference_free.simpo: ({"beta": 28.0, "gamma": 1.0}, up(3 - 1), -21, -24),
    reference_free.simper: ({}, math.exp(-6 / 7) - math.exp(-3 / 4), math.exp(-3 / 4), math.exp(-6 / 7)),
    reference_free.cpo: ({"beta": 0.5, "alpha": 2.0}, up(1.5) + 2 * 3 / 4, -1.5, -3),
    reference_free.orpo: (
        {"weight": 0.3},
        3 / 4 + 0.3 * math.log(1 + ODDS[1] / ODDS[0]),
        math.log(ODDS[0]),
        math.log(ODDS[1]),
    ),
    reference_free.unlikelihood: ({"alpha": 0.25}, 3 - 0.25 * 6, -3, -6),
}


@pytest.mark.parametrize("function", BY_HAND, ids=lambda f: f.__name__)
def test_by_hand(function):
    options, loss, chosen, rejected = BY_HAND[function]
    models = [pair(-3.0, -6.0)] + ([pair(-5.0, -5.0)] if bind(function).uses_reference else [])
    values = [float(x) for x in function(*models, **options)]
    assert values == pytest.approx([loss, chosen, rejected], abs=1e-12)


def test_every_pairwise_objective_on_sums_alone_is_here():
    """The others are in test_objectives_beyond_pairs.py."""
    every = {schemas.locate(target) for target in schemas.groups()["objective"].values()}
    sums_alone = {f for f in every if bind(f).pairwise and set(bind(f).inputs.values()) == {PairLogps}}
    assert sums_alone - {wpo} == set(BY_HAND)


def test_hypo_leaves_the_reference_out_where_it_prefers_the_rejected_response():
    """D is 3 and D_ref -2 in the first pair: the margin is 0.5 * 3, where dpo's is 0.5 * 5; D_ref 1 in the second."""
    models = [pair(-3.0, -6.0), pair(-5.0, -3.0)], [pair(-3.0, -6.0), pair(-5.0, -6.0)]
    losses = [float(pairwise.hypo(*both, beta=0.5).losses) for both in models]
    assert losses == pytest.approx([up(1.5), up(1.0)])
    assert float(pairwise.hypo(*models[1], beta=0.5, threshold=2.0).losses) == pytest.approx(up(0.5))


def test_dpo_positive_charges_what_the_chosen_response_loses():
    """Log-ratios -1 and 1, penalty 2, beta 0.5: rewards 0.5 (-1 - 2) and 0.5, so the margin is -2 (dpo: -1)."""
    outcome = dpo_positive(pair(-6.0, -4.0), pair(-5.0, -5.0), beta=0.5, penalty=2.0)
    assert [float(x) for x in outcome] == pytest.approx([math.log1p(E**2), -1.5, 0.5])


def test_chi_po_clips_the_ratio_and_not_its_logarithm():
    """Log-ratios 25 and 0: exp(20) + 25 - 1, whose slope is the logarithm's alone."""
    policy = pair(20.0, -5.0)
    policy.chosen.requires_grad_()
    outcome = pairwise.chi_po(policy, pair(-5.0, -5.0), beta=1e-9)
    assert outcome.chosen_rewards.item() == pytest.approx(1e-9 * (math.exp(20) + 24))
    outcome.losses.sum().backward()
    assert policy.chosen.grad.item() == pytest.approx(-1e-9 * sigmoid(-1e-9 * (math.exp(20) + 24)))


def test_discopop_starts_downhill_in_the_wrong_direction():
    """Slope at margin 0: -1/2 of each loss at weight 1/2, and the weight's 1 / (4 tau) times 1 - log 2."""
    policy = pair(-5.0, -5.0)
    policy.chosen.requires_grad_()
    pairwise.discopop(policy, pair(-5.0, -5.0), beta=1.0, tau=0.05).losses.sum().backward()
    assert policy.chosen.grad.item() == pytest.approx(-1 / 4 - 1 / 2 + (1 - math.log(2)) / 0.2)


def test_a_response_without_text_counts_as_one_byte():
    """Only its end of turn is scored; 2 nats over one byte, not over none."""
    policy, reference = (
        PairLogps(
            torch.tensor([x]), torch.tensor([0.0]), *[torch.tensor([1])] * 2, torch.tensor([0]), torch.tensor([5])
        )
        for x in (-1.0, -3.0)
    )
    assert dpo_per_byte(policy, reference, beta=2.0).chosen_rewards.item() == 4
