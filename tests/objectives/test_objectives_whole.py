"""Objectives that look beyond a pair: loss and gradient of the optimiser batch, written out, whatever its packs."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import pack
from dpo_ref.models import checkpoint, logps
from dpo_ref.objectives.coupled import alphadpo, aot, beta_dpo, dr_dpo, gamma_po
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.mix import mix
from dpo_ref.objectives.pairwise import dpo, ld_dpo, wpo
from dpo_ref.objectives.unpaired import bco, kto, sft
from dpo_ref.references.policies import LiveReference
from dpo_ref.training.optim import adamw, optimisation
from dpo_ref.training.rounds import OfflineRounds, TrainerConfig, groups_for
from dpo_ref.training.trainer import backward, evaluate, train
from tests.support.quick import only
from tests.support.tiny import VOCAB, naive_logps, policy_of, random_groups, shared, tiny_model

LAYOUT = [(3 + i % 5, (2 + i % 7, 1 + 3 * i % 5)) for i in range(9)]
GROUPS = from_groups(
    replace(group, group_id=f"{index:032x}") for index, group in enumerate(random_groups(LAYOUT, seed=3))
)
PACKINGS = {
    "one pack": partial(pack, tokens_per_batch=10_000),
    "several packs": partial(pack, tokens_per_batch=30),
    "one group each": partial(pack, tokens_per_batch=1, packing="one_group"),
}
# Packing, and tokens of a chunk of logits.
SPLIT = only(list(product(PACKINGS, (10, 10_000))), ("one pack", 10_000), ("several packs", 10))
BETA, M0 = 0.3, 0.7
USUAL = {"beta_dpo": {"mean_margin": M0}, "alphadpo": {"mean_gap": 0.02, "sd_gap": 0.05}}  # before the batch


def model(seed):
    """Without RMSNorm, which computes in float32."""
    return tiny_model("gpt_neox", seed=seed, dtype=torch.float64)


def reference():
    return LiveReference("other", model(1), "id", "weights")


def each(scores, part):
    """Of every group: the sums over its chosen (0) or rejected (1) response."""
    return torch.stack([group[part].sum() for group in scores])


def ratios(ours, theirs):
    return [each(ours, part) - each(theirs, part) for part in (0, 1)]


def aot_loss(ours, theirs, policy, groups):
    margins = [(each(scores, 0) - each(scores, 1)).sort().values for scores in (ours, theirs)]
    return F.softplus(-BETA * (margins[0] - margins[1])).mean()


def beta_dpo_loss(ours, theirs, policy, groups):
    chosen, rejected = ratios(ours, theirs)
    mean = BETA * (chosen - rejected).detach().mean()
    strength = BETA * (1 + 0.6 * (mean - (0.9 * M0 + 0.1 * mean)))
    assert strength > 0.001
    return F.softplus(-strength * (chosen - rejected)).mean()


def dr_dpo_loss(ours, theirs, policy, groups):
    """As the paper prints it, gradient through all of it."""
    chosen, rejected = ratios(ours, theirs)
    likelihoods = torch.sigmoid(BETA * (chosen - rejected))
    return -0.4 * (likelihoods ** (1 / 0.4)).mean().log()


def gamma_po_loss(ours, theirs, policy, groups):
    """The authors' loop, which multiplies shares; targets are constants."""
    chosen, rejected = ratios(ours, theirs)
    gaps = BETA * (chosen - rejected)
    shares, gamma, tau = torch.full_like(gaps, 1 / len(gaps)).detach(), 0.5, 1.0
    for _ in range(21):  # theirs reads the targets before the last of its steps
        targets = gamma * len(gaps) * shares
        slope = tau * (1 + torch.log(len(gaps) * shares)) + gamma / (1 + torch.exp(gaps.detach() - targets))
        shares = shares * torch.exp(-0.5 * slope)
        shares = shares / shares.sum()
    assert (targets - gamma).abs().max() > 0.01
    return F.softplus(targets - gamma - gaps).mean()


def alphadpo_loss(ours, theirs, policy, groups):
    """The authors': a constant target, alpha inside beta, moving averages that take the batch in first."""
    means = [torch.stack([a[part].mean() for a in ours]) for part in (0, 1)]
    gaps = (means[0] - means[1] - torch.stack([b[0].mean() - b[1].mean() for b in theirs])).detach()
    usual = USUAL["alphadpo"]
    mean, spread = 0.9 * usual["mean_gap"] + 0.1 * gaps.mean(), 0.9 * usual["sd_gap"] + 0.1 * gaps.std()
    targets = 0.8 + 0.2 * (gaps - mean) / spread
    assert (targets - 0.8).abs().max() > 0.1
    return F.softplus(-2.5 * (means[0] - means[1] - targets)).mean()


def kto_loss(ours, theirs, policy, groups):
    """The KL is positive here (else it would count as 0). Responses are cut where the data's longest sequence ends."""
    gaps, longest = [], max(len(g.prompt_ids) + len(ids) for g in groups for ids in g.response_ids)
    for group, after in zip(groups, [*groups[1:], groups[0]], strict=True):
        both = replace(group, response_ids=tuple(ids[: longest - len(group.prompt_ids)] for ids in after.response_ids))
        for a, b in zip(naive_logps(policy, both), naive_logps(model(1), both), strict=True):
            gaps.append(float((a - b).detach().sum()))
    kl = sum(gaps) / len(gaps)
    assert kl > 0.1
    chosen, rejected = ratios(ours, theirs)
    losses = [1.5 * torch.sigmoid(BETA * (kl - chosen)), 0.5 * torch.sigmoid(BETA * (rejected - kl))]
    return torch.cat(losses).mean()


def bco_loss(ours, theirs, policy, groups):
    chosen, rejected = (BETA * ratio for ratio in ratios(ours, theirs))
    shift = ((chosen.mean() + rejected.mean()) / 2).detach()
    return torch.cat([F.softplus(shift - chosen), F.softplus(rejected - shift)]).mean()


def ld_dpo_loss(ours, theirs, policy, groups):
    def reward(part, a, b):
        shared = min(len(a[0]), len(a[1]))
        gaps = a[part] - b[part]
        return BETA * (gaps[:shared].sum() + 0.4 * gaps[shared:].sum())

    margins = [reward(0, a, b) - reward(1, a, b) for a, b in zip(ours, theirs, strict=True)]
    return F.softplus(-torch.stack(margins)).mean()


def wpo_loss(ours, theirs, policy, groups):
    def weight(group, part, logps):
        ids = torch.tensor([[*group.prompt_ids, *group.response_ids[part]]])
        policy.set_attn_implementation("sdpa")
        shares = policy(input_ids=ids, use_cache=False).logits[0].softmax(-1)[len(group.prompt_ids) - 1 : -1]
        return (logps[part] - shares.square().sum(-1).log()).mean().exp().detach()

    backend = policy.config._attn_implementation
    weights = [weight(g, 0, a) * weight(g, 1, a) for g, a in zip(groups, ours, strict=True)]
    policy.set_attn_implementation(backend)
    chosen, rejected = ratios(ours, theirs)
    return (torch.stack(weights) * F.softplus(-BETA * (chosen - rejected))).mean()


def mix_loss(ours, theirs, policy, groups):
    """Of the responses' losses a pair has two; the likelihood is the chosen response's mean over its tokens."""
    both = aot_loss(ours, theirs, policy, groups), bco_loss(ours, theirs, policy, groups)
    likelihood = torch.stack([-chosen.mean() for chosen, _ in ours]).mean()
    return 0.7 * both[0] + 0.2 * 2 * both[1] + 0.4 * 2 * kto_loss(ours, theirs, policy, groups) + 1.5 * likelihood


MIXED = [
    bind(aot, beta=BETA),
    bind(bco, beta=BETA),
    bind(kto, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5),
    bind(sft),
]
WRITTEN_OUT = {
    "mix": (bind(mix, parts=MIXED, weights=[0.7, 0.2, 0.4, 1.5]), mix_loss),
    "aot": (bind(aot, beta=BETA), aot_loss),
    "beta_dpo": (bind(beta_dpo, beta=BETA, alpha=0.6, momentum=0.9), beta_dpo_loss),
    "dr_dpo": (bind(dr_dpo, beta=BETA, mode_weight=0.4), dr_dpo_loss),
    "gamma_po": (bind(gamma_po, beta=BETA, gamma=0.5, tau=1.0), gamma_po_loss),
    "alphadpo": (bind(alphadpo, beta=2.5, gamma=2.0, alpha=0.2), alphadpo_loss),
    "kto": (bind(kto, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5), kto_loss),
    "bco": (bind(bco, beta=BETA), bco_loss),
    "ld_dpo": (bind(ld_dpo, beta=BETA, alpha=0.4), ld_dpo_loss),
    "wpo": (bind(wpo, beta=BETA), wpo_loss),
}


def tensors(running):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in running.items()}


@pytest.fixture(scope="module", params=WRITTEN_OUT)
def case(request):
    """Objective, what it knows of earlier batches, and loss and gradients of all weights by autograd through the
    formula, one response at a time."""
    objective, formula = WRITTEN_OUT[request.param]
    policy, theirs = model(0), model(1)
    plain = list(GROUPS)
    scores = [[naive_logps(m, group) for group in plain] for m in (policy, theirs)]
    loss = formula(scores[0], [[x.detach() for x in pair] for pair in scores[1]], policy, plain)
    running = USUAL.get(request.param, {})
    return objective, running, loss.detach(), torch.autograd.grad(loss, list(policy.parameters()))


@pytest.mark.parametrize(("packing", "tokens_per_chunk"), SPLIT)
def test_loss_and_gradient_of_the_whole_batch(case, packing, tokens_per_chunk, monkeypatch):
    objective, running, loss, gradients = case
    monkeypatch.setattr(logps, "CHUNK_LOGITS", tokens_per_chunk * VOCAB)
    policy = model(0)
    objective.running.update(tensors(running))
    packs = PACKINGS[packing](list(groups_for(objective, GROUPS)))
    assert (len(packs) == 1) == (packing == "one pack")
    values, _ = backward(policy_of(policy), reference(), objective, shared(packs))
    torch.testing.assert_close(values["loss"].mean(), loss, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(policy.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["aot", "kto", "bco", "beta_dpo", "dr_dpo", "gamma_po", "alphadpo", "mix"])
def test_held_out_data_is_one_batch_and_leaves_the_running_statistic(name):
    objective = WRITTEN_OUT[name][0]
    objective.running.update(tensors(USUAL.get(name, {})))
    groups = list(groups_for(objective, GROUPS))
    policy = policy_of(model(0))
    evaluations = [evaluate(policy, reference(), objective, groups, packing) for packing in PACKINGS.values()]
    for evaluation in evaluations[1:]:
        torch.testing.assert_close(evaluation["loss"].mean(), evaluations[0]["loss"].mean(), rtol=1e-9, atol=1e-9)
    assert objective.running == USUAL.get(name, {})


def steps(policy, optim, objective, first_step=0):
    config = TrainerConfig(batch_size=4, max_steps=5)
    rounds = OfflineRounds(GROUPS, config, PACKINGS["several packs"], 1)
    return train(policy_of(policy), reference(), objective, optim, rounds, first_step)


@pytest.mark.parametrize("name", USUAL)
def test_a_resumed_run_has_the_running_statistic_it_had(name, tmp_path):
    whole, objective = model(0), WRITTEN_OUT[name][0]
    optim = optimisation(adamw, whole, 5, lr=1e-2)
    first = [step.metrics["loss"].item() for step in steps(whole, optim, objective)]
    at_the_end = dict(objective.running)

    half = model(0)
    half_optim = optimisation(adamw, half, 5, lr=1e-2)
    for step in steps(half, half_optim, objective):
        if step.step == 3:
            state = {"step": 3, "running": {name: float(value) for name, value in objective.running.items()}}
            checkpoint.save(tmp_path, half, half_optim.optimizer, {}, state).result()
            break
    again = model(5)
    again_optim = optimisation(adamw, again, 5, lr=1e-2)
    (saved,) = checkpoint.complete_in(tmp_path)
    checkpoint.load(saved, again, again_optim.optimizer)
    kept = tensors(checkpoint.read_state(saved)["running"])
    assert kept.keys() == USUAL[name].keys()
    assert all(float(value) != 0 for value in kept.values())
    objective.running.update(kept)
    rest = [step.metrics["loss"].item() for step in steps(again, again_optim, objective, first_step=3)]
    assert rest == first[3:]
    assert objective.running == at_the_end
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_what_nothing_declares_is_not_computed(monkeypatch):
    """One forward pass of the policy for each pack, unless an objective asks for more. Responses of other prompts are
    longer than a pack for one of the four here, and take two passes."""
    counts = {}
    for name, objective in {"dpo": bind(dpo), **{name: WRITTEN_OUT[name][0] for name in WRITTEN_OUT}}.items():
        policy, passes = model(0), []
        policy.base_model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        packs = PACKINGS["several packs"](list(groups_for(objective, GROUPS)))
        backward(policy_of(policy), reference(), objective, shared(packs))
        counts[name] = len(passes) / len(packs)
    coupled = dict.fromkeys(("aot", "beta_dpo", "dr_dpo", "gamma_po", "alphadpo", "bco"), 2)
    assert counts == coupled | {"mix": 3.25, "dpo": 1, "kto": 2.25, "ld_dpo": 1, "wpo": 2}
