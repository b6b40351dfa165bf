"""On-policy rounds as a user runs them: what they leave, that they resume bit for bit, and what they are made of."""

import json
import random
import re
import shlex
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_ref.generation.records import read_generations
from dpo_ref.lab import models as lab_models
from dpo_ref.lab.gold import gold_rewards
from dpo_ref.lab.preferences import draw_prompts
from dpo_ref.models import checkpoint
from dpo_ref.references.table import read_shards, row_key
from dpo_ref.training import on_policy
from dpo_ref.training.advantages import PAIRS, all_with
from dpo_ref.training.on_policy import groups_of, read_samples
from dpo_ref.training.rounds import RoundsContext
from dpo_ref.training.run import TrainingRun
from dpo_ref.types import Message, PromptGroup
from tests.support.checkpoints import changed_state
from tests.support.command import ROOT, resolved, train
from tests.support.evaluate_command import measure
from tests.support.foreign import foreign  # noqa: F401
from tests.support.on_policy import SMALL
from tests.support.quick import only
from tests.support.tiny import naive_logps


def run(folder, *overrides):
    done = train(*SMALL, f"output_dir={folder}", *overrides)
    assert done.returncode == 0, done.stderr
    return folder


def lines(folder):
    """Metrics without what depends on the clock and the process."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not any(word in k for word in ("throughput", "memory", "_seconds"))}
        for row in rows
    ]


def same_weights(first, second):
    ours, theirs = (load_file(folder / "policy" / "model.safetensors") for folder in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """PPO: two passes of two steps over each of three rounds, with the sampling policy's log-probs."""
    return run(tmp_path_factory.mktemp("ppo") / "run", "objective=ppo_clip", "data.inner_epochs=2")


def test_a_run_leaves_its_rounds(whole):
    assert [path.name for path in sorted((whole / "rounds").iterdir())] == ["0001", "0002", "0003"]
    rows = lines(whole)
    assert [row["step"] for row in rows] == list(range(1, 13))
    rounds = [row for row in rows if "on_policy/round" in row]
    assert [(row["step"], row["on_policy/round"], row["on_policy/reward_queries"]) for row in rounds] == [
        (1, 1, 48), (5, 2, 96), (9, 3, 144),
    ]  # fmt: skip
    first = read_generations(whole / "rounds" / "0001" / "generations.jsonl")
    gold = gold_rewards([g.prompt for g in first], [g.output for g in first], [g.finished for g in first])
    assert len(first) == 48
    assert rounds[0]["on_policy/reward_mean"] == pytest.approx(sum(gold) / 48)
    assert rounds[0]["on_policy/length"] == sum(g.num_tokens for g in first) / 48


def test_rounds_are_sampled_from_the_policy_as_it_is(whole, tmp_path):
    """Round 1 is the same whatever the objective, round 2 is not; and no prompt comes twice before all have come."""
    other = run(tmp_path / "run", "objective=sft", "data.rounds=2")
    ours, theirs = (
        [read_generations(folder / "rounds" / name / "generations.jsonl") for name in ("0001", "0002")]
        for folder in (whole, other)
    )
    assert ours[0] == theirs[0]
    assert [g.prompt for g in ours[1]] == [g.prompt for g in theirs[1]]
    assert [g.output for g in ours[1]] != [g.output for g in theirs[1]]
    prompts = [str(g.prompt) for generations in ours for g in generations if g.sample_index == 0]
    assert len(set(prompts)) == 24


class Killed(Exception):
    """Stands for the process's end."""


@pytest.mark.parametrize("step", only([4, 6], 6))
def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path, step, monkeypatch):
    """Killed after the checkpoint of step 4 (between rounds) or 6 (in the middle of round 2), in the next round."""
    folder, save = tmp_path / "run", checkpoint.save

    def save_then_die_later(*arguments, **options):
        path = save(*arguments, **options)
        monkeypatch.setattr(TrainingRun, "_log", die)
        return path

    def die(*arguments):
        raise Killed

    monkeypatch.setattr(checkpoint, "save", save_then_die_later)
    failed = train(
        *SMALL, f"output_dir={folder}", "objective=ppo_clip", "data.inner_epochs=2", f"trainer.save_every={step}"
    )
    assert failed.returncode == 1
    assert [path.name for path in checkpoint.complete_in(folder / "checkpoints")] == [f"step-{step:08d}"]
    monkeypatch.undo()
    done = train(f"resume={folder}", "tracking=none")
    assert done.returncode == 0, done.stderr
    assert lines(folder) == lines(whole)
    assert same_weights(folder, whole)


def test_a_round_whose_samples_are_lost_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "rounds" / "0003" / "record.json").unlink()
    changed_state(folder, step=10)
    refused = train(f"resume={folder}", "tracking=none")
    assert refused.returncode == 1
    assert "0003 is not complete; the policy that drew the round's samples has been trained since" in refused.stderr


def test_epochs_are_refused_on_resuming_too(whole, tmp_path):
    refused = train(f"resume={shutil.copytree(whole, tmp_path / 'run')}", "trainer.epochs=2", "tracking=none")
    assert refused.returncode == 1
    assert "trainer.epochs has no effect on data=on_policy" in refused.stderr


def test_old_logps_are_those_of_the_sampling_policy(whole):
    """Round 1's are the initial policy's, by transformers alone; round 2's are not."""
    initial = AutoModelForCausalLM.from_pretrained(lab_models.locate("lab:tiny"), dtype=torch.float32).eval()
    for name, same in (("0001", True), ("0002", False)):
        rows = read_shards(whole / "rounds" / name / "old")[0]
        groups = groups_of(read_samples(whole / "rounds" / name), all_with("none"), 0, seed=0)
        assert len(rows) == len(groups) == 12
        for group in groups:
            with torch.no_grad():
                expected = torch.cat(naive_logps(initial, group))
            gap = (torch.from_numpy(rows[row_key(group)]) - expected).abs().max()
            assert (gap < 1e-4) == same


def test_stale_rounds_are_sampled_at_once(tmp_path):
    """sample_every=2: round 2's samples are of the initial policy, as in a run that never moves."""
    stale = run(tmp_path / "stale", "objective=sft", "data.sample_every=2", "data.rounds=2")
    still = run(tmp_path / "still", "objective=sft", "optim.lr=1e-12", "data.rounds=2")
    fresh = run(tmp_path / "fresh", "objective=sft", "data.rounds=2")
    second_rounds = [
        read_generations(folder / "rounds" / "0002" / "generations.jsonl") for folder in (stale, still, fresh)
    ]
    outputs = [[g.output for g in generations] for generations in second_rounds]
    assert outputs[0] == outputs[1] != outputs[2]


def test_offline_pairs_are_mixed_in(tmp_path):
    """A quarter of a round's 16 groups: 12 prompts and 4 offline pairs."""
    folder = run(tmp_path / "run", "objective=dpo", "data.mix_offline=0.25", "trainer.batch_size=16", "data.rounds=1")
    (state,) = folder.glob("checkpoints/*/state.json")
    assert json.loads(state.read_text())["step"] == 1
    row = next(row for row in lines(folder) if row["step"] == 1 and "train/loss" in row)
    samples = read_samples(folder / "rounds" / "0001")
    pairs = groups_of(samples, PAIRS["best_vs_worst"], 0, seed=0)
    assert row["on_policy/prompts_used"] == len(pairs) / 12
    offline = 4
    mean = (
        row["train/lengths/chosen"] * (len(pairs) + offline) - sum(len(g.response_ids[0]) for g in pairs)
    ) / offline
    assert mean == pytest.approx(round(mean * offline) / offline)


ONE_PROMPT = ["objective=dpo", "data.prompts_per_round=1", "data.samples_per_prompt=2", "data.rounds=8"]


def test_a_round_that_says_nothing_makes_no_steps(tmp_path):
    """Two samples of one prompt are often worth the same; the other rounds train, and the run comes to its end."""
    done = train(*SMALL, *ONE_PROMPT, "model.path=lab:initial", "data.max_new_tokens=24", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    told = {int(number) for number in re.findall(r"round (\d+): the samples of every prompt have equal", done.stdout)}
    samples = {number: read_samples(tmp_path / "rounds" / f"{number:04d}") for number in range(1, 9)}
    assert told == {number for number, each in samples.items() if not groups_of(each, PAIRS["best_vs_worst"], 0, 0)}
    assert 0 < len(told) < 8
    assert {row["step"] for row in lines(tmp_path) if "train/loss" in row} == set(samples) - told
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"


def test_rounds_that_all_say_nothing_are_an_error(tmp_path):
    one_token = ["data.max_new_tokens=1", "scorer@data.scorer=length", "data.scorer.target=3"]
    done = train(*SMALL, *ONE_PROMPT, "model.path=lab:tiny", *one_token, f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert "in every round the samples of every prompt have equal rewards" in done.stderr


def test_an_on_policy_run_is_evaluated_as_any_other(tmp_path):
    """On the held-out pairs and test prompts of the data its prompts are from, against no reference, as it had."""
    folder = run(tmp_path / "run", "objective=sft", "data.rounds=1", "data.prompts.num_test_prompts=4")
    words = [f"policy={folder}", "generation.max_new_tokens=8", "generation.samples_per_prompt=2", "tracking=none"]
    measure(*words)
    evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert (evaluation["num_prompts"], evaluation["metrics"]["rewards/num_pairs"]) == (4, 8)


def test_groups_hold_the_tokens_that_were_drawn(whole):
    samples = read_samples(whole / "rounds" / "0001")
    best = PAIRS["best_vs_worst"]
    groups = groups_of(samples, best, 100, seed=0)
    assert groups
    for group in groups:
        drawn, rewards = samples.by_prompt()[group.group_index - 100]
        picked = best(rewards, random.Random(0))
        assert group.response_ids == tuple(list(drawn[position].token_ids) for position in picked.places)
        assert group.prompt_ids == list(drawn[0].prompt_ids)
        assert rewards[picked.places[0]] > rewards[picked.places[1]]


def test_prompts_come_from_files(tmp_path):
    """Demonstrations bring prompts for online DPO, though they have no pairs; coin flips make one of every prompt."""
    rows = [
        {"messages": [*prompt, {"role": "assistant", "content": "So it is."}]} for prompt in draw_prompts("test", 4)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(
        "data=on_policy", "data@data.prompts=jsonl", f"data.prompts.path={path}", "model.path=lab:tiny",
        "data.rounds=1", "data.prompts_per_round=6", "data.pairs=bradley_terry", "data.samples_per_prompt=2",
        "data.max_new_tokens=4", "tracking=none", f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on-policy: 1 rounds of 6 prompts x 2 samples, 12 rewards from " in done.stdout
    asked = [g.prompt for g in read_generations(tmp_path / "run" / "rounds" / "0001" / "generations.jsonl")][::2]
    assert sorted(map(str, asked[:4])) == sorted(str(tuple(row["messages"][:-1])) for row in rows)
    assert asked[4:] == asked[:2]
    assert lines(tmp_path / "run")[0]["on_policy/prompts_used"] == 1


def test_prompts_without_room_are_left_out_and_counted(capsys):
    rows = [PromptGroup((Message(role="user", content=text),), ("yes",)) for text in ("one", "long", "two")]
    groups = SimpleNamespace(lengths=lambda: (np.array([5, 17, 16]),), places=np.arange(3), text=rows.__getitem__)
    context = Mock(spec=RoundsContext, groups=groups, max_length=20, work=SimpleNamespace(seed=0))
    prompts, notes = on_policy.draw_prompts(context, 4, 5)
    assert {prompt[0]["content"] for prompt in prompts[:2]} == {"one", "two"}
    assert prompts[2:] == [*prompts[:2], prompts[0]]
    assert notes == ("  1 prompts left out: with data.max_new_tokens they exceed 20 tokens",)
    assert on_policy.draw_prompts(context, 3, 5)[1] == ()
    assert capsys.readouterr().out == ""


REFUSED = {
    "pairs": (
        ["objective=reinforce", "data.pairs=random_two"],
        "data.pairs=random_two has no effect: objective=reinf",
    ),
    "advantage": (
        ["data.advantage=group_mean"],
        "data.advantage=group_mean has no effect: objective=dpo takes no adv",
    ),
    "epochs": (["trainer.epochs=2"], "trainer.epochs has no effect on data=on_policy: data.rounds and"),
    "scale": (["data.preference_scale=2"], "data.preference_scale=2.0 has no effect without data.pairs=bradley_terry"),
    "unused samples": (["data.pairs=random_two"], "use data.samples_per_prompt=2"),
    "one sample": (["data.samples_per_prompt=1"], "objective=dpo compares two; use 2 or more"),
    "no baseline": (["objective=grpo", "data.samples_per_prompt=1"], "data.advantage=group_standardised compares"),
    "offline advantages": (
        ["objective=reinforce", "data.mix_offline=0.5"],
        "the data's own answers have no advantages",
    ),
    "temperature": (["objective=reinforce", "data.temperature=0.5"], "which are those of temperature 1"),
    "greedy": (["data.temperature=0"], "data.temperature=0 gives every sample of a prompt alike"),
    "share": (["data.mix_offline=1"], "data.mix_offline=1.0 must lie in [0, 1)"),
    "rounds": (["data.rounds=0"], "data.rounds=0 must be at least 1"),
    "table": (["reference=prior"], "reference=prior scores what is known before training"),
    "itself": (["data@data.prompts=on_policy"], "data.prompts are rows of other data, not on_policy itself"),
    "misspelt": (
        ["+data.prompts.num_pars=3"],
        "data.prompts.num_pars is not an option; did you mean data.prompts.num_p",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case):
    overrides, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        resolved("data=on_policy", *overrides)
    assert message in str(error.value)


COMMANDS = re.findall(r"^python train\.py (?:-m )?(.*?)(?=\s+#|$)", (ROOT / "docs" / "on_policy.md").read_text(), re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_compose(command):
    words = [word.split(",")[0] for word in shlex.split(command)]
    assert resolved(*words).data.name == "on_policy"


def test_objectives_on_samples_refuse_offline_data(tmp_path):
    done = train(
        "objective=reinforce",
        "model.path=lab:tiny",
        "data.num_pairs=16",
        "tracking=none",
        f"output_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 1
    assert "the data has rows without advantages; use data=on_policy" in done.stderr


def test_a_scorer_without_numbers_is_refused(tmp_path):
    done = train(*SMALL, f"output_dir={tmp_path / 'run'}", "scorer@data.scorer=none")
    assert done.returncode == 1
    assert "scorer none has no finite reward for 48 of 48 samples" in done.stderr


def test_a_reference_with_another_tokenizer_is_refused(foreign, tmp_path):  # noqa: F811
    """Also where it is a part of another; parts that can be asked as they go are."""
    mixture = f"reference.parts=[initial, {{reference: other, path: '{foreign}'}}]"
    done = train(*SMALL, f"output_dir={tmp_path / 'run'}", "reference=mixture", mixture)
    assert done.returncode == 1
    assert "reference=mixture is a table of what is known before training" in done.stderr
    live = "reference.parts=[initial, uniform_token]"
    run(tmp_path / "live", "reference=mixture", live, "reference.mean=arithmetic", "trainer.max_steps=1")
