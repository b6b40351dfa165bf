"""The records of evaluations and of on-policy rounds, torn, emptied or with a flipped byte."""

import json
import shutil

import pytest

from dpo_ref.cli.bandit import print_sweep
from dpo_ref.evaluation.judging.judge import read_judgments
from dpo_ref.files import digests
from dpo_ref.files.digests import Damaged
from dpo_ref.tracking.weights_and_biases import known_id
from tests.faults.test_caches import emptied, flipped, halved, same_weights
from tests.support.command import train, typed
from tests.support.evaluate_command import QUICK, TRAIN, measure
from tests.support.on_policy import SMALL
from tests.support.quick import only


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    run = tmp_path_factory.mktemp("evaluated") / "run"
    assert train(*TRAIN, "trainer.max_steps=2", f"output_dir={run}").returncode == 0
    measure(f"policy={run}", *QUICK)
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "evaluation").iterdir() if path.is_file()}


FILES = ["generations.jsonl", "generations.key.json", "measurements.json", "diagnostics.json", "token_examples.json"]
DAMAGES = [(name, damage) for name in FILES for damage in (halved, flipped)]
DAMAGES += [("scores.json", emptied), ("evaluation.json", halved)]


@pytest.mark.parametrize(
    ("name", "damage"), only(DAMAGES, *DAMAGES[::2], DAMAGES[-1]), ids=lambda value: getattr(value, "__name__", value)
)
def test_a_damaged_record_is_made_again(evaluated, name, damage, tmp_path, capsys, tell):
    run = shutil.copytree(evaluated, tmp_path / "run")
    before = contents(run)
    path = run / "evaluation" / name
    damage(path)
    measure(f"policy={run}", *QUICK)
    assert contents(run) == before
    lines = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    always = name in ("scores.json", "evaluation.json")  # are made each time
    assert len(lines) == (0 if always else 1)
    assert always or str(path) in lines[0]
    tell(
        "used silently",
        f"`{name}` of an evaluation {damage.__name__}, then stage=all",
        seen=" ".join(lines) or "–",
        survived="made again, byte for byte the same",
    )


def lost_row(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def test_a_row_that_is_missing_is_seen(evaluated, tmp_path, capsys):
    run = shutil.copytree(evaluated, tmp_path / "run")
    before = contents(run)
    lost_row(run / "evaluation" / "generations.jsonl")
    measure(f"policy={run}", *QUICK)
    assert "19 rows of 20: all are sampled again" in capsys.readouterr().out
    assert contents(run) == before


READ = [
    ("evaluation.json", halved, "report", "stage=all"),
    ("evaluation.json", flipped, "report", "stage=all"),
    ("scores.json", flipped, "report", "stage=score"),
    ("generations.jsonl", flipped, "score", "stage=generate"),
    ("measurements.json", halved, "score", "stage=all"),
    ("diagnostics.json", emptied, "report", "stage=diagnose"),
]


@pytest.mark.parametrize(("name", "damage", "stage", "remedy"), READ, ids=lambda v: getattr(v, "__name__", v))
def test_a_stage_that_only_reads_tells(evaluated, name, damage, stage, remedy, tmp_path, tell):
    run = shutil.copytree(evaluated, tmp_path / "run")
    path = run / "evaluation" / name
    damage(path)
    done = typed("evaluate.py", f"policy={run}", f"stage={stage}", *QUICK)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert str(path) in line
    assert "is damaged" in line
    assert remedy in line
    tell("used silently", f"`{name}` {damage.__name__}, then stage={stage}", seen=line, survived="nothing was written")


def test_a_damaged_diagnosis_is_made_again_by_its_stage(evaluated, tmp_path, capsys):
    run = shutil.copytree(evaluated, tmp_path / "run")
    before = contents(run)
    halved(run / "evaluation" / "diagnostics.json")
    measure(f"policy={run}", "stage=diagnose", *QUICK)
    assert "diagnostics.json is damaged" in capsys.readouterr().out
    assert contents(run) == before


def test_a_record_without_a_digest_is_read_and_told_of(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_WITHOUT_DIGEST", [])  # told once a process, and this one is copied
    run = shutil.copytree(evaluated, tmp_path / "run")
    for path in (run / "evaluation").glob("*.json"):
        content = json.loads(path.read_text())
        del content["digest"]
        path.write_text(json.dumps(content))
    done = typed("evaluate.py", f"policy={run}", "stage=generate", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is of an earlier version, which wrote no digests") == 1


# --- the rounds of an on-policy run


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    run = tmp_path_factory.mktemp("rounds") / "run"
    options = ["objective=ppo_clip", "data.samples_per_prompt=2", "data.rounds=2", "trainer.save_every=1"]
    options += ["trainer.keep_checkpoints=null"]
    done = train(*SMALL, *options, f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    return run


FILES_OF_ROUNDS = ["generations.jsonl", "record.json", "old/*.safetensors"]


def resumed(rounds, tmp_path, damaged, steps):
    run = shutil.copytree(rounds, tmp_path / "run")
    (path,) = (run / "rounds" / "0002").glob(damaged)
    flipped(path)
    for checkpoint in (run / "checkpoints").glob("*"):
        if int(checkpoint.name[-8:]) > steps:
            shutil.rmtree(checkpoint)
    return run, path, train(f"resume={run}", "tracking=none")


@pytest.mark.parametrize("name", FILES_OF_ROUNDS)
def test_a_damaged_round_is_sampled_again(rounds, name, tmp_path, tell):
    run, path, done = resumed(rounds, tmp_path, name, rounds_begin_at(rounds))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "is damaged" in line]
    assert str(path) in line
    assert same_weights(run, rounds)
    tell(
        "used silently",
        f"`{path.name if 'old' not in name else 'old log-probs'}` of a round that is about to begin, flipped",
        seen=line,
        survived="the round is sampled again; equal final weights",
    )


@pytest.mark.parametrize("name", FILES_OF_ROUNDS)
def test_a_damaged_round_that_was_trained_on_is_told(rounds, name, tmp_path, tell):
    _, path, done = resumed(rounds, tmp_path, name, rounds_begin_at(rounds) + 1)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert str(path) in line
    assert "put the folder back, or start a new run" in line
    tell(
        "used silently",
        f"`{path.name if 'old' not in name else 'old log-probs'}` of a round in the middle of it, flipped",
        seen=line,
        survived="the checkpoints",
    )


def rounds_begin_at(run):
    """The step at which round 2 begins."""
    return json.loads((run / "summary.json").read_text())["steps"] // 2


# --- other records


def test_a_torn_summary_of_a_bandit_is_left_out_of_its_sweep(tmp_path, capsys, tell):
    (tmp_path / "0_a").mkdir()
    path = tmp_path / "0_a" / "summary.json"
    path.write_text('{"choices": {"ban')
    assert not print_sweep(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert str(path) in line
    tell("untidy", "a job's summary torn, when a sweep of bandits ends", seen=line, survived="the table of the others")


def test_torn_judgments_are_told(tmp_path):
    (tmp_path / "judgments.jsonl").write_text('{"prompt": [{"role"')
    with pytest.raises(Damaged, match=r"judgments.jsonl row 1 is damaged: .*; judge again with stage=judge"):
        read_judgments(tmp_path / "judgments.jsonl")


def test_a_damaged_id_of_a_tracked_run_is_none(tmp_path):
    (tmp_path / "wandb_id_train").write_bytes(b"abc\xff12")
    assert known_id(tmp_path, "train") is None
