"""A model on this machine as the judge: its preferences are those of its own logits, computed without our code."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ref.component import hooks_of
from dpo_ref.evaluation.judging.judge import Pair, judge_pairs
from dpo_ref.evaluation.judging.judges import JudgeContext, local
from dpo_ref.evaluation.judging.templates import load_template
from dpo_ref.lab import models as lab_models
from dpo_ref.models.asked import ModelLoader
from dpo_ref.types import Message, silent

PAIRS = [
    Pair((Message(role="user", content=f"Name {n} birds."),), n, 0, "owl, " * n, f"bat and {n} more") for n in range(5)
]


def judge(tmp_path, **options):
    return local(
        JudgeContext("local", tmp_path, ModelLoader(torch.device("cpu"), keep=1), silent), model="lab:tiny", **options
    )


@torch.no_grad()
def by_logits(template, pair, policy_first):
    """The policy's share of the win: probabilities of the labels after `lead`, from full logits in float64."""
    path = lab_models.locate("lab:tiny")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").double()
    answers = (pair.output, pair.baseline_output) if policy_first else (pair.baseline_output, pair.output)
    messages = list(template.fill(pair.prompt, *answers))
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    totals = {}
    for label in template.verdict.labels:
        before = tokenizer(start, add_special_tokens=False)["input_ids"]
        whole = tokenizer(start + template.verdict.lead + label, add_special_tokens=False)["input_ids"]
        assert whole[: len(before)] == before
        logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        totals[label] = sum(logps[at - 1, whole[at]] for at in range(len(before), len(whole)))
    weights = torch.stack(list(totals.values())).softmax(0)
    first = sum(w * share for w, share in zip(weights, template.verdict.labels.values(), strict=True)).item()
    return first if policy_first else 1 - first


@pytest.mark.parametrize("name", ["alpaca_eval", "mt_bench"])
def test_preferences_are_those_of_the_logits(tmp_path, name):
    judged = judge_pairs(judge(tmp_path, template=name), PAIRS, silent)
    assert judged.num_asked == 10
    for pair, judgment in zip(PAIRS[:3], judged.judgments, strict=False):
        wins = [by_logits(load_template(name), pair, first) for first in (False, True)]
        assert [opinion.win for opinion in judgment.opinions] == pytest.approx(wins, abs=1e-5)
        assert judgment.preference == pytest.approx(sum(wins) / 2, abs=1e-5)
    assert len({judgment.preference for judgment in judged.judgments}) == 5


def test_the_size_of_a_batch_changes_nothing_and_answers_are_kept(tmp_path):
    whole = judge_pairs(judge(tmp_path / "a"), PAIRS, silent).judgments
    small = judge_pairs(judge(tmp_path / "b", tokens_per_batch=1), PAIRS, silent).judgments
    assert [j.preference for j in small] == pytest.approx([j.preference for j in whole], abs=1e-5)
    again = judge_pairs(judge(tmp_path / "a", tokens_per_batch=1), PAIRS, silent)
    assert (again.num_asked, again.judgments) == (0, whole)


def test_a_pair_without_room_is_refused_and_the_others_are_judged(tmp_path):
    long = Pair(PAIRS[0].prompt, 9, 0, "owl " * 2000, "bat")
    judgments = judge_pairs(judge(tmp_path), [*PAIRS, long], silent).judgments
    assert [judgment.preference is None for judgment in judgments] == [False] * 5 + [True]
    assert "tokens; the model has 2048 positions" in str(judgments[-1].opinions[0].refusal)


def test_a_label_behind_unknown_words_needs_a_lead(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "messages: [{role: user, content: '{prompt} {first} {second}'}]\n"
        "verdict: {first: A, second: B, pattern: 'is (A|B)'}"
    )
    with pytest.raises(ValueError, match=r"say in verdict\.lead what stands before the label"):
        hooks_of(local).check(template=str(path), tokens_per_batch=8192)
