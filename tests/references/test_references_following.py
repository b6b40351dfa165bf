"""References that go after the policy: a burn-in and BEMA by hand and beside TRL's, the policy of each round's
beginning, runs that stop and go on."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from trl import BEMACallback

from dpo_ref.cli import resolve
from dpo_ref.data.packing import collate
from dpo_ref.models.logps import response_logps
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.references.interface import tempered
from dpo_ref.references.moving import bema, moving
from tests.support.command import composed, train
from tests.support.evaluate_command import measure
from tests.support.on_policy import SMALL as SAMPLED
from tests.support.reference_contexts import LAYOUT, TOKENIZER, context_for
from tests.support.tiny import policy_of, random_groups, tiny_model

BATCH = collate(random_groups(LAYOUT))
MADE, NOT_MADE = torch.tensor(True), torch.tensor(False)
OFFLINE = ["model.path=lab:tiny", "data.num_pairs=64", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
OFFLINE += ["trainer.batch_size=16", "tracking=none", "beta=0.1", "optim.lr=0.01"]
OFFLINE += ["optim.schedule=constant", "optim.warmup_ratio=0"]


@torch.no_grad()
def stepped(policy, step):
    """The policy a step further, every weight by another amount."""
    for index, weight in enumerate(policy.parameters()):
        weight.add_(0.003 * (index + 1) * math.sin(step + index))


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def gap(ours, theirs):
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


# --- by hand


@pytest.mark.parametrize(("burn_in", "moves"), [(0, [2, 4, 6, 8]), (3, [5, 7]), (8, [])])
def test_a_burn_in_is_counted_before_the_first_move(burn_in, moves, tmp_path):
    """Against the formula at the steps that a reader counts: `every` = 2 after the burn-in."""
    reference, policy = moving(context_for(tmp_path), share=0.25, every=2, burn_in=burn_in), tiny_model(seed=0)
    expected = weights_of(policy)
    for step in range(1, 9):
        stepped(policy, step)
        reference.update(policy, step, MADE)
        if step in moves:
            ours = weights_of(policy)
            expected = {name: 0.25 * ours[name] + 0.75 * old for name, old in expected.items()}
        assert gap(reference.state_dict(), expected) < 1e-6
    assert reference.identity != moving(context_for(tmp_path), share=0.25, every=2, burn_in=9).identity


def test_bema_by_hand(tmp_path):
    """Weights that are all 8 above their start, beta_1 = (1 + 3)^-1/2 and alpha_1 = (1 + 3)^-1: half of the 8 are in
    the average, and a quarter of them is added. At step 5 they are at 16: beta_5 = alpha_5^1/2 = 1/4, so the average
    is 4 + (16 - 4) / 4 = 7, and 1 is added."""
    context = context_for(tmp_path)
    reference = bema(context, ema_power=0.5, bias_power=1.0, lag=1, multiplier=3.0, every=1)
    policy, start = tiny_model(seed=0), weights_of(tiny_model(seed=0))

    def at(distance):
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                weight.copy_(start[name] + distance)

    at(8)
    reference.update(policy, 1, MADE)
    assert gap(reference.own_weights(), {name: weight + 6 for name, weight in start.items()}) < 1e-5
    at(16)
    reference.update(policy, 5, MADE)
    assert gap(reference.own_weights(), {name: weight + 8 for name, weight in start.items()}) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"every": 1},
        {"every": 2, "burn_in": 3},
        {"every": 3, "ema_power": 0.0, "bias_power": 1.0, "lag": 2},
        {"every": 1, "burn_in": 2, "multiplier": 0.5, "min_ema_multiplier": 0.4},
        {"every": 2, "bias_power": 8.0},
    ],
    ids=str,
)
def test_bema_is_trls(options, tmp_path):
    """TRL's callback beside it, asked for the same steps."""
    names = {"every": "update_freq", "burn_in": "update_after"}
    theirs = BEMACallback(**{"update_freq": 400} | {names.get(name, name): value for name, value in options.items()})
    policy, reference = tiny_model(seed=0), bema(context_for(tmp_path), **options)
    theirs.on_train_begin(None, None, None, policy)
    for step in range(1, 10):
        stepped(policy, step)
        theirs.on_step_end(None, SimpleNamespace(global_step=step), None, policy)
        reference.update(policy, step, MADE)
        assert gap(reference.own_weights(), weights_of(theirs.running_model)) < 1e-5
    assert gap(reference.own_weights(), weights_of(tiny_model(seed=0))) > 1e-2
    torch.testing.assert_close(
        reference.logps(BATCH).sums, response_logps(theirs.running_model, BATCH).sums, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("step", [3, 5])
def test_a_step_that_was_not_made_moves_nothing(step, tmp_path):
    """Neither the step at which theta_0 is taken nor one at which it moves."""
    reference, policy = bema(context_for(tmp_path), every=2, burn_in=3), tiny_model(seed=0)
    for each in range(1, step):
        stepped(policy, each)
        reference.update(policy, each, MADE)
    before = {name: weight.clone() for name, weight in reference.state_dict().items()}
    stepped(policy, step)
    reference.update(policy, step, NOT_MADE)
    assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())


def test_the_policy_of_the_rounds_beginning(tmp_path):
    """Whatever happens within a round, also where it is tempered."""
    reference, policy = tempered(moving(context_for(tmp_path), reset="round"), strength=0.5), tiny_model(seed=0)
    for beginning in (1, 4):
        reference.begin_round(policy)
        expected = response_logps(policy, BATCH).sums / 2
        for step in range(beginning, beginning + 3):
            stepped(policy, step)
            reference.update(policy, step, MADE)
            torch.testing.assert_close(reference.logps(BATCH).sums, expected, atol=1e-5, rtol=0)
    others = moving(context_for(tmp_path))  # which look at steps alone
    before = others.logps(BATCH).sums
    others.begin_round(policy)
    assert torch.equal(others.logps(BATCH).sums, before)
    assert not torch.equal(response_logps(policy, BATCH).sums, before)


# --- state


def test_of_an_adapter_the_trained_weights_alone_are_kept(tmp_path):
    """EMA, theta_0 and the reference have the adapter's; the base is the policy's."""
    context = context_for(tmp_path)
    AdapterOptions(lora_rank=2).put_on(context.policy.model)
    reference = bema(context, every=1)
    trained = {name for name, weight in context.policy.model.named_parameters() if weight.requires_grad}
    assert reference.state_dict().keys() == trained | {
        f"{kind}/{name}" for kind in ("ema", "start") for name in trained
    }
    shared = dict(context.policy.model.named_parameters())
    for name, weight in reference.model.named_parameters():
        assert (weight is shared[name]) == (name not in trained)


def test_a_state_makes_another_the_same_and_must_be_whole(tmp_path):
    context, policy = context_for(tmp_path), tiny_model(seed=0)
    reference = bema(context, every=1)
    other = bema(replace(context, policy=policy_of(tiny_model(seed=5), TOKENIZER)), every=1)
    for step in (1, 2):
        stepped(policy, step)
        reference.update(policy, step, MADE)
    state = {name: weight.clone() for name, weight in reference.state_dict().items()}
    other.load_state_dict(state)
    for each in (reference, other):
        stepped_policy = tiny_model(seed=0)
        stepped(stepped_policy, 3)
        each.update(stepped_policy, 3, MADE)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in reference.state_dict().items())
    without = {name: weight for name, weight in state.items() if not name.startswith("ema/")}
    with pytest.raises(ValueError, match="has no average of these weights"):
        other.load_state_dict(without)
    with pytest.raises(ValueError, match="has other weights than this one, or none"):
        other.load_state_dict({})


# --- runs


def rows(run, *left_out):
    """Metrics without what depends on the clock and the process."""
    clock = ("throughput", "memory", "_seconds", *left_out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not any(word in key for word in clock)} for row in lines]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["reference=bema", "reference.every=2"], marks=pytest.mark.slow),
        pytest.param(["reference=bema", "reference.every=1", "reference.burn_in=3"], marks=pytest.mark.slow),
        ["reference=bema", "reference.every=1", "reference.burn_in=2", "model.lora_rank=2", "optim.lr=0.05"],
        pytest.param(
            ["reference=moving", "reference.every=1", "reference.share=0.5", "reference.burn_in=2"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda options: " ".join(options[:3]),
)
def test_a_run_that_stops_goes_on_as_if_it_had_not(options, tmp_path):
    """Stopped before, at and after the burn-in; evaluation measures against the reference as it was at the end."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = train(*OFFLINE, *options, f"output_dir={whole}")
    assert done.returncode == 0, done.stderr
    assert "asked at every step and nothing is cached" in done.stdout
    assert train(*OFFLINE, *options, f"output_dir={parts}", "trainer.max_steps=1").returncode == 0
    for steps in (2, 3, 4):
        assert train(f"resume={parts}", f"trainer.max_steps={steps}").returncode == 0

    def losses(run):
        return [row["train/loss"] for row in rows(run) if "train/loss" in row]

    assert losses(parts) == losses(whole)
    states = [load_file(run / "checkpoints" / "step-00000004" / "reference.safetensors") for run in (whole, parts)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    measure(f"policy={whole}", "tracking=none", "generation.max_new_tokens=8")
    metrics = json.loads((whole / "evaluation" / "evaluation.json").read_text())["metrics"]
    assert metrics["rewards/margins"] == pytest.approx(rows(whole)[-1]["eval/rewards/margins"] / 0.1, abs=1e-3)
    assert metrics["kl/loss_reference"] != pytest.approx(metrics["kl/initial"], rel=1e-3)


KEPT = [*SAMPLED, "data.inner_epochs=2", "trainer.keep_checkpoints=null", "trainer.save_every=1"]
KEPT += ["optim.schedule=constant", "optim.warmup_ratio=0"]
ROUNDS = [*KEPT, "reference=moving", "reference.reset=round"]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """Three rounds of four steps, each against the policy that drew its answers."""
    folder = tmp_path_factory.mktemp("rounds") / "run"
    done = train(*ROUNDS, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "the policy at the beginning of each round, asked at every step" in done.stdout
    return folder


def test_every_round_begins_where_policy_and_reference_are_one(rounds, tmp_path):
    """There the loss of DPO is ln 2; against the initial policy it is so in the first round alone."""
    begins = {row["step"]: row["train/loss"] for row in rows(rounds) if "on_policy/round" in row}
    assert list(begins) == [1, 5, 9]
    assert list(begins.values()) == pytest.approx([math.log(2)] * 3, abs=1e-6)
    fixed = tmp_path / "fixed"
    done = train(*KEPT, f"output_dir={fixed}")
    assert done.returncode == 0, done.stderr
    theirs = {row["step"]: row["train/loss"] for row in rows(fixed) if "on_policy/round" in row}
    assert theirs[1] == begins[1]
    assert abs(theirs[5] - math.log(2)) > 1e-4


@pytest.mark.parametrize("step", [4, 6, 8])
def test_rounds_go_on_where_they_stopped(step, rounds, tmp_path):
    """Between two rounds, where the checkpoint still has the reference of the one before, and within one."""
    again = shutil.copytree(rounds, tmp_path / "run")
    for saved in (again / "checkpoints").iterdir():
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)
    (again / "policy").rename(tmp_path / "aside")
    done = train(f"resume={again}", "tracking=none")
    assert done.returncode == 0, done.stderr
    assert rows(again) == rows(rounds)
    names = [run / "checkpoints" / "step-00000012" / "reference.safetensors" for run in (rounds, again)]
    ours, theirs = map(load_file, names)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- what is refused at compose time


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reference.burn_in=-1"], "burn_in=-1 must be at least 0 optimiser steps"),
        (["reference.reset=epoch"], "reference.reset=epoch is none of round"),
        (
            ["reference.reset=round"],
            "at the beginning of each round, and data=lab has one; use data=on_policy, or leave",
        ),
        (
            ["reference.reset=round", "data=on_policy", "reference.every=3"],
            "every=3 has no effect with reference.reset=",
        ),
        (
            ["reference.reset=round", "data=on_policy", "reference.share=1"],
            "share=1.0 has no effect with reference.res",
        ),
        (
            ["reference=bema", "reference.cache=auto"],
            "reference=bema changes while the policy is trained, so its log-pr",
        ),
        (["reference=bema", "reference.every=0"], "every=0 must be at least 1 optimiser step"),
        (["reference=bema", "reference.burn_in=-2"], "burn_in=-2 must be at least 0"),
        (["reference=bema", "reference.lag=0"], "lag=0 must be at least 1 optimiser step"),
        (["reference=bema", "reference.ema_power=-0.5"], "ema_power=-0.5 must be a finite number of at least 0"),
        (["reference=bema", "reference.min_ema_multiplier=2"], r"min_ema_multiplier=2.0 must lie in \[0, 1\]"),
    ],
)
def test_refused_at_compose_time(words, message):
    cfg, choices = composed(*([] if "reference=bema" in words else ["reference=moving"]), *words)
    with pytest.raises(ValueError, match=message):
        resolve.resolve(cfg, choices)


def test_a_reset_goes_with_rounds():
    cfg, choices = composed("reference=moving", "reference.reset=round", "data=on_policy")
    assert resolve.resolve(cfg, choices).reference.options["reset"] == "round"
