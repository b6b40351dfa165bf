"""`python train.py` as a user runs it: killed and resumed, interrupted, swept, and given bad input."""

import json
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpo_ref.cli import sweep as end_of_sweep
from dpo_ref.cli import train as cli
from tests.support.checkpoints import changed_state, lines
from tests.support.command import started, train, typed
from tests.support.evaluate_command import evaluate
from tests.support.pictures import undrawn
from tests.support.quick import only

SMALL = ["model.path=lab:tiny", "data.num_pairs=96", "data.num_eval_pairs=16", "data.num_test_prompts=8"]
SMALL += ["trainer.batch_size=8", "tracking=none"]


def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    done = train(*SMALL, f"output_dir={run}", "beta=0.3", "trainer.save_every=3")
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize(("tracking", "answered"), [(["tracking=none"], 0), (["tracking.mode=offline"], 8)])
def test_answers_are_sampled_where_something_keeps_them(tracking, answered, tmp_path, monkeypatch):
    """Those at the end of a run, which are nothing but a table of the tracker."""
    asked = []
    sample = cli.generate
    monkeypatch.setattr(cli, "generate", lambda *args, **options: asked.extend(args[2]) or sample(*args, **options))
    words = [word for word in SMALL if word != "tracking=none"]
    done = train(*words, *tracking, "trainer.max_steps=1", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert len(asked) == answered


def stopped(run, signum, *overrides):
    """Start a run, wait for its fourth step, send it a signal; the exit code."""
    overrides = [*SMALL, f"output_dir={run}", "beta=0.3", "trainer.save_every=3", *overrides]
    process = started(run.parent, "train.py", *overrides)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 5:
            break
        time.sleep(0.01)
    os.kill(process.pid, signum)
    process.join(timeout=120)
    return process.exitcode, (run.parent / "out").read_text()


def same_weights(run, other):
    ours, theirs = (load_file(folder / "policy" / "model.safetensors") for folder in (run, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_leaves_what_it_promises(whole):
    assert {path.name for path in whole.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "policy",
    }  # fmt: skip
    rows = lines(whole)
    assert [row["step"] for row in rows] == [0, *range(1, 13), 12]
    assert rows[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert rows[1]["train/loss"] == pytest.approx(0.693147, abs=1e-6)
    record = summary(whole)
    assert (record["status"], record["steps"], record["beta"], record["reference"]) == (
        "completed",
        12,
        0.3,
        "initial",
    )
    assert record["data"] == {"groups": 112}
    assert record["identities"]["loss_reference_weights"] == record["identities"]["initial_policy"]
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[1])
    tokens_per_step = 8 * first["train/throughput/tokens_per_second"] / first["train/throughput/pairs_per_second"]
    assert first["train/throughput/pack_fill"] == pytest.approx(tokens_per_step / 8192)  # eight pairs in one pack
    assert list(whole.glob("**/*.bin")) == list(whole.glob("**/*.pt")) == []


@pytest.mark.parametrize("signum", only([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], signal.SIGKILL))
def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, signum):
    run = tmp_path / "run"
    code, output = stopped(run, signum)
    assert code != 0
    if signum != signal.SIGKILL:
        assert summary(run)["status"] == "interrupted"
        assert f"python train.py resume={run}" in output
    again = train(f"resume={run}", "tracking=none")
    assert again.returncode == 0, again.stderr
    assert lines(run) == lines(whole)
    assert same_weights(run, whole)
    assert summary(run)["status"] == "completed"


def test_a_non_finite_loss_stops_the_run_and_saves_it(tmp_path):
    """Weights of 1e38 after the first update make the second loss nan: its update is left out, its pairs are named."""
    run = tmp_path / "run"
    wild = ["optim.lr=1e38", "optim.warmup_ratio=0", "optim.schedule=constant"]
    done = train(*SMALL, *wild, f"output_dir={run}", "data.num_eval_pairs=0")
    assert done.returncode == 1
    assert "step 2: loss nan" in done.stderr
    named = json.loads((run / "non_finite_step_2.json").read_text())
    assert len(named["group_ids"]) == 8
    assert summary(run)["status"] == "failed"
    assert [path.name for path in run.glob("checkpoints/*")] == ["step-00000001"]


def test_resume_refuses_another_run(whole, tmp_path):
    refused = train(f"resume={whole}", "reference=none")
    assert refused.returncode == 1
    assert "reference=none cannot change when a run goes on" in refused.stderr
    assert "is not a run's folder" in train(f"resume={tmp_path}").stderr
    taken = train(*SMALL, f"output_dir={whole}")
    assert f"already holds a run: resume={whole} goes on with it" in taken.stderr


def test_a_run_of_an_older_version_is_refused_with_the_commit_that_reads_it(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("dpo_ref.references.policies.", "dpo_ref.references.frozen."))
    commit, had = summary(run)["git"]["commit"], "dpo_ref.references.frozen.auto"
    offers = f"has reference._target_='{had}', and conf/reference/auto.yaml offers dpo_ref.references.policies.auto"
    message = f"{run / 'config.yaml'} {offers}: nothing of it was called. If another version of dpo_ref made the run"
    refused = train(f"resume={run}").stderr
    assert f"resume={run}: {message}, git checkout {commit} reads it" in refused
    with pytest.raises(ValueError, match=re.escape(f"policy={run}: {message}")):
        evaluate(f"policy={run}", "tracking=none")


def test_resume_refuses_another_reference(whole, tmp_path):
    """The reference behind the same words has changed: the run's own record of its identity says so."""
    run = shutil.copytree(whole, tmp_path / "run")
    changed_state(run, reference="another")
    refused = train(f"resume={run}", "trainer.epochs=2", "tracking=none")
    assert refused.returncode == 1
    assert "reference was another and is" in refused.stderr


def test_a_longer_resume_equals_a_longer_run(whole, tmp_path):
    flat = ["optim.schedule=constant", "optim.warmup_ratio=0"]
    short, long = tmp_path / "short", tmp_path / "long"
    for run, steps in ((short, 5), (long, 9)):
        assert train(*SMALL, *flat, f"output_dir={run}", f"trainer.max_steps={steps}").returncode == 0
    assert train(f"resume={short}", "trainer.max_steps=9").returncode == 0
    assert same_weights(short, long)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Trained and evaluated as by `train.py -m`, the evaluation without pictures and without importing all again."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    with undrawn(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_of_sweep, "subprocess", SimpleNamespace(run=lambda command, check: typed(*command[1:])))
        done = typed("train.py", "-m", *SMALL, f"output_dir={folder}", "beta=3,-1,0.1", "trainer.max_steps=3")
    return folder, done.stderr


def test_a_sweep_survives_a_failing_job(sweep):
    folder, errors = sweep
    jobs = [summary(path) for path in sorted(folder.iterdir()) if path.is_dir() and path.name != "panels"]
    assert [job["status"] for job in jobs] == ["completed", "failed", "completed"], errors
    assert "beta=-1.0 must be positive" in jobs[1]["error"]
    assert len((folder / "sweep.csv").read_text().splitlines()) == 1 + 3  # evaluated at its end


def test_a_later_job_equals_the_same_job_alone(sweep, tmp_path):
    """After another that trained and one that failed."""
    folder, alone = sweep[0], tmp_path / "alone"
    train(*SMALL, f"output_dir={alone}", "beta=0.1", "trainer.max_steps=3")
    later = folder / "2_beta-0.1"
    assert lines(later) == lines(alone)
    assert same_weights(later, alone)


BAD = {
    "no such folder": (["model.path=./nowhere"], "model.path=./nowhere does not exist"),
    "no model in it": (["model.path=tests"], "model.path=tests is not a model folder: it has no config.json"),
    "no such lab model": (["model.path=lab:huge"], "lab:huge is no model of the lab"),
    "no such file": (["data=jsonl", "data.path=nowhere.jsonl"], "data.path=nowhere.jsonl does not exist"),
    "everything too long": (["data.max_length=3"], "every row was dropped; see data.max_length"),
    "output folder": (["output_dir=LICENSE/run"], "cannot be written"),
    "dtype": (["model.dtype=bfloat16"], "model.dtype=bfloat16 needs a CUDA device"),
    "offload": (["model.gradient_checkpointing=offload"], "use model.gradient_checkpointing=full"),
    "attention": (["model.attention=flash_attn"], "pip install -r requirements-flash.txt"),
    "nothing to cache": (["stage=cache_reference", "reference=none"], "reference=none has no table to fill"),
    "no pairs": (["data=lab_sft", "data.num_examples=20"], "objective=dpo compares responses"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_message(case, tmp_path):
    overrides, message = BAD[case]
    base = ["tracking=none", f"output_dir={tmp_path / 'run'}", "model.path=lab:tiny", "data.num_pairs=20"]
    keys = {o.partition("=")[0] for o in overrides} | ({"data.num_pairs"} if "data=" in str(overrides) else set())
    done = train(*(o for o in base if o.partition("=")[0] not in keys), *overrides)
    assert done.returncode == 1
    assert message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_of_reward_models_ends_with_what_they_are_for(tmp_path):
    done = typed(
        "train.py", "-m", *SMALL, "objective=reward_model", "seed=0,1", "trainer.max_steps=2", f"output_dir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert "not evaluated, as reward models write no answers" in done.stdout
    assert f"scorer=reward_model scorer.path={tmp_path}/<job>/policy" in done.stdout
