"""Recipes: the chain is what one would type by hand, goes on where it was stopped, and says what began with what."""

import json
import math
import os
import signal
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpo_ref.cli import recipes
from dpo_ref.cli.command_line import typed_words
from dpo_ref.cli.recipes import RECORD, recipe_in, replaced
from dpo_ref.evaluation.sweep import key_of
from tests.support.command import Forked, started, typed
from tests.support.pictures import undrawn

SMALL = ["model.path=lab:tiny", "data.num_pairs=64", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=16", "tracking=none", "optim.lr=0.01"]


def chained(*words):
    """A recipe whose steps import nothing again, and draw no pictures."""
    with pytest.MonkeyPatch.context() as patch, undrawn():
        patch.setattr(recipes, "subprocess", SimpleNamespace(Popen=Forked))
        return typed("train.py", *words)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def metrics(folder, *keys):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in keys if key in row]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("words", "by", "expected"),
    [
        (["beta=0.1", "seed=1"], ["beta=2"], ["seed=1", "beta=2"]),
        (["objective=simpo", "objective.gamma=2", "beta=1"], ["objective=dpo"], ["beta=1", "objective=dpo"]),
        (["reference=other", "+reference.path=x"], ["reference.path=y"], ["reference=other", "reference.path=y"]),
        (["scorer@data.scorer=gold", "data.rounds=3"], ["data=jsonl"], ["scorer@data.scorer=gold", "data=jsonl"]),
    ],
)
def test_words_take_the_place_of_those_about_the_same(words, by, expected):
    assert replaced(words, by) == expected


@pytest.fixture(scope="module")
def pre_dpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pre_dpo") / "it"
    guide = "recipe.guide=objective=simpo beta=2.0"
    done = chained("+recipe=pre_dpo", *SMALL, "beta=0.3", guide, f"output_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_pre_dpo_is_two_runs_typed_by_hand(pre_dpo, tmp_path):
    """The same losses: SimPO from the initial policy, then DPO from there again, against what SimPO gave."""
    folder, done = pre_dpo
    by_hand = [tmp_path / name for name in ("guide", "policy")]
    assert typed("train.py", *SMALL, "objective=simpo", "beta=2.0", f"output_dir={by_hand[0]}").returncode == 0
    against = ["reference=other", f"reference.path={by_hand[0] / 'policy'}"]
    assert typed("train.py", *SMALL, "beta=0.3", *against, f"output_dir={by_hand[1]}").returncode == 0
    for name, alone in zip(("1_guide", "2_policy"), by_hand, strict=True):
        assert metrics(folder / name, "train/loss", "eval/loss") == metrics(alone, "train/loss", "eval/loss")
    guide, policy = (summary(folder / name) for name in ("1_guide", "2_policy"))
    assert (guide["objective"], policy["objective"]) == ("simpo", "dpo")
    assert guide["identities"]["initial_policy"] == policy["identities"]["initial_policy"]
    assert policy["identities"]["loss_reference_weights"] not in ("", guide["identities"]["initial_policy"])
    assert "recipe pre_dpo" in done.stdout


def test_its_page_and_record_say_what_began_with_what(pre_dpo):
    folder, _ = pre_dpo
    record, page = json.loads((folder / RECORD).read_text()), (folder / "recipe.html").read_text()
    assert [step["name"] for step in record["steps"]] == ["1_guide", "2_policy"]
    assert all(step["made"] and step["seconds"] > 0 for step in record["steps"])
    for step in record["steps"]:
        assert step["identities"] == summary(folder / step["name"])["identities"]
        assert step["identities"]["initial_policy"][:12] in page
    assert record["steps"][1]["identities"]["loss_reference_weights"][:12] in page
    assert 'href="comparison/report.html"' in page
    broken = {
        name: json.loads((folder / name / "evaluation" / "evaluation.json").read_text())["degenerate"]
        for name in ("1_guide", "2_policy")
    }
    assert any(broken.values())
    assert {name: f"{name}, degenerate" in page for name in broken} == {
        name: bool(why) for name, why in broken.items()
    }
    assert (folder / "comparison" / "report.html").is_file()


def test_what_is_finished_is_kept(pre_dpo):
    folder, _ = pre_dpo
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/policy/model.safetensors")}
    assert len(before) == 2
    done = chained(f"resume={folder}")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "step 1 of 2" not in done.stdout
    assert "W&B" not in done.stdout + done.stderr  # as was typed at first


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["resume={}", "beta=0.2"], "beta=0.2: a recipe goes on only as it was"),
        (["+recipe=pre_dpo", *SMALL, "beta=0.2", "output_dir={}"], "holds another recipe, which differs in"),
        (["+recipe=soup", *SMALL, "output_dir={}"], "holds another recipe, which differs in"),
    ],
)
def test_a_recipe_goes_on_only_as_it_was(pre_dpo, words, sentence):
    done = typed("train.py", *(word.format(pre_dpo[0]) for word in words))
    assert done.returncode == 1
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["+recipe=pre_dpo", "recipe.guide=objective=simpo foo=1"], "1_guide: foo is not an option"),
        (["+recipe=pre_dpo", "recipe.policy=objective=simpo"], "2_policy: reference=other has no effect"),
        (["+recipe=delta", "recipe.weaker=lab:initial"], "recipe=delta needs recipe.stronger="),
        (["+recipe=soup", "recipe.seeds=1"], "recipe.seeds=1 must be at least 2"),
        (["+recipe=soup", "recipe.initial_share=1"], "recipe.initial_share=1.0 must lie in [0, 1)"),
        (["+recipe=iterative", "recipe.rounds=1"], "recipe.rounds=1 must be at least 2"),
        (["+recipe=pre_dpo", "stage=data"], "stage=data has no place in a recipe"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(words, sentence, tmp_path):
    folder = tmp_path / "it"
    done = typed("train.py", *words, *SMALL, f"output_dir={folder}")
    assert done.returncode == 1
    assert sentence in done.stderr
    assert not folder.exists()


def test_a_recipe_is_no_job_of_a_multirun(tmp_path):
    done = typed("train.py", "-m", "+recipe=pre_dpo", "beta=0.1,0.2", *SMALL, f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert "type one command for each value" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_chain_that_was_stopped_goes_on(pre_dpo, tmp_path):
    """The signal reaches the run under way, which saves itself; the whole is then as if nothing had been."""
    small = [*SMALL, "data.num_test_prompts=0"]  # nothing to compare on
    folder, words = tmp_path / "it", ["+recipe=pre_dpo", *small, "beta=0.3", "recipe.guide=objective=simpo beta=2.0"]
    process = started(tmp_path, "train.py", *words, f"output_dir={folder}")
    for _ in range(600):
        if (folder / "1_guide" / "metrics.jsonl").exists():
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 128 + signal.SIGTERM, (tmp_path / "err").read_text()
    assert f"resume={folder}" in (tmp_path / "err").read_text()
    assert not (folder / "2_policy").exists()
    done = typed("train.py", f"resume={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    whole, _ = pre_dpo
    for name in ("1_guide", "2_policy"):
        assert metrics(folder / name, "train/loss") == metrics(whole / name, "train/loss")


def test_rounds_begin_with_the_last_rounds_policy_and_are_measured_against_it(tmp_path):
    folder = tmp_path / "it"
    words = ["model.path=lab:tiny", "tracking=none", "optim.lr=0.01", "data=on_policy", "trainer.batch_size=16"]
    words += ["data.prompts.num_test_prompts=0", "data.prompts.num_pairs=64", "recipe.prompts_per_round=32"]
    words += ["data.prompts.num_eval_pairs=8"]
    done = chained("+recipe=iterative", "recipe.rounds=2", "objective=sppo", *words, f"output_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = [folder / f"{number}_round" for number in (1, 2)]
    began = [summary(each)["identities"]["initial_policy"] for each in rounds]
    assert len(set(began)) == 2
    assert [summary(each)["identities"]["loss_reference_weights"] for each in rounds] == began
    for before, after in pairwise(rounds):
        assert f"model.path={before / 'policy'}" in summary(after)["overrides"]
    assert [summary(each)["seed"] for each in rounds] == [0, 1]


def test_a_policy_that_judges_itself_is_the_rounds_first(tmp_path):
    (tmp_path / RECORD).write_text(
        json.dumps({"recipe": "iterative", "options": {"rounds": 2, "prompts_per_round": 8, "judge": "self"},
                    "words": ["model.path=lab:tiny", "tracking=none"]})
    )  # fmt: skip
    recipe = recipe_in(tmp_path, [])
    judges = [[word for word in step.words if key_of(word).startswith("data.scorer")] for step in recipe.steps]
    second = typed_words({"data.scorer.judge.model": recipe.steps[0].policy})
    assert judges == [["data.scorer.judge.model=lab:tiny"], second]
    assert all("judge@data.scorer.judge=local" in step.words for step in recipe.steps)


@pytest.mark.slow
def test_rounds_whose_policy_judges_itself(tmp_path):
    """A label that is likelier in one order is less likely in the other, so the mean of a round's verdicts is 0.5; who
    judged a round is what it began with."""
    words = ["model.path=lab:tiny", "tracking=none", "optim.lr=0.01", "data=on_policy", "trainer.batch_size=16"]
    words += ["data.prompts.num_test_prompts=0", "data.prompts.num_pairs=64", "recipe.prompts_per_round=32"]
    words += ["recipe.rounds=2", "recipe.judge=self"]
    done = typed("train.py", "+recipe=iterative", *words, f"output_dir={tmp_path / 'it'}")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = tmp_path / "it" / "1_round", tmp_path / "it" / "2_round"
    assert metrics(first, "on_policy/reward_mean") == pytest.approx([0.5], abs=1e-9)
    assert metrics(second, "on_policy/reward_mean") == pytest.approx([0.5], abs=1e-9)
    assert metrics(second, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert f"data.scorer.judge.model={first / 'policy'}" in summary(second)["overrides"]


@pytest.mark.slow
def test_delta_pairs_are_the_two_models_answers(tmp_path):
    folder = tmp_path / "it"
    models = ["recipe.stronger=lab:strong", "recipe.weaker=lab:initial"]
    done = typed("train.py", "+recipe=delta", *models, *SMALL, f"output_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]

    def answers(name):
        rows = [json.loads(line) for line in (folder / name / "generations.jsonl").read_text().splitlines()]
        return {json.dumps(row["prompt"]): row["output"] for row in rows}

    stronger, weaker = answers("1_stronger"), answers("2_weaker")
    assert 10 < len(pairs) <= len(stronger) == len(weaker)
    for pair in pairs:
        asked = json.dumps(pair["prompt"])
        assert (pair["chosen"], pair["rejected"]) == (stronger[asked], weaker[asked])
        assert pair["chosen"] != pair["rejected"]
    run = summary(folder / "3_policy")
    assert (run["objective"], run["beta"]) == ("dpo_norm", 5.0)


@pytest.mark.slow
def test_soup_is_the_mean_of_the_seeds_weights(tmp_path):
    folder = tmp_path / "it"
    done = typed("train.py", "+recipe=soup", "recipe.seeds=2", *SMALL, f"output_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (weights(folder / name / "policy") for name in ("1_seed", "2_seed"))
    average = weights(folder / "3_soup")
    for name, weight in average.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert "dpo, average of 2" in (folder / "comparison" / "sweep.csv").read_text()
