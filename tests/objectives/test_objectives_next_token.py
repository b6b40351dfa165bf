"""Objectives on next-token distributions: by hand, and loss and gradient of a whole batch by the formula over the full
vocabulary, written out; what they tend to; what they carry from step to step; what they refuse."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from dpo_ref.cli.build import check_next_tokens
from dpo_ref.component import component
from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import pack
from dpo_ref.models import logps
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.objectives.coupled import aot
from dpo_ref.objectives.divergences import (
    FORWARD_KL,
    REVERSE_KL,
    PairDivergences,
    RenyiSum,
    ResponseDivergences,
    TokenDivergence,
)
from dpo_ref.objectives.interface import Likelihood, Preference, bind, probe_inputs
from dpo_ref.objectives.mix import mix
from dpo_ref.objectives.next_token import epsilon_dpo, tdpo, tdpo1
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.objectives.reference_free import simpo
from dpo_ref.objectives.unpaired import kto, sft
from dpo_ref.references.interface import tempered
from dpo_ref.references.policies import AdapterBase, LiveReference, NoReference
from dpo_ref.training.trainer import backward, evaluate
from dpo_ref.types import PairLogps, ResponseLogps
from tests.support.command import resolved, train
from tests.support.quick import only
from tests.support.tiny import VOCAB, disturbed, policy_of, random_groups, shared, tiny_model

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
BETA, MOVED = 0.3, 0.2  # given, and where epsilon_dpo's has come to


# --- by hand


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def up(x):
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def pair(chosen, rejected):
    return PairLogps(numbers(chosen), numbers(rejected), *(torch.tensor([size]) for size in (4, 7, 13, 22)))


def divergences(**chosen_and_rejected):
    """Of one pair whose rejected response comes first."""
    sums = {asked: numbers(rejected, chosen) for asked, (chosen, rejected) in chosen_and_rejected["of"].items()}
    return PairDivergences(sums, torch.tensor([1]), torch.tensor([0]))


def test_tdpo_by_hand():
    """Log-ratios 2 and -1, KLs 3 and 5: margin 0.5 (3 + alpha (3 - 5)); the chosen one's KL has no gradient."""
    kls = divergences(of={FORWARD_KL: (3.0, 5.0)})
    sums = kls.sums[FORWARD_KL].requires_grad_()
    outcome = tdpo(pair(-3.0, -6.0), pair(-5.0, -5.0), kls, beta=0.5, alpha=0.25)
    assert [x.item() for x in outcome] == pytest.approx([up(0.5 * (3 - 0.5)), 0.5 * 2.75, 0.5 * 0.25])
    (slope,) = torch.autograd.grad(outcome.losses.sum(), sums)
    assert slope.tolist() == pytest.approx([0.5 * 0.25 / (1 + math.exp(1.25)), 0])


def test_tdpo1_by_hand():
    """The same KLs count in full, and the chosen one's is made larger."""
    kls = divergences(of={FORWARD_KL: (3.0, 5.0)})
    sums = kls.sums[FORWARD_KL].requires_grad_()
    outcome = tdpo1(pair(-3.0, -6.0), pair(-5.0, -5.0), kls, beta=0.5)
    assert [x.item() for x in outcome] == pytest.approx([up(0.5), 2.5, 2.0])
    (slope,) = torch.autograd.grad(outcome.losses.sum(), sums)
    assert slope.tolist() == pytest.approx([0.5 / (1 + math.exp(0.5)), -0.5 / (1 + math.exp(0.5))])


# Odds log p(chosen) - log p(rejected): -3 + 6 = 3 of the policy, -5 + 5 = 0 of the reference, so 3.75 and 2.25 with
# epsilon 1/4 before the normalisers, the chosen one's less the rejected one's, are taken off.
STEPS = {
    "up": ((0.25, 0.0), 1),
    "down": ((1.0, -1.0), -1),
    "both more": ((0.25, -1.0), 0),
    "equal": ((0.75, -0.75), 0),
}


@pytest.mark.parametrize("name", STEPS)
def test_epsilon_dpo_by_hand(name):
    """A step up makes a pair's strength 0.5 / 1.25, one down 0.5 / 0.75; log-ratios are 2 and -1."""
    (weaker, stronger), step = STEPS[name]
    kls = divergences(of={RenyiSum(1.25): (weaker + 1.0, 1.0), RenyiSum(0.75): (stronger + 2.0, 2.0)})
    outcome = epsilon_dpo(pair(-3.0, -6.0), pair(-5.0, -5.0), kls, {}, beta=0.5, epsilon=0.25)
    strength = 0.5 / (1 + 0.25 * step)
    assert [x.item() for x in outcome] == pytest.approx([up(3 * strength), 2 * strength, -strength, step])
    moved = epsilon_dpo(pair(-3.0, -6.0), pair(-5.0, -5.0), kls, {"beta": numbers(0.2)[0]}, epsilon=0.25)
    assert float(moved.chosen_rewards) == pytest.approx(0.4 / (1 + 0.25 * step))


def test_epsilon_dpos_beta_moves_by_the_mean_step():
    objective = bind(epsilon_dpo, beta=0.5, epsilon=0.1)
    objective.end_step({"beta/step": numbers(1, 1, 0, -1)})
    assert float(objective.running["beta"]) == pytest.approx(0.5 / 1.025)
    objective.end_step({"beta/step": numbers(-1, -1)})
    assert float(objective.running["beta"]) == pytest.approx(0.5 / 1.025 / 0.9)


def test_the_kl_term_by_hand():
    """KL(p || q) of three words at one token of each response, as in `probe_inputs`: summed over the pair's two
    responses, divided by their tokens, 2 + 3 and 1 + 3."""
    policy, inputs = probe_inputs()
    made_up = policy.divergences.sums
    kl = (made_up.logp.exp() * (made_up.logp - made_up.logq)).sum(-1)
    plain, more = (bind(dpo, kl_weight=weight)(policy, inputs) for weight in (0.0, 0.7))
    expected = 0.7 * torch.stack([(kl[0] + kl[1]) / 5, (kl[2] + kl[3]) / 4])
    torch.testing.assert_close(more.losses - plain.losses, expected)
    assert isinstance(more, Preference)
    assert torch.equal(more.chosen_rewards, plain.chosen_rewards)


# --- a whole batch, written out: full logits in float64, one response at a time


CAP = 3.0


def capped(model):
    """A cap that `head_of` reads; the model itself does not apply it."""
    model.config.final_logit_softcapping = CAP
    return model


def adapted():
    model = model_of(seed=0)
    AdapterOptions(lora_rank=3, lora_targets=["query_key_value", "dense", "lm_head"]).put_on(model)
    return disturbed(model).double()


def model_of(seed, **options):
    """Without RMSNorm, which computes in float32."""
    return tiny_model("gpt_neox", seed=seed, dtype=torch.float64, **options)


def other_of(policy, seed=1, **options):
    return LiveReference("other", model_of(seed, **options), "id", "weights")


KINDS = {  # a policy, and its reference
    "plain": (lambda: model_of(0), other_of),
    "tied": (partial(model_of, 0, tie_word_embeddings=True), partial(other_of, tie_word_embeddings=True)),
    "capped": (lambda: capped(model_of(0)), lambda policy: LiveReference("other", capped(model_of(1)), "id", "w")),
    "adapter": (adapted, lambda policy: AdapterBase(policy, "id", "weights")),
}


def words_of(model, group):
    """Of each response: log-probs of all words at its tokens, by transformers alone, and the tokens."""
    used = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    found = []
    for response in group.response_ids:
        logits = model(input_ids=torch.tensor([[*group.prompt_ids, *response]]), use_cache=False).logits[0]
        cap = model.config.to_dict().get("final_logit_softcapping")
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        found.append((logits.log_softmax(-1)[len(group.prompt_ids) - 1 : -1], torch.tensor(response)))
    model.set_attn_implementation(used)
    return found


def logp(words):
    table, tokens = words
    return table.gather(1, tokens[:, None]).sum()


def kl(of, to):
    """Summed over tokens."""
    return (of[0].exp() * (of[0] - to[0])).sum()


def margin(ours, theirs):
    return (logp(ours[0]) - logp(theirs[0])) - (logp(ours[1]) - logp(theirs[1]))


def tdpo_loss(ours, theirs):
    kls = kl(theirs[0], ours[0]).detach(), kl(theirs[1], ours[1])
    return F.softplus(-BETA * (margin(ours, theirs) - 0.7 * (kls[1] - kls[0])))


def tdpo1_loss(ours, theirs):
    return F.softplus(-BETA * (margin(ours, theirs) - (kl(theirs[1], ours[1]) - kl(theirs[0], ours[0]))))


def epsilon_dpo_loss(ours, theirs, seen=None):
    """The strength it has come to is MOVED; logits are log-probs up to a constant that cancels."""

    def odds(a):
        between = [
            (((1 + a) * p - a * q).log_softmax(-1), tokens) for (p, tokens), (q, _) in zip(ours, theirs, strict=True)
        ]
        return (logp(between[0]) - logp(between[1])).item()

    weaker, usual, stronger = odds(0.2), odds(0.0), odds(-0.2)
    step = 1 if weaker > usual > stronger else -1 if stronger > usual > weaker else 0
    if seen is not None:
        seen.append(step)
    return F.softplus(-MOVED / (1 + 0.2 * step) * margin(ours, theirs))


def with_kl_loss(ours, theirs):
    total = sum(kl(p, q) for p, q in zip(ours, theirs, strict=True))
    tokens = len(ours[0][1]) + len(ours[1][1])
    return F.softplus(-BETA * margin(ours, theirs)) + 0.9 * total / tokens


def simpo_with_kl_loss(ours, theirs):
    means = [logp(words) / len(words[1]) for words in ours]
    total = sum(kl(p, q) for p, q in zip(ours, theirs, strict=True))
    return F.softplus(-(2.0 * (means[0] - means[1]) - 1.0)) + 0.9 * total / (len(ours[0][1]) + len(ours[1][1]))


def mix_loss(ours, theirs):
    return 0.6 * tdpo_loss(ours, theirs) + 0.2 * with_kl_loss(ours, theirs) - 1.5 * logp(ours[0]) / len(ours[0][1])


TDPO = bind(tdpo, beta=BETA, alpha=0.7)
WITH_KL = bind(dpo, beta=BETA, kl_weight=0.9)
WRITTEN_OUT = {
    "tdpo": (TDPO, tdpo_loss),
    "tdpo1": (bind(tdpo1, beta=BETA), tdpo1_loss),
    "epsilon_dpo": (bind(epsilon_dpo, beta=BETA, epsilon=0.2), epsilon_dpo_loss),
    "kl_weight": (WITH_KL, with_kl_loss),
    "kl_weight without a reference's log-probs": (bind(simpo, kl_weight=0.9), simpo_with_kl_loss),
    "mix": (bind(mix, parts=[TDPO, WITH_KL, bind(sft)], weights=[0.6, 0.2, 1.5]), mix_loss),
}
CASES = [(name, "plain") for name in WRITTEN_OUT]
CASES += [(name, kind) for kind in KINDS for name in ("tdpo", "kl_weight") if kind != "plain"]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request):
    """Objective, kind of models, loss and gradients of all trained weights by autograd through the formula."""
    (objective, formula), kind = WRITTEN_OUT[request.param[0]], request.param[1]
    make, refer = KINDS[kind]
    policy = make()
    below = model_of(0) if kind == "adapter" else refer(policy).model
    losses = []
    for group in GROUPS:
        theirs = [(table.detach(), tokens) for table, tokens in words_of(below, group)]
        losses.append(formula(words_of(policy, group), theirs))
    loss = torch.stack(losses).mean()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return objective, kind, loss.detach(), torch.autograd.grad(loss, trained)


@pytest.mark.parametrize(("packing", "tokens_per_chunk"), SPLIT)
def test_loss_and_gradient_of_the_whole_batch(case, packing, tokens_per_chunk, monkeypatch):
    objective, kind, loss, gradients = case
    monkeypatch.setattr(logps, "CHUNK_LOGITS", tokens_per_chunk * VOCAB)
    make, refer = KINDS[kind]
    policy = make()
    objective.running.update(beta=numbers(MOVED)[0])
    packs = PACKINGS[packing](list(GROUPS))
    values, _ = backward(policy_of(policy), refer(policy), objective, shared(packs))
    torch.testing.assert_close(values["loss"].mean(), loss, rtol=1e-9, atol=1e-9)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for ours, theirs in zip(trained, gradients, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_held_out_data_has_the_loss_of_training_and_moves_nothing(name):
    objective, policy = WRITTEN_OUT[name][0], policy_of(model_of(0))
    objective.running.update(beta=numbers(MOVED)[0])
    evaluations = [evaluate(policy, other_of(None), objective, list(GROUPS), packing) for packing in PACKINGS.values()]
    assert objective.running == {"beta": MOVED}
    values, _ = backward(policy, other_of(None), objective, shared(PACKINGS["several packs"](list(GROUPS))))
    for evaluation in evaluations:
        assert evaluation.keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(evaluation[key].mean(), value.mean(), rtol=1e-9, atol=1e-9)


def test_epsilon_dpo_takes_steps_both_ways_here_and_moves_by_their_mean():
    objective, steps = WRITTEN_OUT["epsilon_dpo"][0], []
    policy, theirs = model_of(0), model_of(1)
    for group in GROUPS:
        epsilon_dpo_loss(words_of(policy, group), words_of(theirs, group), steps)
    assert {1, -1} <= set(steps)
    objective.running.update(beta=numbers(MOVED)[0])
    values, _ = backward(policy_of(policy), other_of(None), objective, shared(PACKINGS["several packs"](list(GROUPS))))
    assert float(values["beta/step"].mean()) == pytest.approx(sum(steps) / len(steps))
    assert float(objective.running["beta"]) == pytest.approx(MOVED / (1 + 0.2 * sum(steps) / len(steps)))


def test_what_is_logged_of_the_kls():
    """Summed over the tokens of each response, and the reverse one per token of the pair."""
    objective, policy, theirs = bind(tdpo, kl_weight=0.5), model_of(0), model_of(1)
    with torch.no_grad():
        words = [(words_of(policy, group), words_of(theirs, group)) for group in GROUPS]
    values = evaluate(policy_of(policy), other_of(None), objective, list(GROUPS), PACKINGS["several packs"])
    means = {}
    for part, side in enumerate(("chosen", "rejected")):
        means[f"kl/forward/{side}"] = [float(kl(theirs[part], ours[part])) for ours, theirs in words]
        means[f"kl/reverse/{side}"] = [float(kl(ours[part], theirs[part])) for ours, theirs in words]
    sums = zip(means["kl/reverse/chosen"], means["kl/reverse/rejected"], LAYOUT, strict=True)
    means["kl/reverse/per_token"] = [(chosen + rejected) / sum(sizes) for chosen, rejected, (_, sizes) in sums]
    for key, expected in means.items():
        assert float(values[key].mean()) == pytest.approx(sum(expected) / len(expected), rel=1e-9)


class Overlap(TokenDivergence):
    """sum_v p_v q_v, which is none of ours."""

    def values(self, logp, logq):
        return (logp + logq).exp().sum(-1)

    def gradient(self, logp, logq, values):
        return logp.exp() * (logq.exp() - values[:, None])


OVERLAP = Overlap()


@component(between=lambda: (OVERLAP,))
def apart(policy: ResponseLogps, divergences: ResponseDivergences) -> Likelihood:
    """An objective of one's own, on single responses."""
    return Likelihood(divergences[OVERLAP] - policy.sums / policy.lengths, policy.sums.detach())


def test_a_divergence_of_ones_own():
    """One number and its gradient a token are all that there is to write."""
    policy, theirs = model_of(0), model_of(1)
    words = [pair for group in GROUPS for pair in zip(words_of(policy, group), words_of(theirs, group), strict=True)]
    losses = [(p[0] + q[0].detach()).exp().sum() - logp(p) / len(p[1]) for p, q in words]
    wanted = torch.autograd.grad(torch.stack(losses).mean(), list(policy.parameters()))
    for ours, expected in zip(gradients_of(bind(apart))[1], wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)


# --- what they tend to, and where nothing pulls


def gradients_of(objective, reference=None):
    policy = model_of(0)
    values, _ = backward(policy_of(policy), reference or other_of(None), objective, shared([list(GROUPS)]))
    objective.running.clear()
    return values, [parameter.grad for parameter in policy.parameters()]


@pytest.mark.parametrize(
    "objective",
    [bind(tdpo, beta=BETA, alpha=1e-12), bind(epsilon_dpo, beta=BETA, epsilon=1e-12)],
    ids=lambda o: o.name,
)
def test_dpo_in_the_limit(objective):
    values, gradients = gradients_of(objective)
    expected, theirs = gradients_of(bind(dpo, beta=BETA))
    for key in ("loss", "rewards/chosen", "rewards/margins"):
        torch.testing.assert_close(values[key], expected[key], rtol=1e-9, atol=1e-9)
    for ours, wanted in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", [bind(tdpo, beta=BETA), bind(tdpo1, beta=BETA), WITH_KL], ids=lambda o: o.name)
def test_at_the_reference_kls_are_nothing_and_pull_nowhere(objective):
    """The KLs are 0, exactly; loss and gradient are dpo's."""
    reference = LiveReference("initial", model_of(0), "id", "weights")
    values, gradients = gradients_of(objective, reference)
    expected, theirs = gradients_of(bind(dpo, beta=BETA), reference)
    assert all(float(value.abs().max()) == 0 for key, value in values.items() if key.startswith("kl/"))
    torch.testing.assert_close(values["loss"], expected["loss"], rtol=0, atol=1e-12)
    for ours, wanted in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_a_kl_alone_is_exact_where_log_ratios_of_tokens_are_an_estimate():
    """The KL of every token from the reference, minimised by itself, brings the policy to the reference."""
    policy, reference = model_of(0), other_of(None)
    objective = replace(WITH_KL, kl_weight=1e6)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    before = None
    for _ in range(60):
        values, _ = backward(policy_of(policy), reference, objective, shared([list(GROUPS)]))
        before = before or float(values["kl/reverse/per_token"].mean())
        optimizer.step()
        optimizer.zero_grad()
    assert float(values["kl/reverse/per_token"].mean()) < before / 10


# --- what nothing asks for is not computed


def test_passes_of_either_model():
    """One trunk's pass of each a pack; a KL of weight 0 asks for nothing, nor does dpo of a reference without a
    model."""
    counts = {}
    for name, objective in {"dpo": bind(dpo, kl_weight=0.0), **{n: o for n, (o, _) in WRITTEN_OUT.items()}}.items():
        policy, reference, passes = model_of(0), other_of(None), []
        for model in (policy, reference.model):
            model.base_model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        packs = PACKINGS["several packs"](list(GROUPS))
        backward(policy_of(policy), reference, objective, shared(packs))
        counts[name] = len(passes) / len(packs)
    assert counts == dict.fromkeys(counts, 2)
    backward(policy_of(model_of(0)), NoReference(), bind(simpo, kl_weight=0.0), shared([list(GROUPS)]))


# --- runs


SMALL = ["model.path=lab:tiny", "data.num_pairs=32", "data.num_eval_pairs=4", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=8", "tracking=none", "optim.lr=0.01", "optim.schedule=constant", "optim.warmup_ratio=0"]


def rows_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "throughput" not in k and "memory" not in k} for line in lines]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["objective=tdpo"], "kl/forward/rejected"),
        (["objective=tdpo1", "reference=moving", "reference.every=1"], "kl/forward/rejected"),
        (["objective=tdpo", "model.lora_rank=4", "reference=adapter_base"], "kl/forward/rejected"),
        (["objective=epsilon_dpo", "reference=interpolate", "reference.path=lab:tiny", "reference.share=0.5"],
         "objective/beta"),
        (["objective=dpo", "objective.kl_weight=0.5", "reference=other", "reference.path=lab:tiny"],
         "kl/reverse/per_token"),
        (["objective=simpo", "objective.kl_weight=0.5"], "kl/reverse/per_token"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else None,
)  # fmt: skip
def test_a_run_asks_its_reference_at_every_step_and_says_so(words, key, tmp_path):
    done = train(*SMALL, *words, "trainer.max_steps=2", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    asking = "objective.kl_weight=0.5" if "objective.kl_weight=0.5" in words else words[0]
    assert f"asked at every step, as {asking} looks at its next-token distributions" in done.stdout
    _, *steps, after = rows_of(tmp_path / "run")
    assert len(steps) == 2
    assert steps[1][f"train/{key}"] > 0
    assert all(
        math.isfinite(row[k]) for row in (*steps, after) for k in row if k.endswith(("loss", "chosen", "token"))
    )


def test_a_resumed_run_goes_on_with_the_beta_it_had(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "objective=epsilon_dpo", "objective.epsilon=0.3", "trainer.eval_every=1"]
    assert train(*options, f"output_dir={whole}").returncode == 0
    assert train(*options, f"output_dir={parts}", "trainer.max_steps=2").returncode == 0
    (state,) = parts.glob("checkpoints/*/state.json")
    rows = [row for row in rows_of(whole) if "train/loss" in row]
    assert json.loads(state.read_text())["running"]["beta"] == rows[1]["train/objective/beta"]
    done = train(f"resume={parts}", "trainer.max_steps=4", "tracking=none")
    assert done.returncode == 0, done.stderr
    steps = [[row for row in rows_of(run) if "train/loss" in row] for run in (whole, parts)]
    assert steps[0] == steps[1]
    assert len({row["train/objective/beta"] for row in rows}) > 1
    before = 0.01
    for row in rows:
        before /= 1 + 0.3 * row["train/beta/step"]
        assert row["train/objective/beta"] == pytest.approx(before)
    weights = [(run / "policy" / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]


# --- refused


LOOKS = "looks at the reference's next-token distributions, and reference="
REFUSED = {
    "none": (["objective=tdpo", "reference=none"], f"objective=tdpo {LOOKS}none has none that could be asked for"),
    "uniform": (["objective=tdpo1", "reference=uniform_token"], f"objective=tdpo1 {LOOKS}uniform_token"),
    "prior": (["objective=epsilon_dpo", "reference=prior"], f"objective=epsilon_dpo {LOOKS}prior"),
    "columns": (
        ["objective=dpo", "objective.kl_weight=0.1", "reference=columns", "reference.provenance=mine"],
        f"objective.kl_weight=0.1 {LOOKS}columns",
    ),
    "mixture": (
        ["objective=tdpo", "reference=mixture", "reference.parts=[{reference: initial}, {reference: prior}]"],
        f"{LOOKS}mixture has none that could be asked for; use reference=initial, adapter_base, other",
    ),
    "served": (
        ["objective=tdpo", "reference=served", "reference.url=http://host:8000/v1", "reference.model=big",
         "reference.tokenizer=lab:tiny"],
        f"{LOOKS}served",
    ),
    "strength": (
        ["objective=tdpo", "reference=initial", "reference.strength=0.5"],
        "probabilities to the power of reference.strength=0.5 are none; leave reference.strength out",
    ),
    "without": (["objective=simpo", "objective.kl_weight=0.1", "reference=none"], f"kl_weight=0.1 {LOOKS}none"),
    "reward model": (
        ["objective=reward_model", "objective.kl_weight=0.1"],
        "objective.kl_weight has no place in objective=reward_model: it has no log-probs",
    ),
    "responses": (["objective=sft", "objective.kl_weight=0.1"], "objective.kl_weight has no place in objective=sft"),
    "negative": (["objective=dpo", "objective.kl_weight=-1"], "objective.kl_weight=-1.0 must be at least 0 and"),
    "alpha": (["objective=tdpo", "objective.alpha=0"], "alpha=0.0 must be positive and finite; alpha=0 is"),
    "epsilon": (["objective=epsilon_dpo", "objective.epsilon=0"], "epsilon=0 is objective=dpo"),
    "epsilon of 1": (["objective=epsilon_dpo", "objective.epsilon=1"], "must lie strictly between 0 and 1"),
    "beta": (["objective=tdpo", "beta=0"], "beta=0.0 must be positive"),
    "in a mixture": (
        ["objective=mix", "objective.parts=[dpo, epsilon_dpo]", "objective.weights=[1, 1]"],
        "objective.parts: epsilon_dpo moves its own beta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_loaded(name):
    words, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        resolved(*words)
    assert message in str(error.value)


LIVE = {
    "auto": [],
    "initial": ["reference=initial"],
    "adapter_base": ["reference=adapter_base", "model.lora_rank=4"],
    "other": ["reference=other", "reference.path=lab:strong"],
    "interpolate": ["reference=interpolate", "reference.path=lab:strong", "reference.share=0.5"],
    "moving": ["reference=moving"],
}


@pytest.mark.parametrize("name", LIVE)
def test_references_that_are_models_are_asked_as_it_goes(name):
    assert resolved("objective=tdpo", *LIVE[name]).reference.options["cache"] == "off"
    assert resolved("objective=dpo", "objective.kl_weight=0.1", *LIVE[name]).reference.options["cache"] == "off"
    if name != "moving":
        assert resolved("objective=dpo", *LIVE[name]).reference.options["cache"] == "auto"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reference.path=lab:foreign"], "the tokens of reference=other are not the policy's"),
        (["reference.path=lab:tiny", 'reference.system_prompt="Be brief."'], "reads another text or has no model"),
    ],
)
def test_a_reference_that_reads_otherwise_is_refused_when_it_is_built(words, message, tmp_path):
    done = train(*SMALL, "objective=tdpo", "reference=other", *words, f"output_dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert message in done.stderr


def test_a_reference_with_another_head_is_refused_when_it_is_built():
    reference = LiveReference("other", model_of(1, vocab_size=VOCAB + 3), "id", "weights")
    with pytest.raises(ValueError, match="the head of reference=other has 64 rows where the policy's has 61"):
        check_next_tokens(reference, policy_of(model_of(0)), "objective=tdpo")
    with pytest.raises(ValueError, match="another text or has no model in memory"):
        check_next_tokens(tempered(other_of(None), strength=0.5), policy_of(model_of(0)), "objective=tdpo")


def test_a_table_of_next_tokens_there_is_none(tmp_path):
    done = train(*SMALL, "objective=tdpo", "stage=cache_reference", f"output_dir={tmp_path / 'run'}")
    assert "has no table to fill" in done.stderr


def test_an_argument_without_its_hook_is_refused():
    def silent_about_it(policy: PairLogps, divergences: PairDivergences) -> Preference:
        raise AssertionError

    with pytest.raises(TypeError, match="divergences cannot be made"):
        bind(silent_about_it)


def test_distributions_that_are_not_there_are_named():
    policy, inputs = probe_inputs()
    alone = ResponseLogps(policy.sums, policy.lengths, policy.num_bytes, policy.token_logps)
    for objective in (bind(tdpo), bind(dpo, kl_weight=0.1)):
        with pytest.raises(ValueError, match="the objective needs a reference that is a model in memory"):
            objective(alone, inputs)


def test_a_mixture_asks_for_what_its_parts_ask_for_once():
    parts = [bind(tdpo), bind(tdpo1), bind(dpo, kl_weight=0.5), bind(kto)]
    assert bind(mix, parts=parts, weights=[1.0] * 4, kl_weight=0.1).divergences == (FORWARD_KL, REVERSE_KL)
    assert bind(mix, parts=[bind(aot), bind(kto)], weights=[1.0, 1.0]).divergences == ()
