"""What is measured of answers and of held-out pairs on several ranks: each asks about its own, and all have the values
of all, in order."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_ref.distributed import ranks
from dpo_ref.evaluation.heldout import score_pairs
from dpo_ref.evaluation.kl import sample_kl
from dpo_ref.generation.sampling import generate, never_sampled
from tests.support.ranks import on_ranks
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
