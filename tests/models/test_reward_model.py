"""Reward models: the loss by hand, packed scores against transformers' own, and a run whose folder others load."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from dpo_ref.data.packing import collate
from dpo_ref.evaluation import scorers
from dpo_ref.lab.models import locate
from dpo_ref.models.loading import load_tokenizer
from dpo_ref.models.logps import response_scores
from dpo_ref.models.reward_model import padding_id, with_score_head
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.pairwise import reward_model, reward_model_margin
from dpo_ref.references.policies import NoReference
from dpo_ref.training.trainer import backward, evaluate
from dpo_ref.types import PairScores
from tests.support.reward_models import classified
from tests.support.tiny import policy_of, random_groups, shared, tiny_model

LAYOUT = [(3 + i % 4, (2 + i % 5, 1 + i % 3)) for i in range(6)]


def scored_model(model_type="llama", **options):
    """A random model with a head, and the lab's tokenizer, whose vocabulary it has."""
    tokenizer = load_tokenizer(locate("lab:tiny"))
    model = tiny_model(model_type, vocab_size=len(tokenizer), **options)
    return with_score_head(policy_of(model, tokenizer), seed=3)


def test_losses_by_hand():
    """Scores 2 and 0: -log sigmoid(2) = ln(1 + e^-2); judged 1.5 apart at scale 2, the margin 3 leaves ln(1 + e)."""
    scores = PairScores(torch.tensor([2.0, -1.0]), torch.tensor([0.0, 0.0]))
    rows = PairScores(torch.tensor([4.0, 1.0]), torch.tensor([2.5, 1.0]))
    plain, margin = bind(reward_model).function(scores), bind(reward_model_margin, scale=2.0).function(scores, rows)
    expected = [math.log1p(math.exp(-2)), math.log1p(math.e)]
    torch.testing.assert_close(plain.losses, torch.tensor(expected))
    torch.testing.assert_close(margin.losses, torch.tensor([math.log1p(math.e), math.log1p(math.e)]))
    assert plain.chosen_rewards.tolist() == margin.chosen_rewards.tolist() == [2.0, -1.0]
    with pytest.raises(ValueError, match=r"scale=0.0 must be positive"):
        bind(reward_model_margin, scale=0.0).check()
    with pytest.raises(ValueError, match=r"nll_weight has no place in objective=reward_model: it has no log-probs"):
        bind(reward_model, nll_weight=1.0).check()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gemma2"])
def test_packed_scores_are_those_of_the_saved_classifier(model_type, tmp_path):
    """Each response behind its prompt, alone and in padded batches, against the scores of one pack of three-response
    groups; among them responses of one token, and one that holds the padding token."""
    options = {"head_dim": 8} if model_type == "gemma2" else {}
    loaded = scored_model(model_type, backend="eager" if model_type == "gemma2" else "sdpa", **options)
    groups = random_groups([(4, (3, 1, 5)), (2, (1, 6, 2))], vocab=61)
    first = groups[0]
    groups[0] = replace(first, response_ids=([padding_id(loaded.tokenizer), 7, 9], *first.response_ids[1:]))
    with torch.no_grad():
        packed = response_scores(loaded.model, collate(groups)).scores
    assert packed.std() > 0.01
    loaded.save(tmp_path / "rm")
    sequences = [group.prompt_ids + ids for group in groups for ids in group.response_ids]
    model, alone = classified(tmp_path / "rm", sequences)
    assert packed.tolist() == pytest.approx(alone, abs=1e-4)
    for batch_size in (1, 4):
        assert scorers.score_sequences(model, sequences, batch_size) == pytest.approx(alone, abs=1e-4)
    model.config.pad_token_id = None  # a folder that names no padding
    assert scorers.score_sequences(model, sequences, 4) == pytest.approx(alone, abs=1e-4)
    assert model.config.pad_token_id is None


def test_gradients_equal_plain_autograd():
    """The step's gradient in one pack or many, against the loss written out on unpacked sequences."""
    groups = random_groups(LAYOUT)
    groups = [replace(g, rewards=(1.0 + 0.3 * n, 0.2 * n)) for n, g in enumerate(groups)]
    again = scored_model().model
    again.set_attn_implementation("sdpa")
    losses = []
    for group in groups:
        states = [
            again.base_model(input_ids=torch.tensor([group.prompt_ids + ids]), use_cache=False)[0][0, -1]
            for ids in group.response_ids
        ]
        r_w, r_l = (again.score(state)[0] for state in states)
        losses.append(-F.logsigmoid(r_w - r_l - 0.5 * (group.rewards[0] - group.rewards[1])))
    torch.stack(losses).mean().backward()
    expected = {name: p.grad for name, p in again.named_parameters()}
    objective = bind(reward_model_margin, scale=0.5)
    for packs in ([groups], [groups[:1], groups[1:4], groups[4:]]):
        trained = scored_model()
        model = trained.model
        values, _ = backward(trained, NoReference(), objective, shared(packs))
        torch.testing.assert_close(values["loss"].float(), torch.stack(losses).detach(), atol=1e-5, rtol=0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)
        assert model.score.weight.grad.abs().max() > 1e-3
    held_out = evaluate(trained, NoReference(), objective, groups, lambda groups: [[g] for g in groups])
    torch.testing.assert_close(held_out["loss"], values["loss"], atol=1e-5, rtol=0)
    assert torch.equal(
        held_out["rewards/accuracies"], (held_out["rewards/chosen"] > held_out["rewards/rejected"]).double()
    )


def test_no_vocabulary_logits_are_computed():
    """With a language-model head of nan, scores, loss and every gradient are finite, and the head gets none."""
    trained = scored_model(tie_word_embeddings=False)
    model = trained.model
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    values, _ = backward(trained, NoReference(), bind(reward_model), shared([random_groups(LAYOUT)]))
    assert all(value.isfinite().all() for value in values.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name == "lm_head.weight")
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_a_padding_token_that_ends_turns_is_not_used(tmp_path):
    """Transformers would read the score before the end of turn: the saved folder pads with another token."""
    loaded = scored_model()
    tokenizer = loaded.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    assert padding_id(tokenizer) != tokenizer.eos_token_id
    loaded.save(tmp_path / "rm")
    saved = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert saved.pad_token_id == padding_id(tokenizer)
    ids = [3, 9, 12, tokenizer.eos_token_id]
    model, (alone,) = classified(tmp_path / "rm", [ids])
    assert model.config.pad_token_id == saved.pad_token_id
    loaded.model.set_attn_implementation("sdpa")
    states = loaded.model.base_model(input_ids=torch.tensor([ids]))[0][0]
    assert alone == pytest.approx(loaded.model.score(states[-1]).item(), abs=1e-4)
