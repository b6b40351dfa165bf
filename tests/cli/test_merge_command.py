"""`evaluate.py stage=merge` as a user types it: runs, checkpoints and paths between policies, on tiny models."""

import csv
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_ref.cli.evaluate import run_evaluation, subject_of
from dpo_ref.files.digests import damage_in
from dpo_ref.lab.models import locate
from dpo_ref.models.checkpoint import complete_in
from tests.support.command import ROOT, composed, composes, forked, train
from tests.support.evaluate_command import PLAIN, TRAIN, evaluate, measure, numbers
from tests.support.kills import FileOperations


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    steps = ["trainer.max_steps=4", "trainer.save_every=2", "trainer.keep_checkpoints=null", "optim.lr=1e-2"]
    assert train(*TRAIN, *steps, f"output_dir={folder}", "beta=0.1").returncode == 0
    return folder


@pytest.fixture(scope="module")
def path(run):
    folder = run.parent / "path"
    merge(f"policies=[initial,{run}]", "shares=[0,0.5,1]", f"output_dir={folder}")
    return folder


def merge(*overrides):
    """Composed and run in this process."""
    words = ["stage=merge", *overrides]
    cfg, choices = composed(*words, kind="evaluate")
    run_evaluation(cfg, choices, words)


def weights(folder):
    return load_file(folder / "model.safetensors")


def record(folder):
    return json.loads((folder / "average.json").read_text())


def test_checkpoints_are_averaged_with_equal_weights(run, tmp_path):
    saved = [load_file(folder / "policy.safetensors") for folder in complete_in(run / "checkpoints")]
    assert len(saved) == 2
    merge(f"policies={run}/checkpoints", f"output_dir={tmp_path}/soup")
    average = weights(tmp_path / "soup")
    for name, value in average.items():
        mean = torch.stack([tensors[name].double() for tensors in saved]).mean(0)
        assert torch.equal(value, mean.float())
    assert not torch.equal(saved[0]["model.norm.weight"], saved[1]["model.norm.weight"])
    merge(f"policies='{run}/checkpoints/step-*'", f"output_dir={tmp_path}/pattern")
    assert (tmp_path / "pattern" / "model.safetensors").read_bytes() == (
        tmp_path / "soup" / "model.safetensors"
    ).read_bytes()


def test_the_ends_of_a_path_are_its_policies_to_the_byte(run, path):
    assert (path / "share-1" / "model.safetensors").read_bytes() == (run / "policy/model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(locate("lab:tiny"), dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(path / "share-0").state_dict()
    assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())
    files = {file.name for file in (run / "policy").iterdir()} | {"average.json"}
    assert {file.name for file in (path / "share-0.5").iterdir()} == files
    assert damage_in(path / "share-0.5") is None


def test_an_average_says_what_it_is_of(run, path):
    described = record(path / "share-0.5")
    assert [(p["name"], p["weight"]) for p in described["policies"]] == [("initial", 0.5), (str(run), 0.5)]
    assert described["share"] == 0.5
    assert described["run"] == str(run)
    assert described["policies"][1]["weights_digest"] == record(path / "share-1")["weights_digest"]
    assert described["versions"]["torch"] == torch.__version__
    card = (path / "share-0.5" / "README.md").read_text()
    assert "| run | 0.5 | `" in card
    assert str(run.parent) not in card


def test_a_path_is_evaluated_as_a_sweep_over_shares(path):
    evaluate(f"sweep={path}", *PLAIN)
    rows = list(csv.DictReader((path / "frontier.csv").read_text().splitlines()))
    assert [(row["series"], row["share"], row["step"]) for row in rows] == [
        ("dpo, beta 0.1", "0.0", ""),
        ("dpo, beta 0.1", "0.5", ""),
        ("dpo, beta 0.1", "1.0", ""),
    ]
    distances = [numbers(path / f"share-{share}" / "evaluation")["metrics"]["kl/initial"] for share in (0, 0.5, 1)]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[0] < distances[1] < distances[2]
    page = (path / "report.html").read_text()
    assert "share of run (0: the initial policy)" in page
    assert "the numbers at the points are shares" in page
    assert "β" not in page


def test_the_end_of_a_path_is_measured_as_its_run(run, path):
    measure(f"policy={path}/share-1", *PLAIN)
    measure(f"policy={run}", *PLAIN)
    ours, theirs = (numbers(folder / "evaluation") for folder in (path / "share-1", run))
    assert ours["metrics"] == pytest.approx(theirs["metrics"], nan_ok=True)
    assert (ours["name"], ours["beta"], ours["baseline"]) == ("path share-1", 0.1, "initial")


def test_without_its_run_it_is_a_model_like_any_other(path, tmp_path, capsys):
    shutil.copytree(path / "share-0.5", tmp_path / "moved", ignore=shutil.ignore_patterns("evaluation"))
    described = record(tmp_path / "moved") | {"run": str(tmp_path / "gone")}
    (tmp_path / "moved" / "average.json").write_text(json.dumps(described))
    subject, config = subject_of(str(tmp_path / "moved"), None, None)
    assert (subject.run, config, subject.folder) == (None, None, tmp_path / "moved" / "evaluation")
    assert f"its run {tmp_path}/gone is not there" in capsys.readouterr().out


def test_runs_and_any_models_are_averaged(run, tmp_path):
    merge(f"policies=[{run},lab:tiny,lab:tiny]", "weights=[0.5,0.75,-0.25]", f"output_dir={tmp_path}/mixed")
    merge(f"policies=[initial,{run}]", "weights=[0.5,0.5]", f"output_dir={tmp_path}/half")
    for name, value in weights(tmp_path / "mixed").items():
        torch.testing.assert_close(value, weights(tmp_path / "half")[name])
    assert (record(tmp_path / "mixed")["run"], record(tmp_path / "half")["run"]) == (None, str(run))
    assert subject_of(str(tmp_path / "mixed"), None, None)[0].run is None


def test_what_is_there_stays_and_nothing_else_is_written_over(run, tmp_path, capsys):
    target = f"output_dir={tmp_path}/out"
    merge(f"policies=[initial,{run}]", "weights=[0.5,0.5]", target)
    stamp = (tmp_path / "out" / "average.json").stat().st_mtime_ns
    merge(f"policies=[{run},initial]", "weights=[0.5,0.5]", target)
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "out" / "average.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="out holds something else; give another output_dir"):
        merge(f"policies=[initial,{run}]", "weights=[0.25,0.75]", target)
    with pytest.raises(ValueError, match="run holds something else"):
        merge(f"policies=[initial,{run}]", f"output_dir={run}")


@pytest.mark.parametrize("last", [2, 5, 9])
def test_a_killed_merge_leaves_nothing_and_the_next_cleans_up(run, tmp_path, last):
    words = [f"policies=[initial,{run}]", f"output_dir={tmp_path}/out"]

    def killed():
        FileOperations(tmp_path, last).watch()
        merge(*words)

    process = forked(run.parent, killed)
    process.join(60)
    assert process.exitcode == -9
    assert not (tmp_path / "out").exists()
    merge(*words)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert damage_in(tmp_path / "out") is None


def test_of_a_run_with_an_adapter_the_merged_policy_is_averaged_and_no_checkpoint(tmp_path):
    steps = ["trainer.max_steps=1", "trainer.save_every=1", "model.lora_rank=2"]
    assert train(*TRAIN, *steps, f"output_dir={tmp_path}/lora", "beta=0.1").returncode == 0
    merge(f"policies=[initial,{tmp_path}/lora]", "weights=[0,1]", f"output_dir={tmp_path}/out")
    theirs = weights(tmp_path / "lora" / "policy")
    assert all(torch.equal(value, theirs[name]) for name, value in weights(tmp_path / "out").items())
    with pytest.raises(ValueError, match=r"the weights of an adapter, such as .*lora_A.*, and no whole policy"):
        merge(f"policies={tmp_path}/lora/checkpoints", f"output_dir={tmp_path}/no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "stage=merge needs policies="),
        (["policies=[lab:tiny]", "seed=1"], "seed has no effect on stage=merge"),
        (["policies=[initial,lab:tiny]"], "There is no run among the policies; name its folder instead"),
        (["policies=[lab:tiny,lab:tiny]", "weights=[0.5,0.4]"], "sum to 0.9 and must sum to 1"),
        (["policies=[lab:tiny]", "shares=[0,1]"], "path between two policies, and policies are 1"),
        (["policies=[lab:tiny,lab:tiny]", "shares=[0.5]"], "must be two or more that differ"),
        (["policies=[lab:tiny,lab:tiny]", "shares=[0,1]", "weights=[1,0]"], "leave one of them out"),
        (["policies=nowhere/*"], r"policies=nowhere/\* matches no folder"),
        (["policies=/nowhere"], "policies=/nowhere does not exist"),
    ],
)
def test_refusals(overrides, words):
    with pytest.raises(ValueError, match=words):
        merge(*overrides)


@pytest.mark.parametrize("key", ["policies=[a]", "weights=[1]", "shares=[0,1]"])
def test_its_words_have_no_effect_elsewhere(key):
    cfg, choices = composed("policy=lab:tiny", key, kind="evaluate")
    with pytest.raises(ValueError, match="has no effect on stage=all: it belongs to stage=merge"):
        run_evaluation(cfg, choices, ["policy=lab:tiny", key])


PAGE = (ROOT / "docs" / "averages.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^python (?:train|evaluate)\.py.*", PAGE, re.MULTILINE))
def test_the_pages_commands_compose(command):
    composes(command)
