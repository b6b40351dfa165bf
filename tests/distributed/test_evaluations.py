"""Evaluations on several ranks: each decodes and asks about its own, all have the values of all, in order, and the
first writes what one process would."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_ref.distributed import ranks
from dpo_ref.evaluation.heldout import score_pairs
from dpo_ref.evaluation.kl import sample_kl
from dpo_ref.generation.sampling import generate, never_sampled
from tests.support.command import train, typed
from tests.support.evaluate_command import QUICK, TRAIN, numbers
from tests.support.pictures import undrawn
from tests.support.ranks import on_ranks, typed_on_ranks
from tests.support.reference_contexts import TOKENIZER
from tests.support.tiny import random_groups, tiny_model

PROMPTS = [[{"role": "user", "content": text}] for text in ("red", "a longer one", "why", "and now", "five")]
LAYOUT = [(3 + 7 * i % 13, (2 + 5 * i % 11, 1 + 3 * i % 4)[: 1 + i % 4]) for i in range(9)]  # some have no pair


def measured() -> dict[str, list]:
    """By one rank: the values, and how many tokens it asked the policy about for each kind."""
    policy, initial = (tiny_model(vocab_size=len(TOKENIZER), seed=seed, dtype=torch.float64) for seed in (1, 2))
    answers = generate(policy, TOKENIZER, PROMPTS, 5, max_new_tokens=6, samples_per_prompt=3)
    asked = []
    policy.base_model.register_forward_pre_hook(
        lambda module, args, options: asked.append(options["input_ids"].numel()), with_kwargs=True
    )
    kl = sample_kl(policy, initial, answers, never_sampled(TOKENIZER, len(TOKENIZER)), tokens_per_batch=40)
    of_kl, ends = sum(asked), TOKENIZER.eos_token_id
    pairs = score_pairs(policy, random_groups(LAYOUT), {ends}, tokens_per_batch=40)
    values = [kl.kl, kl.k1, kl.end_logratio, pairs.chosen, pairs.rejected, pairs.chosen_end, pairs.rejected_lengths]
    prompts = [list(prompt) for prompt in pairs.prompts]
    return {"values": [each.tolist() for each in values], "prompts": prompts, "asked": [of_kl, sum(asked) - of_kl]}


def _write(folder: Path) -> None:
    (folder / f"{ranks().index}.json").write_text(json.dumps(measured()))


@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_asks_about_its_own_and_has_the_values_of_all(tmp_path, size):
    alone = measured()
    on_ranks(tmp_path, size, _write, tmp_path)
    of_ranks = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(size)]
    for each in of_ranks:
        assert each["prompts"] == alone["prompts"]
        for mine, its in zip(each["values"], alone["values"], strict=True):
            np.testing.assert_allclose(mine, its, atol=1e-9)
    assert max(sum(each["asked"]) for each in of_ranks) < 0.75 * sum(alone["asked"])


# --- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = train(*TRAIN, "trainer.max_steps=2", "optim.lr=1e-2", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def left_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_two_ranks_evaluate_as_one_process(tmp_path, monkeypatch, run):
    """With the baseline, whose answers lie in the cache, and a further temperature."""
    options = [*QUICK, "generation.batch_size=3", "generation.temperature=[1.0,0.5]"]
    words = ["evaluate.py", f"policy={run}", *options]
    two, one = tmp_path / "two", tmp_path / "one"
    with undrawn():
        monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache of two"))
        first, other = typed_on_ranks(tmp_path, 2, *words, f"output_dir={two}")
        monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache of one"))
        alone = typed(*words, f"output_dir={one}")
    assert (first.returncode, other.returncode, alone.returncode) == (0, 0, 0), first.stderr + other.stderr
    assert first.stdout.replace(str(two), str(one)) == alone.stdout
    assert other.stdout == other.stderr == ""
    assert left_in(two) == left_in(one)
    for aside in (".", "temperature-0.5"):
        assert (two / aside / "generations.jsonl").read_text() == (one / aside / "generations.jsonl").read_text()
        assert numbers(two / aside)["metrics"] == pytest.approx(numbers(one / aside)["metrics"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=report"], "stage=report is the work of one process"),
        (["judge=alpaca_eval"], "a judge is asked by one process: leave judge out"),
    ],
)
def test_what_is_the_work_of_one_process_is_refused_by_one(tmp_path, run, words, said):
    first, other = typed_on_ranks(tmp_path, 2, "evaluate.py", f"policy={run}", *words)
    assert first.returncode == other.returncode == 1
    assert said in first.stderr
    assert other.stderr == ""
