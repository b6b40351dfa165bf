"""Policy-gradient objectives: by hand, against brute-force autograd, and exact on a policy that can be enumerated."""

import math
from itertools import product

import pytest
import torch

from dpo_ref.objectives.interface import TokenLogps, bind
from dpo_ref.objectives.policy_gradient import grpo, ppo_clip, reinforce, rwr

LENGTHS = torch.tensor([2, 1, 3])
OWNERS = torch.tensor([0, 0, 1, 2, 2, 2])
ADVANTAGES = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)


def responses(tokens, owners=OWNERS, lengths=LENGTHS):
    sums = torch.zeros(len(lengths), dtype=torch.float64).index_add(0, owners, tokens.double())
    return TokenLogps(sums, lengths, lengths, tokens, response_index=owners)


def drawn(seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return -1 - spread * torch.rand(len(OWNERS), generator=generator)


def test_rwr_by_hand():
    """Weights exp(A / 0.5) = e^2, e^-1, e^0.5; bounded at 2 the first is 2."""
    policy = responses(torch.tensor([-1.0, -1.0, -3.0, -0.5, -0.5, -1.0]))
    losses = rwr(policy, ADVANTAGES, beta=0.5).losses
    assert losses.tolist() == pytest.approx([2 * math.e**2, 3 / math.e, 2 * math.exp(0.5)])
    assert rwr(policy, ADVANTAGES, beta=0.5, max_weight=2.0).losses[0] == pytest.approx(4.0)


def test_reinforce_by_hand():
    """A - 0.1 (log pi - log ref): 1 - 0.1 = 0.9, -0.5 + 0.2 = -0.3, 0.25; each times -log pi."""
    policy = responses(torch.tensor([-1.0, -1.0, -3.0, -0.5, -0.5, -1.0]))
    reference = responses(torch.tensor([-1.5, -1.5, -1.0, -0.5, -0.5, -1.0]))
    losses = reinforce(policy, reference, ADVANTAGES, beta=0.1).losses
    assert losses.tolist() == pytest.approx([1.8, -0.9, 0.5])


def test_ppo_clip_by_hand():
    """Ratios 2 and 0.5 at A = 1: min(2, 1.2) + min(0.5, 0.8); at A = -1: -max(2, 1.2) - max(0.5, 0.8)."""
    owners, lengths = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2])
    old = responses(torch.full((4,), -2.0), owners, lengths)
    policy = responses(torch.tensor([2.0, 0.5, 2.0, 0.5]).log() - 2, owners, lengths)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    losses = ppo_clip(policy, old, old, advantages, beta=0.1, epsilon=0.2).losses
    assert losses.tolist() == pytest.approx([-1.7, 2.8])


def test_ppo_puts_the_kl_in_the_reward():
    """log pi_old - log ref = 1 nat a token: A' = 1 - 0.1 * 2 and loss -2 A' at ratio 1."""
    owners, lengths = torch.tensor([0, 0]), torch.tensor([2])
    old, reference = (responses(torch.full((2,), value), owners, lengths) for value in (-2.0, -3.0))
    losses = ppo_clip(old, old, reference, torch.tensor([1.0], dtype=torch.float64), beta=0.1).losses
    assert losses.tolist() == pytest.approx([-1.6])


def test_grpo_by_hand():
    """Ratio 1, log(ref / pi) = ln 2: k3 = 2 - ln 2 - 1; loss -(A - 0.04 k3), a mean over tokens."""
    policy, old = responses(torch.full((6,), -2.0)), responses(torch.full((6,), -2.0))
    reference = responses(torch.full((6,), -2.0 + math.log(2)))
    losses = grpo(policy, old, reference, ADVANTAGES, beta=0.04).losses
    k3 = 1 - math.log(2)
    assert losses.tolist() == pytest.approx([-(a - 0.04 * k3) for a in ADVANTAGES.tolist()], abs=1e-6)


def brute(name, policy, old, reference, beta, epsilon=0.2):
    """Sum of losses with loops over single tokens, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for n, advantage in enumerate(ADVANTAGES.tolist()):
        tokens = [t for t, owner in enumerate(OWNERS.tolist()) if owner == n]
        drift = sum(float(old[t] - reference[t]) for t in tokens)
        for t in tokens:
            ratio = (policy[t] - old[t]).exp()
            worth = advantage - beta * drift if name == "ppo_clip" else advantage
            gain = torch.minimum(ratio * worth, ratio.clamp(1 - epsilon, 1 + epsilon) * worth)
            if name == "grpo":
                gap = reference[t] - policy[t]
                gain = (gain - beta * (gap.exp() - gap - 1)) / len(tokens)
            total = total - gain
    return total


@pytest.mark.parametrize("objective", [ppo_clip, grpo])
def test_value_and_gradient_equal_brute_force(objective):
    old, reference = drawn(1).double(), drawn(2).double()
    ours, theirs = (drawn(3).double().requires_grad_() for _ in range(2))
    loss = objective(responses(ours), responses(old), responses(reference), ADVANTAGES, beta=0.3).losses.sum()
    expected = brute(objective.__name__, theirs, old, reference, beta=0.3)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=0)
    assert ours.grad.count_nonzero() < len(OWNERS) or objective is grpo  # some tokens are clipped


def test_ppo_at_ratio_1_has_reinforces_gradient():
    old, reference = drawn(1).double(), drawn(2).double()
    gradients = []
    for loss in (
        lambda policy: ppo_clip(policy, responses(old), responses(reference), ADVANTAGES, beta=0.3),
        lambda policy: reinforce(policy, responses(reference), ADVANTAGES, beta=0.3),
    ):
        leaf = old.clone().requires_grad_()
        loss(responses(leaf)).losses.sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("objective", [rwr, reinforce, ppo_clip, grpo])
def test_extremes_are_finite_in_float32(objective):
    for distance in (1e4, -1e4):
        leaf = torch.full((6,), -1e4, requires_grad=True)
        models = {"old": responses(leaf.detach() + distance), "reference": responses(leaf.detach() - distance)}
        takes = bind(objective).inputs
        arguments = {name: model for name, model in models.items() if name in takes}
        losses = objective(responses(leaf), advantages=1e3 * ADVANTAGES, **arguments).losses
        losses.sum().backward()
        assert losses.isfinite().all()
        assert leaf.grad.isfinite().all()


# A policy over a vocabulary of 3, token 0 ends: at most 2 tokens before a forced stop, 7 responses in all.

VOCABULARY, DEPTH = 3, 2


def every_response():
    sequences = [(0,)]
    sequences += [(first, second) for first, second in product((1, 2), range(VOCABULARY))]
    return sequences


RESPONSES = every_response()
STATES = {prefix: index for index, prefix in enumerate([(), (1,), (2,)])}


def token_logps(weights):
    """Log-probs of every response's tokens, one after the other, from a table of logits by prefix."""
    table = weights.log_softmax(dim=-1)
    return torch.stack([table[STATES[y[:t]], y[t]] for y in RESPONSES for t in range(len(y))])


def everything(tokens):
    lengths = torch.tensor([len(y) for y in RESPONSES])
    return responses(tokens, torch.arange(len(RESPONSES)).repeat_interleave(lengths), lengths)


def toy(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(STATES), VOCABULARY, generator=generator, dtype=torch.float64)


REWARD = torch.tensor([0.1, 0.9, 0.3, 0.0, 1.0, 0.2, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("objective", [reinforce, ppo_clip])
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_expected_gradient_is_the_exact_policy_gradient(objective, baseline):
    """E_pi[gradient of the loss], by enumeration, equals that of -(E[r] - beta KL(pi || pi_ref)), whatever the
    baseline."""
    beta, reference = 0.2, everything(token_logps(toy(1)))
    leaf = toy(0).requires_grad_()
    policy = everything(token_logps(leaf))
    models = {"policy": policy, "reference": reference}
    if objective is ppo_clip:
        models["old"] = everything(token_logps(toy(0)))
    losses = objective(**models, advantages=REWARD - baseline, beta=beta).losses
    probabilities = policy.sums.detach().exp()
    assert probabilities.sum().item() == pytest.approx(1)
    (estimated,) = torch.autograd.grad((probabilities * losses).sum(), leaf, retain_graph=True)
    sums = policy.sums
    exact = -(sums.exp() * (REWARD - beta * (sums - reference.sums))).sum()
    (expected,) = torch.autograd.grad(exact, leaf)
    assert expected.norm() > 0.01
    torch.testing.assert_close(estimated, expected, atol=1e-12, rtol=0)


def test_grpos_kl_term_is_the_kl_in_expectation():
    """With a single token per response, E_pi[k3] = KL(pi || pi_ref)."""
    lengths = torch.ones(VOCABULARY, dtype=torch.long)
    ours, theirs = (toy(seed)[0].log_softmax(0) for seed in (0, 1))
    models = [responses(values, torch.arange(VOCABULARY), lengths) for values in (ours, ours, theirs)]
    losses = grpo(*models, torch.zeros(VOCABULARY, dtype=torch.float64), beta=1.0).losses
    assert (ours.exp() * losses).sum().item() == pytest.approx((ours.exp() * (ours - theirs)).sum().item())


def test_rwr_converges_to_the_exponentially_weighted_policy():
    """On samples of mu its minimiser is mu exp(r / beta) / Z, the optimum of E[r] - beta KL(. || mu)."""
    start, beta = everything(token_logps(toy(1))).sums, 0.5
    target = (start + REWARD / beta).softmax(0)
    leaf = toy(0).requires_grad_()
    optimiser = torch.optim.LBFGS([leaf], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimiser.zero_grad()
        loss = (start.exp() * rwr(everything(token_logps(leaf)), REWARD, beta=beta).losses).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    logps = everything(token_logps(leaf)).sums
    assert (target * (target.log() - logps)).sum().item() < 1e-8


@pytest.mark.parametrize("objective", [rwr, reinforce, ppo_clip, grpo])
def test_bad_options_are_refused(objective):
    with pytest.raises(ValueError, match=r"beta=-1\.0 must be positive"):
        bind(objective, beta=-1.0).check()
