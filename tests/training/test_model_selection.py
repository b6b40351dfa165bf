"""The best policy of a run: which it is, that it is kept and saved, that kills change nothing, and when a run ends."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dpo_ref.cli.evaluate import subject_of
from dpo_ref.evaluation.results import BEST_BY, METRICS, direction
from dpo_ref.files.digests import sealed
from dpo_ref.models import checkpoint
from dpo_ref.training.model_selection import Criterion, ModelSelection
from dpo_ref.training.run import TrainingRun
from tests.support.command import ROOT, resolved, train
from tests.support.quick import only
from tests.support.training_evaluation import SMALL, lines

# --- which it is


def selection(better, *values, patience=None):
    chosen = ModelSelection(Criterion("eval/x", better, patience))
    for index, value in enumerate(values, 1):
        chosen.consider(10 * index, {"eval/x": value}, [])
    return chosen


@pytest.mark.parametrize(
    ("better", "values", "step", "waited"),
    [
        ("higher", (0.5, 0.7, 0.6), 20, 1),
        ("lower", (0.5, 0.7, 0.6), 10, 2),
        ("higher", (0.7, 0.7, 0.7), 10, 2),  # of equal ones the earlier
        ("lower", (math.nan, 0.7, -math.inf), 20, 1),
    ],
)
def test_the_best_is(better, values, step, waited):
    chosen = selection(better, *values, patience=2)
    assert chosen.best.step == step
    assert chosen.waited == waited
    assert chosen.exhausted == (waited == 2)


def test_the_policy_before_training_and_other_evaluations_are_no_candidates():
    chosen = selection("lower", patience=1)
    chosen.consider(0, {"eval/x": -1.0}, [])
    chosen.consider(5, {"evaluation/x": -1.0}, [])
    assert chosen.best is None
    assert not chosen.exhausted


def test_what_a_checkpoint_keeps_is_json_and_of_one_metric():
    chosen = selection("lower", 0.5, 0.7)
    state = json.loads(json.dumps(chosen.state))
    again, other = selection("lower"), ModelSelection(Criterion("eval/y", "lower"))
    again.load_state(state)
    other.load_state(state)
    assert (again.best, again.waited) == (chosen.best, 1)
    assert (other.best, other.waited) == (None, 0)


def test_directions_are_those_of_the_table():
    for prefix, rows in BEST_BY.items():
        for row in rows:
            key = row.of(scorer="gold", baseline="initial")
            assert direction(f"{prefix}/{key}") == row.better != "none"
    assert {direction(f"evaluation/{row.key}") for row in METRICS if row.better == "none"} == {"none"}
    assert direction("evaluation/gold/mean_se") is None


REFUSED = {
    "loss": (["trainer.keep_best=loss"], "trainer.keep_best=loss is none that .* near it are eval/loss,"),
    "train": (["trainer.keep_best=train/loss"], "near it are eval/loss"),
    "misspelt": (["trainer.keep_best=evaluation/win_rate", "evaluation.every=5"], "evaluation/winrate/<baseline>"),
    "no direction": (["trainer.keep_best=evaluation/kl/initial", "evaluation.every=5"], "has no better direction"),
    "only at the ends": (["trainer.keep_best=eval/loss"], r"add trainer\.eval_every=<optimiser steps>"),
    "no answers": (["trainer.keep_best=evaluation/gold/mean"], r"add evaluation\.every=<optimiser steps>"),
    "patience alone": (["trainer.patience=2"], "trainer.patience=2 has no effect without a metric"),
    "patience 0": (["trainer.patience=0"], "trainer.patience=0 must be positive; null leaves it out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_remedy(case):
    overrides, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        resolved(*overrides)


LOSS = ["trainer.keep_best=eval/loss", "trainer.eval_every=2"]
NOT_STARTED = {
    "too late": (["trainer.keep_best=eval/loss", "trainer.eval_every=12"], "has no effect: the run has 12 steps"),
    "too patient": ([*LOSS, "trainer.patience=5"], "trainer.patience=5 has no effect: the run has 5 evaluations"),
    "nothing held out": ([*LOSS, "data.num_eval_pairs=0"], "trainer.keep_best=eval/loss: nothing is held out"),
    "another objective's": (
        ["trainer.keep_best=eval/rewards/accuracies", "trainer.eval_every=2", "objective=sft"],
        "trainer.keep_best=eval/rewards/accuracies is not measured in this run, whose objective is sft; near it are",
    ),
}


@pytest.mark.parametrize("case", NOT_STARTED)
def test_not_started_with_the_remedy(case, tmp_path):
    overrides, message = NOT_STARTED[case]
    options = [option for option in SMALL if option.partition("=")[0] != overrides[-1].partition("=")[0]]
    done = train(*options, *overrides, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert message in done.stderr
    assert "train/loss" not in done.stdout


# --- that it is kept: a run whose loss is best after 4 of 12 steps

WORSENING = [*SMALL, *LOSS, "optim.lr=0.02", "optim.schedule=constant", "optim.warmup_ratio=0", "trainer.save_every=3"]


def ended(folder, *overrides):
    done = train(*overrides, *([] if overrides[0].startswith("resume=") else [f"output_dir={folder}"]))
    assert done.returncode == 0, done.stderr
    return done.stdout


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def is_policy_of(folder, step):
    saved = load_file(folder / "checkpoints" / f"step-{step:08d}" / "policy.safetensors")
    policy = load_file(folder / "policy" / "model.safetensors")
    return all(torch.equal(saved[name], value) for name, value in policy.items() if name in saved)


def left(folder):
    """What a run leaves, without the clock: its numbers, its policy, its checkpoints' weights and states."""
    kept = [path.name for path in checkpoint.complete_in(folder / "checkpoints")]
    files = ("policy.safetensors", "optimizer.safetensors", "random.safetensors")
    weights = [(folder / "checkpoints" / name / file).read_bytes() for name in kept for file in files]
    selections = [checkpoint.read_state(folder / "checkpoints" / name)["selection"] for name in kept]
    policy = (folder / "policy" / "model.safetensors").read_bytes()
    return lines(folder), kept, weights, selections, policy, summary(folder)["best"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, ended(folder, *WORSENING)


def test_the_best_policy_is_the_one_that_is_saved(whole):
    folder, said = whole
    losses = {row["step"]: row["eval/loss"] for row in lines(folder, "eval/") if row["step"]}
    best = min(losses, key=losses.__getitem__)
    assert best == 4
    assert summary(folder)["best"] == {"metric": "eval/loss", "better": "lower", "value": losses[best], "step": best}
    assert (summary(folder)["status"], summary(folder)["steps"]) == ("completed", 12)
    assert [path.name for path in checkpoint.complete_in(folder / "checkpoints")] == [
        f"step-{best:08d}", "step-00000012"
    ]  # fmt: skip
    assert is_policy_of(folder, best)
    assert not is_policy_of(folder, 12)
    assert f"eval/loss {losses[best]:.4f} at step {best}: this is the policy; before training it was better" in said
    assert (
        f"| optimiser steps | {best}, where eval/loss was best in the run"
        in (folder / "policy" / "README.md").read_text()
    )
    run = subject_of(str(folder), None, None)[0].run
    assert (run.summary["steps"], run.checkpoint.name) == (best, f"step-{best:08d}")


class Killed(Exception):
    """Stands for the process's end."""


@pytest.mark.parametrize("step", only([4, 7, 12], 7))
def test_a_killed_run_goes_on_bit_for_bit(step, whole, tmp_path, monkeypatch):
    """Killed when the numbers of `step` are written: before its evaluation, between checkpoints, after the best."""
    folder, log = tmp_path / "run", TrainingRun._log

    def die(run, logged, seconds):
        if logged.step == step:
            raise Killed
        log(run, logged, seconds)

    monkeypatch.setattr(TrainingRun, "_log", die)
    assert train(*WORSENING, f"output_dir={folder}").returncode == 1
    monkeypatch.undo()
    ended(folder, f"resume={folder}", "tracking=none")
    assert left(folder) == left(whole[0])


def test_a_run_that_is_gone_on_with_still_knows_its_best(whole, tmp_path):
    """18 steps in one go, and 12 of which the last was thought to be the end."""
    folder = shutil.copytree(whole[0], tmp_path / "run")
    before = summary(folder)["best"]
    ended(folder, f"resume={folder}", "tracking=none", "trainer.epochs=1.5")
    assert summary(folder)["steps"] == 18
    after = summary(folder)["best"]
    losses = {row["step"]: row["eval/loss"] for row in lines(folder, "eval/") if row["step"]}
    assert after["step"] == min(losses, key=losses.__getitem__)
    assert after["value"] <= before["value"]
    assert is_policy_of(folder, after["step"])


def test_a_best_checkpoint_that_is_damaged_is_told_and_the_last_can_be_had(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    best = checkpoint.complete_in(folder / "checkpoints")[0]
    shutil.rmtree(folder / "policy")
    (best / "policy.safetensors").write_bytes(b"damaged")
    failed = train(f"resume={folder}", "tracking=none")
    assert failed.returncode == 1
    assert "which is the best, cannot be read" in failed.stderr
    assert "trainer.keep_best=null trainer.patience=null saves it" in failed.stderr
    ended(folder, f"resume={folder}", "tracking=none", "trainer.keep_best=null", "trainer.patience=null")
    assert is_policy_of(folder, 12)


# --- when a run ends


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    folder = tmp_path_factory.mktemp("impatient") / "run"
    return folder, ended(folder, *WORSENING, "trainer.patience=2")


def test_a_run_that_is_no_better_for_long_ends(whole, impatient):
    folder, said = impatient
    best = summary(whole[0])["best"]
    at = best["step"] + 4
    assert at < 12
    assert summary(folder)["best"] == best
    assert (summary(folder)["status"], summary(folder)["stopped_by"]) == ("stopped", "trainer.patience")
    assert summary(folder)["steps"] == at
    assert f"at step {at} of 12 (trainer.patience)" in said
    assert lines(folder) == [row for row in lines(whole[0]) if row["step"] <= at]
    assert is_policy_of(folder, best["step"])


def test_it_goes_on_only_where_that_is_said(whole, impatient, tmp_path):
    folder = shutil.copytree(impatient[0], tmp_path / "run")
    refused = train(f"resume={folder}", "tracking=none")
    assert refused.returncode == 1
    assert "for trainer.patience=2 evaluations; trainer.patience=null goes on all the same" in refused.stderr
    ended(folder, f"resume={folder}", "tracking=none", "trainer.patience=null")
    assert left(folder) == left(whole[0])


def test_a_run_killed_between_its_last_checkpoint_and_its_end_ends_there(impatient, tmp_path):
    folder = shutil.copytree(impatient[0], tmp_path / "run")
    content = json.loads((folder / "summary.json").read_text())
    shutil.rmtree(folder / "policy")
    record = {name: value for name, value in content.items() if name != "digest"} | {"status": "running"}
    (folder / "summary.json").write_text(json.dumps(sealed(record)))
    ended(folder, f"resume={folder}", "tracking=none")
    assert left(folder) == left(impatient[0])
    assert summary(folder)["status"] == "stopped"


def test_the_best_by_answers_is_kept_too(tmp_path):
    """By a metric of samples, with an adapter, whose checkpoints hold no whole model."""
    pytest.importorskip("peft")
    folder = tmp_path / "run"
    options = ["trainer.keep_best=evaluation/ended/share", "evaluation.every=2", "evaluation.num_prompts=8"]
    options += ["evaluation.max_new_tokens=12", "trainer.max_steps=6", "model.lora_rank=2", "optim.lr=0.03"]
    ended(folder, *SMALL, *options)
    shares = {row["step"]: row["evaluation/ended/share"] for row in lines(folder, "evaluation/") if row["step"]}
    best = summary(folder)["best"]
    assert (best["step"], best["value"]) == (max(shares, key=shares.__getitem__), max(shares.values()))
    saved = load_file(folder / "checkpoints" / f"step-{best['step']:08d}" / "policy.safetensors")
    adapter = load_file(folder / "policy" / "adapter" / "adapter_model.safetensors")
    for name, value in adapter.items():
        (ours,) = (w for key, w in saved.items() if name.replace(".weight", ".default.weight").endswith(key))
        assert torch.equal(value, ours), name


def test_the_page_names_all_metrics():
    page = (ROOT / "docs" / "training.md").read_text()
    for prefix, rows in BEST_BY.items():
        for row in rows:
            assert f"`{prefix}/{row.key.replace('{', '<').replace('}', '>')}`" in page
