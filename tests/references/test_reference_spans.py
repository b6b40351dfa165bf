"""Objectives on tokens against a reference of other tokens: spans of text on which both agree stand for them."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from dpo_ref.data.packing import collate
from dpo_ref.data.tokenise import tokenise
from dpo_ref.objectives.interface import bind, probe_inputs
from dpo_ref.objectives.pairwise import ld_dpo
from dpo_ref.references import policies
from dpo_ref.references.other_tokenizer import Spans, spans_at_ends
from dpo_ref.types import ResponseLogps
from tests.support.command import train
from tests.support.reference_contexts import mixed
from tests.support.reference_texts import OTHERS, POLICY, SIZE, TEXTS, context_of, data
from tests.support.tiny import tiny_model

PLAIN = [
    ("code?", "def f(x):\n    return {'a': [x]}\n\n# end", "no, I do not know it"),
    ("two\nlines", "a b", "x  y   z"),
]


def on(words, *cuts):
    """Tokens of a text of so many bytes that end at these, and one that ends the turn."""
    ends = np.array([*cuts, words, words])
    return Spans(np.concatenate([[0], ends[:-1]]), ends, words)


def test_spans_by_hand():
    """Tokens end at 2, 3, 6 and at 3, 5, 6: both at 3 and 6. The turn's end is a span of its own, or goes with the
    last where only one of both has it."""
    ours, theirs = on(6, 2, 3), on(6, 3, 5)
    values = spans_at_ends(ours, theirs, np.array([-1.0, -2.0, -4.0, -8.0]), 4)
    assert values.tolist() == pytest.approx([math.nan, -1.0, -6.0, -8.0], nan_ok=True)
    without = Spans(theirs.begin[:-1], theirs.end[:-1], 6)
    values = spans_at_ends(ours, without, np.array([-1.0, -2.0, -4.0]), 4)
    assert values.tolist() == pytest.approx([math.nan, -1.0, math.nan, -6.0], nan_ok=True)
    assert spans_at_ends(None, theirs, np.array([-1.0, -2.0]), 3).tolist() == pytest.approx(
        [math.nan, math.nan, -3.0], nan_ok=True
    )


def test_spans_of_the_same_tokens_are_the_tokens():
    logps = -np.linspace(0.5, 3, 5)
    assert spans_at_ends(on(9, 1, 4, 6), on(9, 1, 4, 6), logps, 5).tolist() == pytest.approx(logps.tolist())


@torch.no_grad()
def plain_tokens(model, prompt_ids, ids):
    model.set_attn_implementation("eager")
    logps = model.double()(torch.tensor([[*prompt_ids, *ids]])).logits[0].log_softmax(-1)
    return [logps[len(prompt_ids) - 1 + at, token].item() for at, token in enumerate(ids)]


def written(tokenizer, prompt_ids, ids, response):
    """How many characters of the response every prefix of its tokens writes; one more where the turn is ended."""
    before = tokenizer.decode(prompt_ids[-1:])
    texts = [tokenizer.decode([*prompt_ids[-1:], *ids[:n]])[len(before) :] for n in range(1, len(ids) + 1)]
    begin = texts[-1].index(response)
    sizes = [min(max(0, len(text) - begin), len(response)) for text in texts]
    whole = sizes.index(len(response))
    return sizes[: whole + 1] + [len(response) + 1] * (len(sizes) - whole - 1)


@pytest.mark.parametrize("name", ["olmo: byte-level, tulu"])
def test_spans_are_those_of_the_prefixes_that_both_have(name, tmp_path):
    """Enumerated: every prefix of either token sequence, decoded; a span ends where both have one. Its log-prob is the
    sum over a plain forward pass."""
    tokenizer, groups = OTHERS[name].tokenizer, data(PLAIN)
    context = replace(context_of(groups, tmp_path, tokenizer), needs_tokens=True)
    logps = policies.other(context, path="5", max_altered=1.0).logps(collate(list(context.groups)))
    theirs = tokenise(groups, tokenizer, max_length=10**6).groups
    model, start, fewer = tiny_model(seed=5, vocab_size=SIZE), 0, []
    responses = iter([response for _, *both in PLAIN for response in both])
    for ours, other in zip(context.groups, theirs, strict=True):
        for here, there in zip(ours.response_ids, other.response_ids, strict=True):
            mine = written(POLICY, ours.prompt_ids, here, response := next(responses))
            sizes = written(tokenizer, other.prompt_ids, there, response)
            tokens = plain_tokens(model, other.prompt_ids, there)
            ends = sorted({size for size in sizes if size in mine})
            fewer.append(len(tokens) - len(ends))
            values = [
                sum(value for value, size in zip(tokens, sizes, strict=True) if low < size <= high)
                for low, high in pairwise([-1, *ends])
            ]
            got = logps.span_logps[start : start + len(here)][logps.span_ends[start : start + len(here)]]
            assert got.tolist() == pytest.approx(values, abs=2e-4)
            start += len(here)
    assert min(fewer) == 0 < max(fewer)  # some responses are cut alike, in others spans hold several tokens


@pytest.mark.parametrize("name", OTHERS)
def test_spans_sum_to_the_responses(name, tmp_path):
    context = replace(context_of(data(TEXTS + PLAIN), tmp_path, OTHERS[name].tokenizer), needs_tokens=True)
    batch = collate(list(context.groups))
    logps = policies.other(context, path="5", max_altered=1.0).logps(batch)
    sums = torch.zeros_like(logps.sums).index_add(0, batch.response_index, logps.span_logps)
    torch.testing.assert_close(sums, logps.sums, rtol=1e-12, atol=1e-9)
    last = batch.lengths.cumsum(0) - 1
    assert logps.span_ends[last].all()
    assert logps.token_logps is None


def test_ld_dpo_on_spans_by_hand():
    """Chosen has tokens of 1 and 1 of log-ratio; rejected of 1, 1 and 1, the last two a span: both have two spans, so
    nothing of either is longer, and the loss is dpo's."""
    _, inputs = probe_inputs()
    batch = inputs.batch
    ends = torch.tensor([True, True, True, False, True, True, True, True, True])
    tokens = torch.tensor([-1.0, -2.0, -1.0, -1.0, -1.0, -3.0, -1.0, -2.0, -4.0], dtype=torch.float64)
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, batch.response_index, tokens)
    ours = ResponseLogps(sums, batch.lengths, batch.num_bytes, tokens)
    spans = torch.where(ends, torch.full_like(tokens, -2.0), torch.zeros_like(tokens))
    theirs = torch.zeros(4, dtype=torch.float64).index_add(0, batch.response_index, spans)
    reference = ResponseLogps(theirs, batch.lengths, batch.num_bytes, None, span_logps=spans, span_ends=ends)
    outcome = bind(ld_dpo, beta=0.5, alpha=0.2)(ours, replace(inputs, reference=reference))
    rewards = [0.5 * (-3 + 4), 0.5 * (-3 + 4)]  # two spans each in the first pair
    rewards += [0.5 * (-3 + 2), 0.5 * ((-1 + 2) + 0.2 * (-2 - 4 + 4))]  # one span against three: two count a fifth
    expected = [rewards[0], rewards[2]], [rewards[1], rewards[3]]
    assert outcome.chosen_rewards.tolist() == pytest.approx(expected[0])
    assert outcome.rejected_rewards.tolist() == pytest.approx(expected[1])


def test_a_part_of_a_mixture_has_no_spans(tmp_path):
    tokenizer = OTHERS["olmo: byte-level, tulu"].tokenizer
    context = replace(context_of(data(PLAIN), tmp_path, tokenizer), needs_tokens=True)
    parts = [{"reference": "initial"}, {"reference": "other", "path": "5", "max_altered": 1.0}]
    with pytest.raises(ValueError, match="spans of text stand for them, but not as a part of a mixture"):
        mixed(context, *parts)


def test_a_run_against_another_tokenizer(tmp_path):
    words = ["objective=ld_dpo", "reference=other", "reference.path=lab:foreign", "beta=0.3", "model.path=lab:initial"]
    words += ["data.num_pairs=32", "data.num_eval_pairs=16", "data.num_test_prompts=4", "tracking=none"]
    done = train(*words, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)
