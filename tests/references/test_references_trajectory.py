"""The average of the policies that a run came through, as a reference: by hand, beside the folder that stage=merge
writes, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_ref.cli import resolve
from dpo_ref.cli.evaluate import run_evaluation
from dpo_ref.lab.models import locate
from dpo_ref.models.checkpoint import complete_in
from tests.support.cache import empty_cache
from tests.support.command import composed, train
from tests.support.evaluate_command import measure
from tests.support.quick import only

SMALL = ["model.path=lab:tiny", "data.num_pairs=64", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=16", "tracking=none", "beta=0.1", "optim.lr=0.01", "optim.schedule=constant"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps, whose checkpoints are kept."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    kept = ["trainer.save_every=1", "trainer.keep_checkpoints=null"]
    assert train(*SMALL, *kept, f"output_dir={folder}").returncode == 0
    return folder


def trained(folder, *words):
    done = train(*SMALL, "reference=trajectory", *words, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "summary.json").read_text()), done.stdout


def first_margin(folder):
    """log-ratio of the held-out pairs before any step: minus that of the reference, plus that of the policy."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["eval/rewards/margins"]


NAMED = {
    "the run": (["reference.path={run}"], [0.25] * 4),
    "its checkpoints": (["reference.path={run}/checkpoints", "reference.last=2"], [0, 0, 0.5, 0.5]),
    "a pattern, with shares": (
        ["reference.path='{run}/checkpoints/step-0000000[24]'", "reference.shares=[1.5, -0.5]"],
        [0, 1.5, 0, -0.5],
    ),
    "a list": (["reference.path=[{run}/checkpoints/step-00000002,{run}]"], [0, 0.5, 0, 0.5]),
}


@pytest.mark.parametrize("name", only(NAMED, "the run"))
def test_the_reference_is_the_average_of_the_policies_that_are_named(name, run, tmp_path):
    """Averaged here from the checkpoints' files, saved as a model, and taken as reference=other: it is the same."""
    words, shares = NAMED[name]
    saved = [load_file(folder / "policy.safetensors") for folder in complete_in(run / "checkpoints")]
    average = {
        key: sum(share * tensors[key].double() for share, tensors in zip(shares, saved, strict=True)).float()
        for key in saved[0]
    }
    shutil.copytree(locate("lab:tiny"), tmp_path / "by_hand", ignore=shutil.ignore_patterns("digests.json"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "by_hand", dtype=torch.float32)
    assert set(model.load_state_dict(average, strict=False).missing_keys) <= {"lm_head.weight"}  # the embedding
    model.save_pretrained(tmp_path / "by_hand")
    summary, said = trained(tmp_path / "averaged", *[word.format(run=run) for word in words])
    done = train(
        *SMALL, "reference=other", f"reference.path={tmp_path / 'by_hand'}", f"output_dir={tmp_path / 'other'}"
    )
    assert done.returncode == 0, done.stderr
    other = json.loads((tmp_path / "other" / "summary.json").read_text())
    for key in ("loss_reference", "loss_reference_weights", "loss_reference_values"):
        assert summary["identities"][key] == other["identities"][key]
    assert first_margin(tmp_path / "averaged") == first_margin(tmp_path / "other") != 0
    assert f"reference: the average of {sum(map(bool, shares))} policies" in said


def test_it_is_the_model_that_merge_writes_and_is_measured_against(run, tmp_path, monkeypatch):
    """One table serves both; evaluation makes the same average again, and refuses another."""
    cache = empty_cache(monkeypatch, tmp_path / "cache")
    again = tmp_path / "run"
    shutil.copytree(run, again)
    words = ["stage=merge", f"policies={again}/checkpoints", f"output_dir={tmp_path / 'merged'}"]
    cfg, choices = composed(*words, kind="evaluate")
    run_evaluation(cfg, choices, words)
    done = train(
        *SMALL, "reference=other", f"reference.path={tmp_path / 'merged'}", f"output_dir={tmp_path / 'other'}"
    )
    assert done.returncode == 0, done.stderr
    before = sorted((cache / "reference").rglob("*.safetensors"))
    summary, _ = trained(tmp_path / "averaged", f"reference.path={again}")
    assert sorted((cache / "reference").rglob("*.safetensors")) == before
    assert [path for path in cache.iterdir() if "average" in path.name] == []
    assert summary["reference"] == f"trajectory {again}"
    options = [f"policy={tmp_path / 'averaged'}", "tracking=none", "generation.max_new_tokens=8"]
    measure(*options)
    metrics = json.loads((tmp_path / "averaged" / "evaluation" / "evaluation.json").read_text())["metrics"]
    last = json.loads((tmp_path / "averaged" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["rewards/margins"] == pytest.approx(last["eval/rewards/margins"] / 0.1, abs=1e-3)
    assert metrics["kl/loss_reference"] > 0
    shutil.rmtree(again / "checkpoints" / "step-00000001")
    shutil.rmtree(tmp_path / "averaged" / "evaluation")
    with pytest.raises(
        ValueError, match=r"was trained against reference=trajectory .* its model, tokenizer or template"
    ):
        measure(*options)


@pytest.mark.parametrize("options", [["reference.cache=off"], ["model.lora_rank=2"]], ids=" ".join)
def test_it_goes_with_a_model_that_is_asked_and_with_an_adapter(options, run, tmp_path):
    summary, _ = trained(tmp_path / "one", f"reference.path={run}", *options)
    plain, _ = trained(tmp_path / "two", f"reference.path={run}")
    assert summary["identities"]["loss_reference"] == plain["identities"]["loss_reference"]
    assert first_margin(tmp_path / "one") == pytest.approx(first_margin(tmp_path / "two"), abs=1e-6)


# --- what is refused, before data is read or the policy is loaded, or with the first difference


def refused(tmp_path, *words):
    done = train(*SMALL, "reference=trajectory", *words, f"output_dir={tmp_path / 'refused'}")
    assert done.returncode == 1
    return done


def test_what_is_not_there_is_refused_before_anything_is_read(run, tmp_path):
    for path, message in (
        (f"{tmp_path}/nothing/*", "matches no folder"),
        (f"{tmp_path}/nothing/run", "does not exist"),
        (f"[{run},{tmp_path}/no/model]", "no/model does not exist"),
        (str(tmp_path), "is not a model folder: it has no config.json"),
    ):
        done = refused(tmp_path, f"reference.path={path}")
        assert f"reference.path={path if path[0] != '[' else tmp_path}" in done.stderr
        assert message in done.stderr
        assert "groups to train on" not in done.stdout


def test_fewer_policies_than_are_asked_for_are_refused(run, tmp_path):
    once = tmp_path / "once"
    assert train(*SMALL, "trainer.max_steps=1", f"output_dir={once}").returncode == 0
    alone = refused(tmp_path, f"reference.path={once}").stderr
    assert "names 1 policies, and reference=trajectory averages two or more; a run keeps its checkpoints with" in alone
    assert "averages 9; a run keeps" in refused(tmp_path, f"reference.path={run}", "reference.last=9").stderr
    three = refused(tmp_path, f"reference.path={run}", "reference.shares=[0.5, 0.25, 0.25]").stderr
    assert "reference.shares are 3 and policies 4; give one weight for each policy" in three


def test_other_architectures_and_tokenizers_are_refused(run, tmp_path):
    """Among themselves, and beside the policy."""
    both = refused(tmp_path, f"reference.path=[{run},lab:initial]").stderr
    assert f"reference.path: {run} and lab:initial cannot be averaged: head_dim is 12 in the one's config.json" in both
    tokens = refused(tmp_path, "reference.path=[lab:initial,lab:strong]", "model.template=plain").stderr
    assert "reference=trajectory: lab:strong has another tokenizer or template than the policy" in tokens
    shapes = refused(tmp_path, "reference.path=[lab:initial,lab:strong]").stderr
    assert "reference=trajectory: lab:strong is another architecture than the policy: " in shapes
    assert "evaluate.py stage=merge makes a model of such policies, for reference=other" in shapes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reference.last=1"], "last=1 must be at least 2 policies; one of them is reference=other"),
        (["reference.shares=[0.5, 0.6]"], r"reference.shares=\[0.5, 0.6\] sum to 1.1 and must sum to 1"),
        (["reference.shares=[0.5, 0.5]", "reference.last=3"], "reference.shares are 2 and policies 3"),
        (["reference.path=3"], "reference.path=3 is no text"),
        ([], "reference=trajectory needs reference.path="),
    ],
)
def test_refused_at_compose_time(words, message):
    path = [] if not words or "path" in words[0] else ["reference.path=some/run"]
    cfg, choices = composed("reference=trajectory", *path, *words)
    with pytest.raises(ValueError, match=message):
        resolve.resolve(cfg, choices)
