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
from dpo_ref.objectives.coupled import alphadpo, aot, beta_dpo, dr_dpo, gamma_po
from dpo_ref.objectives.interface import BatchLogps, Mismatched, Preference, TokenPairLogps, bind, probe_inputs
from dpo_ref.objectives.pairwise import cdpo, dpo, ipo_sum, ld_dpo, wpo
from dpo_ref.objectives.policy_gradient import rwr
from dpo_ref.objectives.reference_free import cpo, orpo, simpo
from dpo_ref.objectives.scored import odpo, reward_aware, reward_aware_squared
from dpo_ref.objectives.unpaired import bco, kto, sft
from dpo_ref.types import PairLogps, PairScores, ResponseLogps

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
    outcome = beta_dpo(policy, reference, whole, running, beta=0.5, alpha=0.6)
    assert outcome.losses.tolist() == pytest.approx([up(0.8 * 3), up(0.8 * 5)])
    assert outcome.chosen_rewards.tolist() == pytest.approx([1.6, 4])
    objective = bind(beta_dpo, beta=0.5)
    objective.running.update(running)
    objective.step(whole)
    assert float(objective.running["mean_margin"]) == pytest.approx(1.1)
    low = beta_dpo(policy, reference, whole, {"mean_margin": numbers(9)[0]}, beta=0.5, min_beta=0.25)
    assert low.losses.tolist() == pytest.approx([up(0.25 * 3), up(0.25 * 5)])


# log-ratios 2 and -1, then 5 and 0: gaps 3 and 5 nats
TWO = pairs([-3, 0], [-6, -5]), pairs([-5, -5], [-5, -5])
BOTH = BatchLogps(*TWO, None, slice(0, 2))


def part_of(whole, first, last):
    """The policy's and the reference's pairs from `first` to `last`, and the whole batch as they see it."""
    ours = [
        pairs(x.chosen[first:last].tolist(), x.rejected[first:last].tolist()) for x in (whole.policy, whole.reference)
    ]
    return *ours, replace(whole, here=slice(first, last))


def test_dr_dpo_by_hand():
    """At mode_weight 1, p and q the sigmoids of margins 1.5 and 2.5: -log((p + q) / 2), by weights of mean 1."""
    p, q = sigmoid(1.5), sigmoid(2.5)
    weights = [2 * p / (p + q), 2 * q / (p + q)]
    constant = sum(w * math.log(w) for w in weights) / 2
    outcome = dr_dpo(*TWO, BOTH, beta=0.5)
    assert outcome.losses.tolist() == pytest.approx([weights[0] * up(1.5) + constant, weights[1] * up(2.5) + constant])
    assert float(outcome.losses.mean()) == pytest.approx(-math.log((p + q) / 2))
    assert outcome.chosen_rewards.tolist() == [1, 2.5]
    assert dr_dpo(*part_of(BOTH, 1, 2), beta=0.5).losses.tolist() == pytest.approx([weights[1] * up(2.5) + constant])


def test_dr_dpo_is_dpo_at_a_large_mode_weight_and_the_best_pair_at_a_small_one():
    torch.testing.assert_close(dr_dpo(*TWO, BOTH, beta=0.5, mode_weight=1e9).losses, dpo(*TWO, beta=0.5).losses)
    assert dr_dpo(*TWO, BOTH, beta=0.5, mode_weight=1e-4).losses.mean().item() == pytest.approx(up(2.5), abs=1e-4)


def test_gamma_po_by_hand():
    """Of pairs with equal margins every target is gamma: dpo. Of two, the first has the share s = g / (2 gamma), and
    log(s / (1 - s)) is gamma / tau times the difference of the sigmoids of target less margin."""
    same = pairs([-3, -3], [-6, -6]), pairs([-5, -5], [-5, -5])
    equal = gamma_po(*same, BatchLogps(*same, None, slice(0, 2)), beta=0.5, gamma=0.7, tau=0.3)
    torch.testing.assert_close(equal.losses, dpo(*same, beta=0.5).losses)
    outcome = gamma_po(*TWO, BOTH, beta=0.5, gamma=0.7, tau=0.3)
    first, second = (m - math.log(1 / math.expm1(x)) for m, x in zip((1.5, 2.5), outcome.losses.tolist(), strict=True))
    assert first + second == pytest.approx(0)
    assert first < -0.01
    pulls = [sigmoid(0.7 + g - m) for g, m in ((first, 1.5), (second, 2.5))]
    odds = math.log((0.7 + first) / (0.7 + second))
    assert odds == pytest.approx(0.7 / 0.3 * (pulls[1] - pulls[0]), abs=1e-5)
    assert outcome.chosen_rewards.tolist() == [1, 2.5]


@pytest.mark.parametrize(
    ("gamma", "tau", "accuracy"), [(0.5, 1.0, 1e-5), (2.0, 1.0, 1e-4), (0.3, 0.1, 1e-4), (4.0, 10.0, 1e-5)]
)
def test_gamma_po_finds_the_margins_that_minimise_what_they_should(gamma, tau, accuracy):
    """By another way: gradient descent with its own step on the logits of the shares."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = 8 * torch.rand(2, 40, dtype=torch.float64, generator=generator)
    policy, zeros = pairs(chosen.tolist(), rejected.tolist()), pairs([0] * 40, [0] * 40)
    whole = BatchLogps(policy, zeros, None, slice(0, 40))
    margins = chosen - rejected
    logits = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        shares = logits.softmax(0)
        fit = torch.nn.functional.softplus(40 * gamma * shares - margins).mean()
        value = fit + tau * (shares * (40 * shares).log()).sum()
        value.backward()
        return value

    optimizer.step(objective)
    targets = 40 * gamma * logits.detach().softmax(0) - gamma
    expected = torch.nn.functional.softplus(targets - margins)
    assert targets.abs().max() > 0.05 * gamma
    losses = gamma_po(policy, zeros, whole, beta=1.0, gamma=gamma, tau=tau).losses
    torch.testing.assert_close(losses, expected, rtol=accuracy, atol=accuracy)


def test_alphadpo_by_hand():
    """Gaps per token 2/4 + 1/7 and 5/4, the policy's 6/7 - 3/4 and 5/7; usual are 0.25, give or take 2."""
    whole, running = BOTH, {"mean_gap": numbers(0.25)[0], "sd_gap": numbers(2)[0]}
    gaps, margins = (9 / 14, 5 / 4), (3 * (6 / 7 - 3 / 4), 3 * 5 / 7)
    outcome = alphadpo(*TWO, whole, running, beta=3.0, gamma=0.4, alpha=0.5)
    targets = [0.4 + 3 * 0.5 * (gap - 0.25) / 2 for gap in gaps]
    assert outcome.losses.tolist() == pytest.approx([up(m - t) for m, t in zip(margins, targets, strict=True)])
    assert outcome.chosen_rewards.tolist() == pytest.approx([-9 / 4, 0])
    objective = bind(alphadpo)
    objective.step(whole)
    spread = (gaps[1] - gaps[0]) / 2**0.5
    assert float(objective.running["mean_gap"]) == pytest.approx(0.1 * sum(gaps) / 2)
    assert float(objective.running["sd_gap"]) == pytest.approx(0.1 * spread)
    objective.step(whole)
    assert float(objective.running["sd_gap"]) == pytest.approx(0.19 * spread)


def test_alphadpo_is_simpo_where_there_is_no_spread():
    """Policy and reference alike, and batches of one pair, whose statistics keep the deviation at 0."""
    alike = BatchLogps(TWO[0], TWO[0], None, slice(0, 2))
    torch.testing.assert_close(alphadpo(TWO[0], TWO[0], alike, {}).losses, simpo(TWO[0], beta=2.5, gamma=1.5).losses)
    objective, single = bind(alphadpo), part_of(BOTH, 0, 1)
    alone = BatchLogps(*single[:2], None, slice(0, 1))
    objective.step(alone)
    assert float(objective.running["sd_gap"]) == 0
    outcome = alphadpo(*single[:2], alone, objective.running)
    torch.testing.assert_close(outcome.losses, simpo(single[0], beta=2.5, gamma=1.5).losses)


def test_alphadpo_before_the_first_step_knows_its_own_pairs():
    """Two values are one deviation of theirs over root 2 from their mean, on either side."""
    outcome = alphadpo(*TWO, BOTH, {}, beta=3.0, gamma=0.4, alpha=0.5)
    targets = [0.4 - 1.5 / 2**0.5, 0.4 + 1.5 / 2**0.5]
    margins = 3 * (6 / 7 - 3 / 4), 3 * 5 / 7
    assert outcome.losses.tolist() == pytest.approx([up(m - t) for m, t in zip(margins, targets, strict=True)])


def scores(chosen, rejected):
    return PairScores(numbers(*chosen), numbers(*rejected))


def test_odpo_by_hand():
    """Leads 2 and 1/4 at alpha 0.5: offsets 0.5 log 2 and -log 2. A lead of 1 is dpo."""
    outcome = odpo(*TWO, scores([3, 1], [1, 0.75]), beta=0.5, alpha=0.5)
    assert outcome.losses.tolist() == pytest.approx([up(1.5 - math.log(2) / 2), up(2.5 + math.log(2))])
    assert outcome.chosen_rewards.tolist() == [1, 2.5]
    torch.testing.assert_close(odpo(*TWO, scores([3, 1], [2, 0]), beta=0.5).losses, dpo(*TWO, beta=0.5).losses)


@pytest.mark.parametrize("lead", [0.0, -2.0])
def test_odpo_leaves_pairs_out_whose_scores_do_not_lead(lead):
    """Loss and gradient are 0, which those of ever smaller leads tend to."""
    policy = replace(TWO[0], chosen=TWO[0].chosen.clone().requires_grad_())
    losses = odpo(policy, TWO[1], scores([1 + lead, 1], [1, 0]), beta=0.5).losses
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0, up(2.5)])
    assert policy.chosen.grad.tolist() == pytest.approx([0, -0.5 * sigmoid(-2.5)])
    close = [float(odpo(*TWO, scores([lead, 1], [0, 0]), beta=0.5).losses[0]) for lead in (1e-3, 1e-6, 1e-300)]
    assert close[0] > close[1] > close[2] >= 0
    assert close[2] < 1e-200


def test_reward_aware_by_hand():
    """Margin 1.5 against scores 2 and 1 at eta 3: KL of (sigmoid(3), 1 - sigmoid(3)) from (sigmoid(1.5), ...)."""
    q, p = sigmoid(3), sigmoid(1.5)
    outcome = reward_aware(*TWO, scores([2, 2], [1, 1]), beta=0.5, eta=3.0)
    expected = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert float(outcome.losses[0]) == pytest.approx(expected)
    assert outcome.rejected_rewards.tolist() == [-0.5, 0]
    squared = reward_aware_squared(*TWO, scores([2, 2], [1, 1]), beta=0.5, eta=3.0)
    assert squared.losses.tolist() == pytest.approx([1.5**2, 0.5**2])
    assert squared.chosen_rewards.tolist() == [1, 2.5]


def test_reward_aware_is_cdpo_less_the_labels_entropy_and_dpo_where_scores_are_far_apart():
    """Label smoothing 0.2 is a score of log 4; its slope in the margin is sigmoid(margin) less the label."""
    label, entropy = scores([math.log(4)] * 2, [0, 0]), -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    smoothed = cdpo(*TWO, beta=0.5, label_smoothing=0.2).losses
    torch.testing.assert_close(reward_aware(*TWO, label, beta=0.5).losses, smoothed - entropy)
    far = reward_aware(*TWO, scores([90, 90], [0, 0]), beta=0.5, eta=10.0)
    torch.testing.assert_close(far.losses, dpo(*TWO, beta=0.5).losses)
    turned = reward_aware(*TWO, scores([0, 0], [90, 90]), beta=0.5, eta=10.0)
    swapped = [replace(x, chosen=x.rejected, rejected=x.chosen) for x in TWO]
    torch.testing.assert_close(turned.losses, dpo(*swapped, beta=0.5).losses)
    policy = replace(TWO[0], chosen=TWO[0].chosen.clone().requires_grad_())
    reward_aware(policy, TWO[1], label, beta=0.5).losses.sum().backward()
    assert policy.chosen.grad.tolist() == pytest.approx([0.5 * (sigmoid(m) - 0.8) for m in (1.5, 2.5)])


def test_reward_aware_squared_is_ipo_for_a_score_of_one_half():
    squared = reward_aware_squared(*TWO, scores([0.5, 1], [0, 0.5]), beta=0.4)
    torch.testing.assert_close(squared.losses, 0.4**2 * ipo_sum(*TWO, tau=0.4).losses)


REFUSED = [
    (ld_dpo, {"alpha": 1.0}, "alpha=1 is objective=dpo"),
    (wpo, {"beta": 0.0}, "beta=0.0 must be positive"),
    (kto, {"desirable_weight": 0.0}, "desirable_weight=0.0 must be positive"),
    (bco, {"beta": -1.0}, "beta=-1.0 must be positive"),
    (aot, {"beta": math.nan}, "beta=nan must be positive"),
    (beta_dpo, {"alpha": 0.0}, "alpha=0.0 must be positive"),
    (beta_dpo, {"momentum": 1.0}, "momentum=1.0 must lie strictly between 0 and 1"),
    (dr_dpo, {"mode_weight": 0.0}, "mode_weight=0.0 must be positive"),
    (gamma_po, {"gamma": 0.0}, "gamma=0.0 must be positive"),
    (gamma_po, {"gamma": 4.0, "tau": 2.0}, "gamma=4.0 is too large for tau=2.0: the steps"),
    (alphadpo, {"alpha": 0.0}, "alpha=0.0 must be positive and finite; alpha=0 is objective=simpo"),
    (alphadpo, {"gamma": -1.0}, "gamma=-1.0 must be at least 0"),
    (alphadpo, {"momentum": 1.0}, "momentum=1.0 must lie strictly between 0 and 1"),
    (odpo, {"alpha": 0.0}, "alpha=0.0 must be positive and finite; alpha=0 is objective=dpo"),
    (reward_aware, {"eta": 0.0}, "eta=0.0 must be positive"),
    (reward_aware_squared, {"beta": 0.0}, "beta=0.0 must be positive"),
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
    assert type(mixed) is type(plain)
    assert torch.equal(mixed.chosen_rewards, plain.chosen_rewards)


NEEDED = {"labels": kto, "mismatched": kto, "whole": aot, "collision": wpo, "advantages": rwr, "rewards": odpo}


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_not_there_is_named(name):
    policy, inputs = probe_inputs(kind=bind(NEEDED[name]).inputs["policy"])
    of_rows = ("labels", "advantages", "rewards")
    batch = replace(inputs.batch, **{name: None}) if name in of_rows else inputs.batch
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
    within = [ld_dpo, wpo, aot, beta_dpo, dr_dpo, gamma_po, odpo, reward_aware, reward_aware_squared]
    assert [f.__name__ for f in within if not bind(f).constants_cancel] == []
    assert [f.__name__ for f in (kto, bco, alphadpo) if bind(f).constants_cancel] == []


def test_an_argument_that_nothing_makes_is_refused():
    def strange(policy: PairLogps, weather: float) -> Preference:
        raise AssertionError

    with pytest.raises(TypeError, match="weather"):
        bind(strange)
