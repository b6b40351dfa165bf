"""One step equals the formula by brute force; packing and micro-batching change nothing; bad numbers do no harm."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch

from dpo_ref.component import component
from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import collate, pack
from dpo_ref.models.checkpoint import restore_random_states
from dpo_ref.models.loading import Policy
from dpo_ref.models.logps import response_hidden
from dpo_ref.objectives.interface import BatchLogps, Preference, Running, bind
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.objectives.unpaired import sft
from dpo_ref.references.moving import MovingReference
from dpo_ref.references.policies import LiveReference, NoReference
from dpo_ref.training.optim import SCHEDULES, adamw, adamw_bf16, muon, optimisation, rmsprop
from dpo_ref.training.rounds import OfflineRounds, TrainerConfig
from dpo_ref.training.trainer import backward, evaluate, step_zero, train
from dpo_ref.types import PairLogps, ResponseLogps
from tests.support.quick import only
from tests.support.tiny import naive_logps, policy_of, random_groups, shared, tiny_model

LAYOUT = [(3 + i % 5, (2 + i % 7, 1 + i % 4)) for i in range(10)]
PACKING = partial(pack, tokens_per_batch=1000)
PLAIN = {"lr": 1e-2, "schedule": "constant", "warmup_ratio": 0.0}


def run(packing=None, steps=3, objective=None, **options):
    policy = policy_of(tiny_model(seed=0))
    reference = LiveReference("other", tiny_model(seed=1), "id", "weights")
    optim = optimisation(adamw, policy.model, steps, **(PLAIN | options))
    config = TrainerConfig(batch_size=4, max_steps=steps)
    rounds = OfflineRounds(from_groups(random_groups(LAYOUT)), config, packing or PACKING, 2)
    return policy.model, list(train(policy, reference, objective or bind(dpo, beta=0.3), optim, rounds))


def test_first_step_equals_brute_force():
    """Loss, accuracy, margins and the update of plain DPO written out: one response at a time, full logits."""
    policy, (step,) = run(steps=1, max_grad_norm=None)
    again, reference = tiny_model(seed=0), tiny_model(seed=1)
    margins = []
    for group in step.groups:
        ours = [x.double().sum() for x in naive_logps(again, group)]
        theirs = [x.double().sum().detach() for x in naive_logps(reference, group)]
        margins.append(0.3 * ((ours[0] - theirs[0]) - (ours[1] - theirs[1])))
    margins = torch.stack(margins)
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    assert step.metrics["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
    assert step.metrics["rewards/margins"].item() == pytest.approx(margins.mean().item(), abs=1e-5)
    assert step.metrics["rewards/accuracies"].item() == (margins > 0).double().mean().item()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in again.parameters()]).norm()
    assert step.metrics["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer.step()
    for ours, theirs in zip(policy.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)  # Adam's first step is lr * sign(gradient)


def test_half_precision_gives_float32_gradients_close_to_float32s():
    """What CUDA does by default, here on the CPU: the same step under bfloat16 autocast."""
    groups = random_groups(LAYOUT[:4])
    gradients, losses = [], []
    for half in (False, True):
        policy = tiny_model(seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            batch = collate(groups)
            assert response_hidden(policy, batch).dtype == (torch.bfloat16 if half else torch.float32)
            values, _ = backward(policy_of(policy), NoReference(), bind(dpo, beta=0.05), shared([groups]))
        losses.append(values["loss"].mean().item())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert gradients[1].dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[1] != losses[0]
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("objective", [bind(dpo, beta=0.3), bind(sft)], ids=["dpo", "sft"])
def test_results_agree_across_pack_sizes(objective):
    reference_metrics = [step.metrics for step in run(objective=objective)[1]]
    for packing in (partial(pack, tokens_per_batch=23), partial(pack, tokens_per_batch=1, packing="one_group")):
        for ours, theirs in zip(run(packing, objective=objective)[1], reference_metrics, strict=True):
            for name, value in theirs.items():
                assert ours.metrics[name].item() == pytest.approx(value.item(), abs=1e-4, rel=1e-5), name


def test_half_precision_sees_every_update():
    """Autocast keeps its half-precision copies of weights until it is left; a run is one context from end to end."""

    def losses(contexts):
        model, groups = tiny_model(), from_groups(random_groups(LAYOUT))
        policy = Policy(lambda: model, None, torch.bfloat16)
        config = TrainerConfig(batch_size=len(groups), epochs=4.0)
        rounds = OfflineRounds(groups, config, PACKING, 2)
        steps = train(policy, NoReference(), bind(dpo, beta=0.3), optimisation(adamw, model, 4, **PLAIN), rounds)
        values = []
        for _ in range(contexts):
            with policy.precision():
                values += [float(step.metrics["loss"]) for step in islice(steps, 4 // contexts)]
        return values

    whole = losses(contexts=1)
    assert whole == losses(contexts=4)
    assert len(set(whole)) == 4


def test_the_same_run_twice_is_the_same_bit_for_bit():
    first, second = run()[0], run()[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def first_step(policy, reference, groups):
    """A first step up to its update."""
    backward(policy, reference, bind(dpo, beta=0.1), shared([groups]), look=step_zero(policy, reference))


def test_a_policy_that_is_its_own_reference_starts_at_ln_2():
    policy, groups = policy_of(tiny_model(seed=0)), random_groups(LAYOUT)
    reference = LiveReference("initial", tiny_model(seed=0), "id", policy.weights)
    values = evaluate(policy, reference, bind(dpo, beta=0.1), groups, partial(pack, tokens_per_batch=40))
    assert values["loss"].mean().item() == pytest.approx(math.log(2), abs=1e-6)
    first_step(policy, reference, groups)
    with pytest.raises(ValueError, match="step 0: policy and reference have the same weights"):
        first_step(policy, LiveReference("initial", tiny_model(seed=1), "id", policy.weights), groups)
    first_step(policy, LiveReference("other", tiny_model(seed=1), "id", "other weights"), groups)


class InFloat32(LiveReference):
    def logps(self, batch):
        with torch.autocast("cpu", enabled=False):
            return super().logps(batch)


def test_step_zero_in_half_precision_allows_rounding_and_nothing_else():
    """One model in bfloat16 and in float32 differs by rounding alone; a head scaled by 1.5 is another model."""
    groups = random_groups(LAYOUT)
    policy = policy_of(tiny_model(seed=0))
    reference = InFloat32("initial", tiny_model(seed=0), "id", policy.weights)
    with torch.autocast("cpu", torch.bfloat16):
        first_step(policy, reference, groups)
        reference.model.lm_head.weight.mul_(1.5)
        with pytest.raises(ValueError, match="in the mean"):
            first_step(policy, reference, groups)


@pytest.mark.parametrize("wrong", [0, 1])
def test_step_zero_sees_one_token_that_is_wrong(wrong):
    policy = policy_of(tiny_model(seed=0))
    look = step_zero(policy, LiveReference("initial", tiny_model(seed=0), "id", policy.weights))
    one, apart = torch.ones(1, dtype=torch.long), torch.zeros(2400)
    apart[:wrong] = 1e-3
    ours, theirs = (ResponseLogps(one.double(), one, one, values) for values in (0 * apart, apart))
    with pytest.raises(ValueError, match="step 0") if wrong else nullcontext():
        look(ours, theirs)


@component(advance=lambda running, whole: {"seen": running.get("seen", 0 * BROKEN) + 1.0})
def breakable(policy: PairLogps, whole: BatchLogps[PairLogps], running: Running) -> Preference:
    """DPO without a reference, plus what makes a loss non-finite and has no gradient."""
    losses, chosen, rejected = dpo(policy, replace(policy, chosen=0 * policy.chosen, rejected=0 * policy.rejected))
    return Preference(losses + BROKEN, chosen, rejected)


BROKEN = torch.zeros((), dtype=torch.float64)  # what is added to every loss


def break_loss(policy, value):
    BROKEN.fill_(value)


def break_gradient(policy, value):
    """From the next backward pass on, in one of its packs only."""
    handle = policy.lm_head.weight.register_hook(lambda grad: (handle.remove(), grad + value)[1])


FAULTS = {"only the loss": break_loss, "only the gradient": break_gradient}


def state_of(policy, optim, reference, objective):
    """All that a checkpoint would hold."""
    moments = {
        (name, key): value.clone()
        for name, parameter in policy.named_parameters()
        for key, value in optim.optimizer.state[parameter].items()
    }
    weights = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    moved = {f"reference {name}": weight.clone() for name, weight in reference.state_dict().items()}
    return weights | moments | moved | dict(objective.running) | {"random": torch.get_rng_state()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def breaking(steps, fault, value, packs, optimiser=adamw_bf16):
    """Train; `fault` comes with the third step. The state after each step that was made, as whoever reads one step
    late and restores what the broken step began from has it, and how to go on."""
    BROKEN.zero_()
    torch.manual_seed(0)
    policy, objective = tiny_model(seed=0), bind(breakable)
    optim = optimisation(optimiser, policy, 6, **PLAIN)
    reference = MovingReference(tiny_model(seed=1, dtype=policy.dtype), "id", "weights", 0.5, 1)
    packing = partial(pack, tokens_per_batch=packs)
    rounds = OfflineRounds(from_groups(random_groups(LAYOUT)), TrainerConfig(batch_size=4, epochs=2.0), packing, 2)
    states, late = [], None
    for step in train(policy_of(policy), reference, objective, optim, rounds, 0):
        if late is not None and not late.made:
            restore_random_states(late.before.random_states)
            objective.running.clear()
            objective.running.update(late.before.running)
            break
        states.append(state_of(policy, optim, reference, objective))
        late = step
        if step.step == 2 and fault is not None:
            fault(policy, value)
        if step.step == steps:
            return states, None
    return states, (policy, optim, reference, objective, rounds)


def check_nothing_is_left(fault, value, packs, optimiser):
    whole, _ = breaking(6, None, value, packs, optimiser)
    _, (policy, optim, reference, objective, rounds) = breaking(6, FAULTS[fault], value, packs, optimiser)
    assert same(state_of(policy, optim, reference, objective), whole[1])
    BROKEN.zero_()
    steps = train(policy_of(policy), reference, objective, optim, rounds, first_step=2)
    assert [step.step for step in steps] == [3, 4, 5, 6]
    assert same(state_of(policy, optim, reference, objective), whole[5])


@pytest.mark.parametrize("packs", [1000, 23], ids=["one pack", "several packs"])
@pytest.mark.parametrize("value", only([math.nan, math.inf], math.inf))
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_of_a_step_that_is_not_finite_is_left(fault, value, packs):
    """Though the step after it was begun when its numbers were read: weights, moments, a moving reference, the
    objective's statistic and random states are those after the step before, and going on is as if nothing had been."""
    check_nothing_is_left(fault, value, packs, adamw_bf16)


@pytest.mark.parametrize("optimiser", [adamw, muon, rmsprop])
def test_no_optimiser_leaves_anything_of_a_step_that_is_not_finite(optimiser):
    check_nothing_is_left("only the gradient", math.nan, 1000, optimiser)


def test_no_round_is_made_after_a_step_that_is_not_finite():
    """It would be sampled from a policy that lacks an update."""
    policy = tiny_model(seed=0)
    policy.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
    before = [p.detach().clone() for p in policy.parameters()]
    groups = from_groups(random_groups(LAYOUT))

    class Two(OfflineRounds):
        def after(self, first_step):
            yield from super().after(first_step)
            raise AssertionError("a second round was asked for")

    rounds = Two(groups, TrainerConfig(batch_size=4, max_steps=2), PACKING, 0)
    optim = optimisation(adamw, policy, 2, **PLAIN)
    steps = list(train(policy_of(policy), NoReference(), bind(dpo, beta=0.3), optim, rounds))
    assert [bool(step.made) for step in steps] == [False, False]
    assert not steps[0].metrics["grad_norm"].isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_overfits_one_batch():
    policy = tiny_model(seed=0)
    config, groups = TrainerConfig(batch_size=4, epochs=25.0), from_groups(random_groups(LAYOUT[:4]))
    optim = optimisation(adamw, policy, 25, lr=1e-2, schedule="constant")
    rounds = OfflineRounds(groups, config, PACKING, 0)
    history = list(train(policy_of(policy), NoReference(), bind(dpo, beta=0.1), optim, rounds))
    assert history[-1].metrics["loss"] < 0.05 < history[0].metrics["loss"]
    assert history[-1].metrics["rewards/accuracies"] == 1.0
    assert history[-1].epoch == 25


def test_schedules():
    """20 steps of which 4 are warm-up, and 5 the decay where there is one."""
    expected = {
        "constant": (0.25, 1.0, 1.0, 1.0),
        "linear": (0.25, 1.0, 0.5, 1 / 16),
        "cosine": (0.25, 1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 15 / 16))),
        "wsd": (0.25, 1.0, 1.0, 1 / 5),
    }
    for name, values in expected.items():
        options = {"decay_ratio": 0.25} if name == "wsd" else {}
        factor = partial(SCHEDULES[name], num_steps=20, warmup_steps=4, **options)
        assert [factor(step) for step in (0, 3, 12, 19)] == pytest.approx(values), name
    stable = [SCHEDULES["wsd"](step, 20, 4, decay_ratio=0.25) for step in range(3, 16)]
    assert stable == [1.0] * 13


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_a_smallest_learning_rate_is_what_the_step_after_the_last_reaches(name):
    """f(t) = m + (1 - m) f0(t), and the warm-up is as it is without."""
    plain, floored = SCHEDULES[name], partial(SCHEDULES[name], min_lr_ratio=0.1)
    assert (floored(20, 20, 4), floored(1, 20, 4)) == pytest.approx((0.1, 0.5))
    for step in range(4, 20):
        assert floored(step, 20, 4) == pytest.approx(0.1 + 0.9 * plain(step, 20, 4))


def test_a_warm_up_in_steps():
    """150 steps to 1e-6, then constant: what DPO was published with."""
    optim = optimisation(rmsprop, tiny_model(), 1000, lr=1e-6, schedule="constant", warmup_steps=150)
    assert [optim.lr_at(step) for step in (0, 74, 149, 999)] == pytest.approx([1e-6 / 150, 5e-7, 1e-6, 1e-6])


WITHOUT_EFFECT = {
    "decay_ratio": (
        {"decay_ratio": 0.2},
        "optim.decay_ratio=0.2 has no effect: optim.schedule=linear has none; .*=wsd",
    ),
    "min_lr_ratio": (
        {"min_lr_ratio": 0.0, "schedule": "constant"},
        "optim.min_lr_ratio=0.0 has no effect: optim.schedule=constant has none; .*=linear, cosine, wsd",
    ),
    "two warm-ups": ({"warmup_steps": 3, "warmup_ratio": 0.2}, "say the same thing; give one of them"),
    "overlap": ({"schedule": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6}, "more than the whole run together"),
    "longer than the run": ({"warmup_steps": 10}, "optim.warmup_steps=10, and the run has 10 steps"),
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_schedule_options_without_effect_are_refused(name):
    options, words = WITHOUT_EFFECT[name]
    with pytest.raises(ValueError, match=words):
        optimisation(adamw, tiny_model(), 10, **options)


def test_decay_is_for_matrices_only_and_lr_follows_the_schedule():
    policy = tiny_model("gpt_neox")
    optim = optimisation(partial(adamw, weight_decay=0.1), policy, 10, lr=1.0, schedule="linear", warmup_ratio=0.2)
    decayed, plain = optim.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in plain["params"])
    assert [optim.lr_at(step) for step in (0, 1, 6)] == pytest.approx([0.5, 1.0, 0.5])


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"warmup_ratio": 1.5}, {"max_grad_norm": 0.0}])
def test_optimiser_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"optim.{next(iter(options))}"):
        optimisation(adamw, tiny_model(), 10, **options)


@pytest.mark.parametrize("name", ["batch_size", "epochs", "max_steps", "eval_every", "save_every", "save_minutes"])
def test_trainer_options_out_of_range(name):
    zero = 0.0 if name in ("epochs", "save_minutes") else 0
    with pytest.raises(ValueError, match=f"trainer.{name}={zero} must be positive"):
        TrainerConfig(**{name: zero})
