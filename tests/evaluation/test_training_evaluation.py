"""Evaluation while training: it measures what evaluate.py measures, disturbs nothing, resumes, and can end a run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dpo_ref.evaluation.in_training import FOLDER
from dpo_ref.generation.records import read_generations
from dpo_ref.models import checkpoint
from dpo_ref.reports.plots import svg
from dpo_ref.reports.training_curve import evaluations, in_words, training_panels
from dpo_ref.training.run import TrainingRun
from tests.support.command import train
from tests.support.evaluate_command import evaluate, measure
from tests.support.metric_table import unlisted
from tests.support.training_evaluation import SMALL, lines

EVALUATED = ["evaluation.every=5", "evaluation.num_prompts=24", "evaluation.max_new_tokens=40"]
DEGENERATING = ["beta=0.0001", "optim.lr=0.1", "optim.warmup_ratio=0", "optim.schedule=constant"]


def run(folder, *overrides):
    done = train(*SMALL, f"output_dir={folder}", *overrides)
    assert done.returncode == 0, done.stderr
    return folder


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def same_weights(first, second):
    ours, theirs = (load_file(folder / "policy" / "model.safetensors") for folder in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain") / "run", "optim.lr=3e-4")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The same run with evaluations, one of which could have stopped it."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    return run(folder, "optim.lr=3e-4", *EVALUATED, "trainer.stop_when_degenerate=true")


def test_training_is_the_same_with_and_without_evaluations(plain, evaluated):
    assert same_weights(plain, evaluated)
    assert lines(plain, "train/") == lines(evaluated, "train/")
    assert lines(plain, "eval/") == lines(evaluated, "eval/")
    assert lines(plain, "evaluation/") == []


def test_a_healthy_run_is_evaluated_before_during_and_after_and_not_stopped(evaluated):
    rows = lines(evaluated, "evaluation/")
    assert [row["step"] for row in rows] == [0, 5, 10, 12]
    assert unlisted(key.removeprefix("evaluation/") for row in rows for key in row if key != "step") == set()
    assert (summary(evaluated)["status"], summary(evaluated)["degenerate"]) == ("completed", [])


def test_before_training_nothing_has_moved_and_the_initial_answers_are_other_draws(evaluated):
    before, after = (lines(evaluated, "evaluation/")[index] for index in (0, -1))
    unmoved = ["kl/initial", "kl/initial_k1", "eos/own_logratio", "eos/chosen_logratio", "logratios/chosen"]
    assert all(before[f"evaluation/{name}"] == pytest.approx(0, abs=1e-6) for name in unmoved)
    assert after["evaluation/kl/initial"] > 3 * after["evaluation/kl/initial_se"] > 0
    ours = read_generations(evaluated / FOLDER / "step_00000000.jsonl")
    theirs = read_generations(evaluated / FOLDER / "initial" / "generations.jsonl")
    assert [g.prompt for g in ours] == [g.prompt for g in theirs]
    assert [g.output for g in ours] != [g.output for g in theirs]


def test_the_last_numbers_are_those_of_evaluate(evaluated, tmp_path):
    """The same prompts, random numbers and options: every metric that both have agrees, from models loaded anew."""
    options = ["generation.samples_per_prompt=1", "generation.max_new_tokens=40", "tracking=none"]
    measure(f"policy={evaluated}", *options, f"output_dir={tmp_path}")
    theirs = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    ours = {name.removeprefix("evaluation/"): value for name, value in lines(evaluated, "evaluation/")[-1].items()}
    assert (ours.pop("step"), ours.pop("degenerate")) == (12, 0)
    assert set(ours) <= set(theirs)
    wanted = {"gold/mean", "winrate/initial", "kl/initial", "eos/own_logratio", "eos/chosen_logratio", "ended/share"}
    assert wanted <= set(ours)
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_the_clock_of_training_leaves_evaluations_out(evaluated):
    rows = [json.loads(line) for line in (evaluated / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: 8 / row["train/throughput/pairs_per_second"] for row in rows if "train/loss" in row}
    took = [row["evaluation/seconds"] for row in rows if "evaluation/seconds" in row]
    assert max(steps[6], steps[11]) < min(took)


class Killed(Exception):
    """Stands for the process's end."""


@pytest.mark.usefixtures("undrawn_pictures")
def test_a_killed_run_goes_on_bit_for_bit(evaluated, tmp_path, monkeypatch):
    """Killed in step 7, after the checkpoint of step 5, at which it was evaluated too."""
    folder, log = tmp_path / "run", TrainingRun._log

    def die_in_step_7(session, step, seconds):
        if step.step == 7:
            raise Killed
        log(session, step, seconds)

    monkeypatch.setattr(TrainingRun, "_log", die_in_step_7)
    options = ["optim.lr=3e-4", *EVALUATED, "trainer.stop_when_degenerate=true", "trainer.save_every=5"]
    assert train(*SMALL, f"output_dir={folder}", *options).returncode == 1
    monkeypatch.undo()
    initial = (folder / FOLDER / "initial" / "generations.jsonl").stat().st_mtime_ns
    done = train(f"resume={folder}", "tracking=none")
    assert done.returncode == 0, done.stderr
    assert lines(folder) == lines(evaluated)
    assert same_weights(folder, evaluated)
    assert (folder / FOLDER / "initial" / "generations.jsonl").stat().st_mtime_ns == initial  # drawn once


@pytest.fixture(scope="module")
def degenerating(tmp_path_factory):
    folder = tmp_path_factory.mktemp("degenerating") / "run"
    options = [*DEGENERATING, *EVALUATED, "trainer.stop_when_degenerate=true", "trainer.save_every=2"]
    done = train(*SMALL, f"output_dir={folder}", *options)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_degenerating_run_is_stopped_and_says_why(degenerating):
    folder, stdout = degenerating
    run_summary = summary(folder)
    assert (run_summary["status"], run_summary["steps"]) == ("stopped", 5)
    assert run_summary["degenerate"]
    assert all(reason in stdout for reason in run_summary["degenerate"])
    last = {name: value for name, value in lines(folder, "evaluation/")[-1].items() if name != "step"}
    assert "evaluation/eos/own_logratio" not in last  # none of its answers ends
    kept = {name for name in run_summary["metrics"] if name.startswith("evaluation/")} - {"evaluation/seconds"}
    assert kept == set(last)
    assert [path.name for path in checkpoint.complete_in(folder / "checkpoints")] == ["step-00000004", "step-00000005"]
    saved = load_file(folder / "checkpoints" / "step-00000005" / "policy.safetensors")
    policy = load_file(folder / "policy" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in policy.items() if name in saved)


@pytest.mark.usefixtures("undrawn_pictures")
def test_a_stopped_run_goes_on_only_where_that_is_said(degenerating, tmp_path):
    folder = shutil.copytree(degenerating[0], tmp_path / "run")
    refused = train(f"resume={folder}", "tracking=none")
    assert refused.returncode == 1
    assert "trainer.stop_when_degenerate=false goes on all the same" in refused.stderr
    done = train(f"resume={folder}", "tracking=none", "trainer.stop_when_degenerate=false")
    assert done.returncode == 0, done.stderr
    assert summary(folder)["status"] == "completed"
    assert lines(folder)[-1]["step"] == 12


def test_a_sweep_evaluates_a_stopped_job_too(degenerating, tmp_path):
    shutil.copytree(degenerating[0], tmp_path / "0_beta=0.0001")
    options = ["generation.samples_per_prompt=1", "generation.max_new_tokens=40", "tracking=none"]
    evaluate(f"sweep={tmp_path}", *options)
    evaluation = json.loads((tmp_path / "0_beta=0.0001" / "evaluation" / "evaluation.json").read_text())
    assert evaluation["degenerate"]
    assert "stopped" in (tmp_path / "sweep.csv").read_text()


@pytest.mark.usefixtures("undrawn_pictures")
def test_without_the_option_a_degenerate_run_is_told_and_goes_on(tmp_path):
    folder = run(tmp_path / "run", *DEGENERATING, *EVALUATED, "trainer.max_steps=6")
    assert summary(folder)["status"] == "completed"
    assert summary(folder)["degenerate"]


def test_curves_and_words_by_hand(tmp_path):
    """A step that was measured again after a resume counts once; what was not measured has no panel."""
    row = {"lengths/response": 10.0, "lengths/response_se": 1.0, "ended/share": 1.0, "kl/initial": 0.0}
    rows = [
        {"step": 0, **row, "degenerate": 0.0, "seconds": 2.0},
        {"step": 5, **row, "degenerate": 0.0, "seconds": 9.0},
        {"step": 5, **row, "lengths/response": 24.0, "kl/initial": 3.21, "degenerate": 1.0, "seconds": 2.4},
    ]
    lines = [json.dumps({k if k == "step" else f"evaluation/{k}": v for k, v in row.items()}) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(['{"step": 1, "train/loss": 0.5}', *lines]) + "\n")
    curve = evaluations(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in curve] == [0, 5]
    assert in_words(curve) == "length 10.0 -> 24.0 tokens, KL 3.21 nats; 2 evaluations in 4 s"
    panels = training_panels(curve)
    assert [panel.caption.split(".")[0] for panel in panels] == [
        "Length",
        "Answers that end",
        "KL to the initial policy",
    ]
    assert "tokens per answer" in svg(panels[0])
    scored = [
        row | {"gold/mean": 0.5, "winrate/initial": 0.6, "winrate/initial_low": 0.5, "winrate/initial_high": 0.7}
        for row in curve
    ]
    assert in_words(scored).startswith("win rate 60.0 % [50.0, 70.0], ")
    assert [panel.caption.split(".")[0] for panel in training_panels(scored)][:2] == [
        "Gold reward",
        "Win rate against the initial policy",
    ]
