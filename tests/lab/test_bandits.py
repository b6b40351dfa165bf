"""The bandits against closed forms, brute force and full logits."""

import itertools
import math

import pytest
import torch

from dpo_ref.data.packing import collate
from dpo_ref.lab.bandits.study import Method, Problem, StudyOptions, one_run
from dpo_ref.lab.bandits.worlds import (
    Arms,
    Categorical,
    Draws,
    TokenWorld,
    bump,
    divergence,
    frontier,
    optimum,
    rated_groups,
    tanh_cauchy,
    utilities,
)
from dpo_ref.models.logps import response_logps
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.objectives.policy_gradient import reinforce
from dpo_ref.objectives.unpaired import sft
from dpo_ref.types import PairLogps

REFERENCE = tanh_cauchy()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def small_tokens():
    """Three tokens of three, so that all 27 responses can be written down; weights large enough to matter."""
    world = TokenWorld(width=1.0, length=3, fit_steps=1, num_tokens=3)
    policy, reference = world.initial(0), world.initial(1)
    for model in (policy, reference):
        for parameter in model.parameters():
            parameter.data.mul_(3)
    return world, policy.eval(), reference.eval()


def test_the_histogram_is_the_integral_of_the_density():
    """The density of tanh(X) at x is p(artanh x) / (1 - x^2), integrated numerically over a few bins."""

    def density(x):
        return 1 / (math.pi * 0.4 * (1 + ((math.atanh(x) + 0.7) / 0.4) ** 2)) / (1 - x * x)

    for arm in (3, 20, 50, 70, 96):
        cells = 2000
        low, step = -1 + 0.02 * arm, 0.02 / cells
        integral = sum(density(low + (cell + 0.5) * step) for cell in range(cells)) * step
        assert float(REFERENCE[arm]) == pytest.approx(integral, rel=1e-6)
    assert float(REFERENCE.sum()) == pytest.approx(1, abs=1e-12)


def test_the_histogram_is_that_of_draws():
    """0.078, 0.024 and 0.0021 of 10,000 draws, as in the authors' code, up to what chance allows."""
    uniform = torch.rand(1_000_000, generator=generator(), dtype=torch.float64)
    draws = torch.tanh(-0.7 + 0.4 * torch.tan(math.pi * (uniform - 0.5)))
    counts = torch.histc(draws, bins=100, min=-1, max=1) / len(draws)
    error = (REFERENCE / len(draws)).sqrt()
    assert ((counts - REFERENCE).abs() < 5 * error).all()


def test_reward_and_divergence_by_hand():
    rewards = bump(70, 10.0)
    assert rewards[70] == 1
    assert float(rewards[80]) == pytest.approx(math.exp(-1))
    policy, reference = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    assert float(divergence(policy, reference)) == pytest.approx(0.5 * math.log(2))


@pytest.mark.parametrize("peak", [20, 70])
def test_no_policy_beats_the_optimum(peak):
    """strength E[r] - KL is largest there: no change of logits, small or large, gains; its value is log Z."""
    rewards, strength = bump(peak, 10.0), 10.0

    def value(policy):
        return float(strength * (policy @ rewards) - divergence(policy, REFERENCE))

    best = optimum(REFERENCE, rewards, strength)
    assert value(best) == pytest.approx(float((REFERENCE * (strength * rewards).exp()).sum().log()))
    for seed in range(50):
        noise = torch.randn(100, generator=generator(seed), dtype=torch.float64) * 10 ** (seed % 5 - 3)
        assert value((best.log() + noise).softmax(0)) < value(best)


def test_the_optimum_of_sequences_is_that_of_their_tokens():
    """All 27 responses of three independent tokens, tilted by the mean of their rewards."""
    reference, rewards = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.0, 0.4, 1.0]).double()
    token = optimum(reference, rewards, 5.0, length=3)
    weights = {
        y: math.prod(float(reference[v]) for v in y) * math.exp(5.0 * sum(float(rewards[v]) for v in y) / 3)
        for y in itertools.product(range(3), repeat=3)
    }
    total = sum(weights.values())
    for y, weight in weights.items():
        assert math.prod(float(token[v]) for v in y) == pytest.approx(weight / total)


def test_the_frontier_starts_at_the_reference_and_bounds_best_of_n():
    """Best-of-n of the reference: its distribution and KL by enumeration of the order statistics."""
    rewards = bump(70, 10.0)
    kl, reward = frontier(REFERENCE, rewards)
    assert float(kl[0]) == pytest.approx(0, abs=1e-12)
    assert float(reward[0]) == pytest.approx(float(REFERENCE @ rewards))
    order = rewards.argsort()
    for n in (2, 10, 100):
        best = torch.zeros(100, dtype=torch.float64)
        cumulative = REFERENCE[order].cumsum(0)
        best[order] = (cumulative**n).diff(prepend=torch.zeros(1))
        distance = float(divergence(best, REFERENCE))
        reachable = reward[kl <= distance + 1e-9].max()
        assert float(best @ rewards) <= float(reward[(kl >= distance).int().argmax()]) + 1e-9
        assert float(reachable) > float(best @ rewards) - 0.25


def test_measuring_arms_is_enumeration():
    world, rewards = Arms(10.0), bump(70, 10.0)
    policy = Categorical(torch.randn(100, generator=generator(), dtype=torch.float64))
    measurement = world.measure(policy, world.initial(0), rewards, generator())
    chances = policy.probabilities()
    assert measurement.reward == pytest.approx(sum(float(p * r) for p, r in zip(chances, rewards, strict=True)))
    assert measurement.kl == pytest.approx(
        sum(float(p) * math.log(p / q) for p, q in zip(chances, REFERENCE, strict=True)), rel=1e-9
    )


def test_log_probs_of_arms_are_log_probabilities():
    policy = Categorical(torch.randn(100, generator=generator(), dtype=torch.float64))
    draws = Draws(torch.tensor([5, 6]), torch.tensor([[[3], [99]], [[0], [3]]]), torch.zeros(2, 2))
    batch = collate(rated_groups(draws, torch.zeros(2, 2, dtype=torch.float64), 0))
    expected = policy.probabilities()[[3, 99, 0, 3]].log()
    torch.testing.assert_close(response_logps(policy, batch).sums, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_log_probs_of_tokens_are_those_of_full_logits(small_tokens):
    """Shifted: token t is predicted from what stands before it; the prompt is not scored."""
    world, policy, _ = small_tokens
    draws = world.draw(policy, world.rewards(1), (4, 6), generator())
    batch = collate(rated_groups(draws, draws.rewards, 0))
    ours = response_logps(policy, batch).sums
    for row, (group, member) in enumerate(itertools.product(range(4), range(6))):
        ids = torch.cat([draws.prompts[group, None], draws.responses[group, member]])
        logits = policy.model(input_ids=ids[None]).logits[0].double()
        expected = sum(logits[t].log_softmax(0)[ids[t + 1]] for t in range(3))
        assert float(ours[row]) == pytest.approx(float(expected), abs=1e-5)


@torch.no_grad()
def test_tokens_are_drawn_and_measured_as_enumeration_says(small_tokens):
    """KL and reward over all 27 responses to each of 3 prompts; the estimate within five standard errors."""
    world, policy, reference = small_tokens
    rewards = world.rewards(1)
    everything = torch.tensor(list(itertools.product(range(3), repeat=4)))
    chances, logratios = torch.zeros(81, dtype=torch.float64), torch.zeros(81, dtype=torch.float64)
    for row, ids in enumerate(everything):
        ours, theirs = (m.model(input_ids=ids[None]).logits[0].double().log_softmax(-1) for m in (policy, reference))
        logp, other = (sum(float(m[t, ids[t + 1]]) for t in range(3)) for m in (ours, theirs))
        chances[row], logratios[row] = math.exp(logp) / 3, logp - other
    assert float(chances.sum()) == pytest.approx(1, abs=1e-6)
    kl = float((chances * logratios).sum())
    reward = float((chances * rewards[everything[:, 1:]].mean(dim=1)).sum())
    measurements = [world.measure(policy, reference, rewards, generator(seed)) for seed in range(30)]
    for name, exact in (("kl", kl), ("reward", reward)):
        values = torch.tensor([getattr(measurement, name) for measurement in measurements])
        assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / math.sqrt(30)
        assert float(values.std()) < 0.2 * exact
    draws = world.draw(policy, rewards, (20000, 1), generator())
    index = (draws.prompts * 27 + (draws.responses[:, 0] * torch.tensor([9, 3, 1])).sum(dim=1)).bincount(minlength=81)
    assert ((index / 20000 - chances).abs() < 5 * (chances / 20000).sqrt() + 1e-4).all()
    torch.testing.assert_close(draws.rewards[:, 0], rewards[draws.responses[:, 0]].mean(dim=1))


def test_the_rater_is_bradley_terry_and_best_of_k_is_plackett_luce():
    rewards = torch.tensor([0.9, 0.4, 0.0, 0.6]).double().expand(40000, 4)
    utility = utilities(rewards, 3.0, generator())
    first = float((utility[:, 0] > utility[:, 1]).double().mean())
    assert first == pytest.approx(1 / (1 + math.exp(-3 * 0.5)), abs=0.01)
    best = utility.argmax(dim=1).bincount() / 40000
    torch.testing.assert_close(best, (3 * rewards[0]).softmax(0), atol=0.01, rtol=0, check_dtype=False)


def test_groups_keep_order_pairs_and_the_best_first():
    draws = Draws(torch.tensor([7]), torch.tensor([[[1], [2], [3], [4]]]), torch.zeros(1, 4))
    (group,) = rated_groups(draws, torch.tensor([[0.1, 0.3, 0.9, 0.2]]), 5)
    assert (group.group_index, group.prompt_ids, group.response_ids) == (5, [7], ([1], [2], [3], [4]))
    assert group.pairs == ((2, 3), (1, 0))


@pytest.mark.parametrize("peak", [20, 70])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_in_the_population_recovers_the_optimum(peak, beta):
    """All ordered pairs of arms with their probability under the reference and Bradley-Terry, by exact gradients."""
    rewards, objective = bump(peak, 10.0), bind(dpo, beta=beta)
    logits = REFERENCE.log().clone().requires_grad_()
    first, second = (arms.flatten() for arms in torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij"))
    weights = REFERENCE[first] * REFERENCE[second] * torch.sigmoid(rewards[first] - rewards[second])
    ones = torch.ones(len(first), dtype=torch.long)

    def pairs(logps):
        return PairLogps(logps[first], logps[second], ones, ones, ones, ones)

    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")  # fmt: skip
    scale = 2 / beta**2  # of the loss; its curvature in the logits is of the order of beta^2

    def loss():
        optimizer.zero_grad()
        outcome = objective.function(policy=pairs(logits.log_softmax(0)), reference=pairs(REFERENCE.log()))
        value = scale * (weights * outcome.losses).sum()
        value.backward()
        return value

    optimizer.step(loss)
    policy = logits.detach().softmax(0)
    assert float(divergence(policy, optimum(REFERENCE, rewards, 1 / beta))) < 1e-4


def test_on_policy_training_sees_the_policy_and_offline_the_reference():
    """With rewards far from the reference's mass, fresh samples matter; both cost the same queries and steps."""
    options = StudyOptions(rounds=10, steps_per_round=10, queries_per_round=100, measure_every=100, lr=0.1)
    ends = {}
    for schedule in ("offline", "on_policy"):
        problem, method = Problem(Arms(10.0), 70, True), Method(bind(dpo, beta=0.1), options, 0.1)
        points, tokens = one_run(problem, method, schedule, Arms(10.0).initial(0), (0, 0))
        assert [point[:2] for point in points] == [(0, 0), (100, 1000)]
        assert points[0][2:] == pytest.approx((0.0390, 0.0), abs=1e-4)
        assert float(tokens @ bump(70, 10.0)) == pytest.approx(points[-1][2])
        ends[schedule] = points[-1]
    assert ends["on_policy"][2] > 0.6 > 0.4 > ends["offline"][2]


@pytest.mark.parametrize("function", [sft, reinforce])
def test_other_kinds_of_objectives_gain_reward_in_their_own_way(function):
    """A likelihood fits the best of ten, a policy gradient takes advantages; a run is a function of its numbers."""
    options = StudyOptions(rounds=10, steps_per_round=5, samples_per_group=10, measure_every=50, lr=0.1)
    method = Method(bind(function), options, None)
    runs = [
        one_run(Problem(Arms(10.0), 20, True), method, "on_policy", Arms(10.0).initial(0), (0, replicate))
        for replicate in (0, 0, 1)
    ]
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert runs[0][0][-1][2] > 0.8
