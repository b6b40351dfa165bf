"""Objectives that need more than the sums of a pair, by hand; what they refuse; the likelihood term of the others."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_ref.cli import schemas
from dpo_ref.models.logps import Head, token_collisions
from dpo_ref.objectives import interface
from dpo_ref.objectives.coupled import aot, beta_dpo
from dpo_ref.objectives.interface import BatchLogps, Mismatched, Preference, TokenPairLogps, bind, probe_inputs
from dpo_ref.objectives.pairwise import dpo, ld_dpo, wpo
from dpo_ref.objectives.policy_gradient import rwr
from dpo_ref.objectives.reference_free import cpo, orpo, simpo
from dpo_ref.objectives.unpaired import bco, kto, sft
from dpo_ref.types import PairLogps, ResponseLogps

EVERY = {path.stem: schemas.locate(target) for path, target in schemas.groups()["objective"].items()}


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def up(x):
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pairs(chosen, rejected, lengths=(4, 7)):
    sizes = [torch.full((len(chosen),), size) for size in (*lengths, 13, 22)]
    return PairLogps(numbers(*chosen), numbers(*rejected), *sizes)


def responses(*sums):
    ones = torch.ones(len(sums), dtype=torch.long)
    return ResponseLogps(numbers(*sums), ones, ones, None)


def token_pair(chosen, rejected):
    """One pair by its token log-probs; the rejected response is stored first."""
    tokens, sizes = numbers(*rejected, *chosen), [torch.tensor([len(x)]) for x in (chosen, rejected)]
    starts = torch.tensor([len(rejected)]), torch.tensor([0])
    return TokenPairLogps(numbers(sum(chosen)), numbers(sum(rejected)), *sizes, *sizes, tokens, *starts)


def test_ld_dpo_by_hand():
    """Log-ratios of tokens 1, 2 | 4, 8 and -1, -3; the longer response's tail counts a quarter: 3 + 3 and -4."""
    policy, reference = token_pair([-1, -2, -3, -4], [-5, -6]), token_pair([-2, -4, -7, -12], [-4, -3])
    outcome = ld_dpo(policy, reference, beta=0.5, alpha=0.25)
    assert [float(x) for x in outcome] == pytest.approx([up(3 + 2), 3, -2])


@given(st.integers(0, 3), st.integers(0, 2))
def test_first_tokens_of_a_response(first, second):
    pair = token_pair([-1, -2, -4, -8], [-16, -32])
    chosen, rejected = pair.first(torch.tensor([first])), pair.first(torch.tensor([second]))
    assert float(chosen[0]) == sum([-1, -2, -4, -8][:first])
    assert float(rejected[1]) == sum([-16, -32][:second])


def test_wpo_by_hand():
    """Tokens as likely as two draws agree weigh 1; e^(1/4) and e^(-2/7) times that here. Margin 1.5."""
    outcome = wpo(pairs([-3], [-6]), pairs([-5], [-5]), pairs([-4], [-4]), beta=0.5)
    assert [float(x) for x in outcome] == pytest.approx([math.exp(1 / 4 - 2 / 7) * up(1.5), 1, -0.5])


def test_collisions_are_sums_of_squares():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (6, 11))
    collisions = token_collisions(hidden, Head(weight, scale=2.0, softcap=3.0))
    shares = (3 * torch.tanh(2 * hidden @ weight.T / 3)).softmax(-1)
    torch.testing.assert_close(collisions, shares.square().sum(-1).log())


@pytest.mark.parametrize(("gaps", "kl"), [((1.0, 3.0), 2.0), ((-1.0, -3.0), 0.0)])
def test_kto_by_hand(gaps, kl):
    """Log-ratios 2 (wanted) and -1 (not) at beta 0.5, rewards 1 and -0.5; a negative KL counts as none."""
    labels, mismatched = torch.tensor([True, False]), Mismatched(numbers(*gaps), numbers(0, 0))
    options = {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    outcome = kto(responses(-3, -6), responses(-5, -5), labels, mismatched, **options)
    assert outcome.losses.tolist() == pytest.approx([2 * sigmoid(0.5 * kl - 1), 3 * sigmoid(-0.5 - 0.5 * kl)])
    assert outcome.rewards.tolist() == [1, -0.5]


@pytest.mark.parametrize(
    ("labels", "shift"), [((True, True, False), (1 + 3) / 2 / 2 - 0.5 / 2), ((True, True, True), 3.5 / 3)]
)
def test_bco_by_hand(labels, shift):
    """Rewards 1, 3, -0.5: the two classes count alike, however many are of each; of one class alone its mean."""
    policy, reference, label_tensor = responses(-3, 1, -6), responses(-5, -5, -5), torch.tensor(labels)
    outcome = bco(policy, reference, label_tensor, BatchLogps(policy, reference, label_tensor, slice(0, 3)), beta=0.5)
    expected = [up(r - shift) if wanted else up(shift - r) for r, wanted in zip((1, 3, -0.5), labels, strict=True)]
    assert outcome.losses.tolist() == pytest.approx(expected)
    assert outcome.rewards.tolist() == [1, 3, -0.5]


def test_aot_by_hand():
    """Policy margins 3, -1, 7 rank 1, 0, 2; reference margins 0, 2, 1 sorted are 0, 1, 2."""
    policy, reference = pairs([-3, -6, 2], [-6, -5, -5]), pairs([-5, -4, -5], [-5, -6, -6])
    whole = BatchLogps(policy, reference, None, slice(0, 3))
    outcome = aot(policy, reference, whole, beta=0.5)
    assert outcome.losses.tolist() == pytest.approx([up((3 - 1) / 2), up((-1 - 0) / 2), up((7 - 2) / 2)])
    assert outcome.chosen_rewards.tolist() == [1, -1, 3.5]
    last = replace(whole, here=slice(2, 3))
    assert aot(pairs([2], [-5]), pairs([-5], [-6]), last, beta=0.5).losses.tolist() == pytest.approx([up(2.5)])


def test_beta_dpo_by_hand():
    """Margins 3 and 5 nats, at beta 0.5 a mean of 2; usual is 1: b = 0.5 (1 + 0.6). Then 0.9 + 0.2 is usual."""
    policy, reference = pairs([-3, 0], [-6, -5]), pairs([-5, -5], [-5, -5])
    whole, running = BatchLogps(policy, reference, None, slice(0, 2)), {"mean_margin": numbers(1)[0]}
    outcome = beta_dpo(policy, reference, whole, running, beta=0.5)
    assert outcome.losses.tolist() == pytest.approx([up(0.8 * 3), up(0.8 * 5)])
    assert outcome.chosen_rewards.tolist() == pytest.approx([1.6, 4])
    objective = bind(beta_dpo, beta=0.5)
    objective.running.update(running)
    objective.step(whole)
    assert float(objective.running["mean_margin"]) == pytest.approx(1.1)
    low = beta_dpo(policy, reference, whole, {"mean_margin": numbers(9)[0]}, beta=0.5, min_beta=0.25)
    assert low.losses.tolist() == pytest.approx([up(0.25 * 3), up(0.25 * 5)])


REFUSED = [
    (ld_dpo, {"alpha": 1.0}, "alpha=1 is objective=dpo"),
    (wpo, {"beta": 0.0}, "beta=0.0 must be positive"),
    (kto, {"desirable_weight": 0.0}, "desirable_weight=0.0 must be positive"),
    (bco, {"beta": -1.0}, "beta=-1.0 must be positive"),
    (aot, {"beta": math.nan}, "beta=nan must be positive"),
    (beta_dpo, {"alpha": 0.0}, "alpha=0.0 must be positive"),
    (beta_dpo, {"momentum": 1.0}, "momentum=1.0 must lie strictly between 0 and 1"),
    (dpo, {"nll_weight": -1.0}, "objective.nll_weight=-1.0 must be at least 0"),
    *[(f, {"nll_weight": 1.0}, "it has no chosen responses") for f in (sft, kto, bco, rwr)],
    *[(f, {"nll_weight": 1.0}, f"objective={f.__name__} fits the chosen response itself") for f in (cpo, orpo)],
]


@pytest.mark.parametrize(("function", "options", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_refusals(function, options, message):
    with pytest.raises(ValueError) as error:
        bind(function, **options).check()
    assert message in str(error.value)


TAKE_THE_TERM = [
    n for n, f in EVERY.items() if issubclass(bind(f).inputs["policy"], PairLogps) and not bind(f).hooks.fits_chosen
]


@pytest.mark.parametrize("name", TAKE_THE_TERM)
def test_the_likelihood_term_is_added_to_every_pair(name):
    """0.3 times the chosen response's mean negative token log-prob; rewards stay."""
    policy, inputs = probe_inputs()
    plain, mixed = (bind(EVERY[name], nll_weight=weight)(policy, replace(inputs, running={})) for weight in (0.0, 0.3))
    chosen = inputs.batch.chosen
    torch.testing.assert_close(mixed.losses - plain.losses, -0.3 * policy.sums[chosen] / policy.lengths[chosen])
    assert isinstance(mixed, Preference)
    assert torch.equal(mixed.chosen_rewards, plain.chosen_rewards)


NEEDED = {"labels": kto, "mismatched": kto, "whole": aot, "collision": wpo, "advantages": rwr}


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_not_there_is_named(name):
    policy, inputs = probe_inputs(kind=bind(NEEDED[name]).inputs["policy"])
    batch = replace(inputs.batch, **{name: None}) if name in ("labels", "advantages") else inputs.batch
    lacking = replace(inputs, batch=batch, **({} if batch is not inputs.batch else {name: None}))
    with pytest.raises(ValueError, match="the objective needs ") as error:
        bind(NEEDED[name])(policy, lacking)
    assert interface.ARGUMENTS[name].remedy in str(error.value)


def test_a_reference_without_tokens_says_so():
    policy, inputs = probe_inputs()
    with pytest.raises(ValueError, match="this reference has no per-token log-probs"):
        bind(ld_dpo)(policy, replace(inputs, reference=replace(inputs.reference, token_logps=None)))
    assert [bind(f).needs_tokens for f in (ld_dpo, wpo, dpo, kto, simpo)] == [True, False, False, False, False]


def test_constants_of_the_prompt_cancel_within_pairs_only():
    cancels = {f.__name__: bind(f).constants_cancel for f in (ld_dpo, wpo, aot, beta_dpo, kto, bco)}
    assert cancels == {"ld_dpo": True, "wpo": True, "aot": True, "beta_dpo": True, "kto": False, "bco": False}


def test_an_argument_that_nothing_makes_is_refused():
    def strange(policy: PairLogps, weather: float) -> Preference:
        raise AssertionError

    with pytest.raises(TypeError, match="weather"):
        bind(strange)
