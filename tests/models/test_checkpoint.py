"""A restored run is the run it was; a failed save loses nothing."""

import errno
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import pack
from dpo_ref.models import checkpoint
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.references.policies import NoReference
from dpo_ref.training.optim import adamw, muon, optimisation, rmsprop
from dpo_ref.training.rounds import OfflineRounds, TrainerConfig
from dpo_ref.training.trainer import train
from tests.support.tiny import policy_of, random_groups, tiny_model

GROUPS = from_groups(random_groups([(3 + i % 5, (2 + i % 7, 1 + i % 4)) for i in range(11)]))


def steps(policy, optim, first_step=0):
    packing, config = partial(pack, tokens_per_batch=60), TrainerConfig(batch_size=4, epochs=2.0)
    return train(
        policy_of(policy), NoReference(), bind(dpo), optim, OfflineRounds(GROUPS, config, packing, 1), first_step
    )


@pytest.mark.parametrize("optimiser", [adamw, muon, rmsprop])
def test_resume_is_bit_for_bit(optimiser, tmp_path):
    policy = tiny_model(seed=0)
    optim = optimisation(optimiser, policy, 6, lr=1e-2)
    whole = [{k: v.item() for k, v in step.metrics.items()} for step in steps(policy, optim)]

    first = tiny_model(seed=0)
    first_optim = optimisation(optimiser, first, 6, lr=1e-2)
    for step in steps(first, first_optim):
        if step.step == 4:
            checkpoint.save(tmp_path, first, first_optim.optimizer, {}, {"step": 4}).result()
            break
    second = tiny_model(seed=5)
    second_optim = optimisation(optimiser, second, 6, lr=1e-2)
    (saved,) = checkpoint.complete_in(tmp_path)
    checkpoint.load(saved, second, second_optim.optimizer)
    rest = [{k: v.item() for k, v in step.metrics.items()} for step in steps(second, second_optim, first_step=4)]
    assert rest == whole[4:]
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), second.parameters(), strict=True))


def test_only_the_newest_is_kept_and_a_full_disk_keeps_the_previous(tmp_path, monkeypatch):
    policy = tiny_model()
    optim = optimisation(adamw, policy, 6).optimizer
    for step in (2, 4):
        checkpoint.save(tmp_path, policy, optim, {}, {"step": step}).result()
    assert [path.name for path in checkpoint.complete_in(tmp_path)] == ["step-00000004"]

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, policy, optim, {}, {"step": 6})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_checkpoint_that_was_killed_leaves_nothing_when_it_is_written_again(tmp_path):
    policy = tiny_model()
    (tmp_path / ".step-00000002.1").mkdir()
    checkpoint.save(tmp_path, policy, optimisation(adamw, policy, 6).optimizer, {}, {"step": 2}).result()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_the_policy_folder_is_plain_hugging_face(tmp_path):
    from transformers import AutoTokenizer

    from tests.support.tokenizers_here import byte_bpe

    policy, tokenizer = tiny_model(), byte_bpe()
    checkpoint.save_policy(tmp_path / "policy", policy, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", use_safetensors=True)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), loaded.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template == tokenizer.chat_template
    assert not list((tmp_path / "policy").glob("*.bin"))


def test_weights_of_another_model_are_refused(tmp_path):
    policy = tiny_model()
    saved = checkpoint.save(tmp_path, policy, optimisation(adamw, policy, 6).optimizer, {}, {"step": 1}).result()
    other = tiny_model("gpt_neox")
    with pytest.raises(ValueError, match="not those of the configured model"):
        checkpoint.load(saved, other, optimisation(adamw, other, 6).optimizer)
