"""Training, evaluation and a sweep as W&B has them: real offline runs, read back by wandb's own `leet inspect`."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from dpo_ref.cli import sweep as end_of_sweep
from dpo_ref.reports.policy import ANSWERS
from dpo_ref.reports.sweep import FRONTIER
from tests.support.command import train, typed
from tests.support.evaluate_command import evaluate

DATA = ["data.num_pairs=64", "data.num_eval_pairs=12", "data.num_test_prompts=10"]
OFFLINE = ["tracking.mode=offline", "tracking.tags=[pilot]"]
TRAIN = [*DATA, *OFFLINE, "model.path=lab:tiny", "trainer.batch_size=16", "beta=0.1"]
QUICK = [*OFFLINE, "generation.max_new_tokens=12", "generation.samples_per_prompt=2"]
SECRETS = {
    "WANDB_API_KEY": "wandbsecret" + "0" * 29,
    "HF_TOKEN": "hf_environmentsecret0123456789",
    "OPENAI_API_KEY": "sk-environment-secret-0123456789",
}


@contextmanager
def secrets():
    """An environment that holds credentials, and no W&B settings but these."""
    wandb.teardown()  # first: the address of what it ends would be put back into the environment afterwards
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        yield
        wandb.teardown()  # a finished run may still be in the memory of wandb's background process


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A multirun of one job, trained by itself, evaluated by itself and then with the sweep."""
    folder = tmp_path_factory.mktemp("tracked") / "my sweep"
    run = folder / "0_beta-0.1"
    with secrets():
        done = train(*TRAIN, f"output_dir={run}")
        assert done.returncode == 0, done.stderr
        evaluate(f"policy={run}", *QUICK)
        time.sleep(1)  # folders of offline runs are named by the second, and sorted by name below
        evaluate(f"sweep={folder}", *QUICK)
    return folder


@cache
def inspected(folder: Path, index: int, *options: str) -> str:
    """What `wandb leet inspect` says about an offline run below a folder."""
    run = sorted(folder.glob("wandb/offline-run-*"))[index]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(run)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def records(folder: Path, index: int, kind: str) -> list[dict]:
    rows = map(json.loads, inspected(folder, index).splitlines())
    return [row[kind] for row in rows if row.get("type") == kind]


def artifacts(folder: Path, index: int) -> dict[str, dict]:
    return {artifact["type"]: artifact for artifact in records(folder, index, "artifact")}


def training_id(sweep: Path) -> str:
    return (sweep / "0_beta-0.1" / "wandb_id_train").read_text()


def test_an_evaluation_is_flat_numbers_in_the_group_of_its_training(sweep):
    run = sweep / "0_beta-0.1"
    wandb_run = json.loads(inspected(run / "evaluation", 0, "--summary"))
    metrics = json.loads((run / "evaluation" / "evaluation.json").read_text())["metrics"]
    for name in ("gold/mean", "gold/mean_se", "winrate/initial", "winrate/initial_low", "kl/initial", "kl/initial_se"):
        assert wandb_run["summary"][f"evaluation/{name}"] == pytest.approx(metrics[name], rel=1e-12)
    assert wandb_run["summary"]["evaluation/degenerate"] is True
    assert "answers end" in wandb_run["summary"]["evaluation/degenerate_because"]
    assert (wandb_run["state"], wandb_run["exit_code"], wandb_run["name"]) == ("finished", 0, "evaluate 0_beta-0.1")
    assert wandb_run["config"]["training"]["id"] == wandb_run["summary"]["training_run"] == training_id(sweep)
    assert wandb_run["config"]["data"]["num_pairs"] == 64  # the run's data, not the default

    (run_record,) = records(run / "evaluation", 0, "run")
    (trained,) = records(run, 0, "run")
    assert (run_record["job_type"], trained["job_type"]) == ("evaluate", "train")
    named = {name: wandb_run["config"]["training"][name] for name in ("objective", "reference", "beta", "seed")}
    assert named == {"objective": "dpo", "reference": "initial", "beta": 0.1, "seed": 0}
    assert trained["config"]["update"]["training"] == named  # so that both can be grouped by the same keys
    assert run_record["run_group"] == trained["run_group"] == "0_beta-0.1"


def test_numbers_are_drawn_over_the_step_of_training(sweep):
    run = sweep / "0_beta-0.1"
    drawn = {row.get("glob_name"): row.get("step_metric") for row in records(run / "evaluation", 0, "metric")}
    assert {drawn[name] for name in ("train/*", "eval/*", "evaluation/*", "*")} == {"step"}
    rows = [row["item"] for row in records(run / "evaluation", 0, "history")]
    assert [row["step"] for row in rows if "evaluation/gold/mean" in row] == [4]
    losses = [row["item"] for row in records(run, 0, "history") if "train/loss" in row["item"]]
    assert [row["step"] for row in losses] == [1, 2, 3, 4]


def test_answers_stand_beside_the_baselines(sweep):
    folder = sweep / "0_beta-0.1" / "evaluation"
    (path,) = sorted(folder.glob("wandb/offline-run-*"))[0].glob("files/media/table/generations_*.json")
    table = json.loads(path.read_text())
    answers = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert tuple(table["columns"]) == ANSWERS
    assert [row[1] for row in table["data"]] == [answer["output"] for answer in answers]
    assert all(isinstance(row[-1], float | int) and isinstance(row[-2], str) for row in table["data"])
    rows = [row["item"] for row in records(folder, 0, "history")]
    (tokens,) = (row for row in rows if "evaluation/tokens._type" in row)
    assert sum(tokens["evaluation/tokens.values"]) == 20
    pictures = {name for row in rows for name, value in row.items() if value == "image-file"}
    assert pictures == {"report._type", "diagnostics._type"}


def test_artifacts_are_small_files_paths_and_digests(sweep):
    run = sweep / "0_beta-0.1"
    evaluated, trained = artifacts(run / "evaluation", 0), artifacts(run, 0)
    assert {kind: artifact["name"].rpartition("-")[0] for kind, artifact in (evaluated | trained).items()} == {
        "generations": "generations", "evaluation": "evaluation", "model": "policy", "reference-table": "reference",
    }  # fmt: skip
    assert evaluated["generations"]["name"].endswith(training_id(sweep))
    weights = {entry["path"]: entry for entry in trained["model"]["manifest"]["contents"]}
    assert weights["model.safetensors"]["ref"].startswith("file://")
    assert "local_path" not in weights["model.safetensors"]  # nothing of it is uploaded
    identities = json.loads((run / "summary.json").read_text())["identities"]
    links = {entry["path"]: entry["ref"] for entry in trained["reference-table"]["manifest"]["contents"]}
    assert links["identity"] == f"dpo-ref://reference/{identities['loss_reference']}"
    assert links["values"].endswith(identities["loss_reference_values"])
    (answers,) = evaluated["generations"]["manifest"]["contents"]
    copy = Path(answers["local_path"])
    assert (run / "evaluation" / "wandb").resolve() in copy.parents
    assert copy.read_bytes() == (run / "evaluation" / "generations.jsonl").read_bytes()


def test_weights_are_uploaded_only_when_asked_for(sweep, tmp_path):
    run = shutil.copytree(sweep / "0_beta-0.1", tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    with secrets():
        done = train(f"resume={run}", *OFFLINE, "tracking.upload_weights=true")
        assert done.returncode == 0, done.stderr
    entries = {entry["path"]: entry for entry in artifacts(run, 0)["model"]["manifest"]["contents"]}
    assert entries["model.safetensors"]["local_path"] == str((run / "policy" / "model.safetensors").resolve())
    assert "ref" not in entries["model.safetensors"]


def test_a_sweep_is_a_table_and_a_picture_of_reward_against_kl(sweep):
    wandb_run = json.loads(inspected(sweep, 0, "--summary"))
    assert (wandb_run["summary"]["num_jobs"], wandb_run["summary"]["num_evaluated"]) == (1, 1)
    (path,) = sweep.glob("wandb/offline-run-*/files/media/table/frontier_table_*.json")
    table = json.loads(path.read_text())
    metrics = json.loads((sweep / "0_beta-0.1" / "evaluation" / "evaluation.json").read_text())["metrics"]
    row = dict(zip(table["columns"], *table["data"], strict=True))
    assert tuple(row) == FRONTIER
    assert (row["kl"], row["score"], row["beta"]) == (metrics["kl/initial"], metrics["gold/mean"], 0.1)
    assert (row["degenerate"], row["frontier"]) == (True, False)  # a broken policy is on no frontier
    assert row["training_run"] == training_id(sweep)
    (record,) = records(sweep, 0, "run")
    assert (record["job_type"], record["run_group"]) == ("sweep", "my sweep")
    panels = [row["update"].get("_wandb.visualize.frontier") for row in records(sweep, 0, "config")]
    assert [panel["panel_config"]["fieldSettings"] for panel in panels if panel] == [{"x": "kl", "y": "score"}]


def test_no_file_holds_a_credential(sweep):
    files = [path for path in sweep.rglob("*") if path.is_file()]
    tracked = [path for path in files if "wandb" in path.parts]
    assert len(tracked) > 20
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_a_sweep_is_evaluated_where_its_runs_are_tracked(tmp_path, monkeypatch):
    ended = SimpleNamespace(run=lambda command, check: SimpleNamespace(returncode=0))
    monkeypatch.setattr(end_of_sweep, "subprocess", ended)
    words = [
        "tracking.mode=offline",
        "tracking.project=mine",
        "tracking.timeout=20,30",
        "trainer.max_steps=1",
        "model.path=lab:tiny",
        *DATA,
    ]
    with secrets():
        done = typed("train.py", "-m", *words, f"output_dir={tmp_path / 'sweep'}")
    assert done.returncode == 0, done.stderr
    told = f"evaluate.py sweep={tmp_path / 'sweep'} tracking=wandb tracking.mode=offline tracking.project=mine\n"
    assert told in done.stdout
