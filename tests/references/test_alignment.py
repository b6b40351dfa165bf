"""Where tokens of two tokenizers stand in one text, and log-probs carried from one to the other."""

import numpy as np
import pytest

from dpo_ref.data.tokenise import tokenise
from dpo_ref.references.other_tokenizer import ByteSizes, Spans, byte_logps, carry
from dpo_ref.types import Message, PromptGroup
from tests.support.tokenizer_families import FAMILIES

NAMES = list(FAMILIES)
TOKENIZERS = {name: FAMILIES[name]().tokenizer for name in NAMES}
RESPONSES = ("because e\N{COMBINING ACUTE ACCENT} \N{GRINNING FACE}, 日本", "x = [1,\n  2]  # so", "no")


def found(name, response):
    """The tokens of a response in one tokenizer, and their spans."""
    group = PromptGroup((Message(role="user", content="why?"),), (response, "other"), ((0, 1),))
    (ids,) = tokenise([group], TOKENIZERS[name], max_length=10**6).groups
    return ids, ByteSizes(TOKENIZERS[name]).spans(ids.prompt_ids, ids.response_ids[0], response)


@pytest.mark.parametrize("response", RESPONSES, ids=["signs", "code", "short"])
@pytest.mark.parametrize("name", NAMES)
def test_spans_are_the_bytes_each_token_writes(name, response):
    """Against decoding one more token at a time; broken characters belong to the token that completes them there."""
    ids, spans = found(name, response)
    tokenizer, size = TOKENIZERS[name], len(response.encode())
    if spans is None:  # it normalises, or writes blanks of its own
        assert response not in tokenizer.decode([*ids.prompt_ids, *ids.response_ids[0]])
        return
    assert spans.size == size
    assert spans.begin[0] == 0
    assert (spans.begin[1:] == spans.end[:-1]).all()
    assert spans.begin[-1] == spans.end[-1] == size  # the token that ends the turn
    before = len(tokenizer.decode(ids.prompt_ids))
    for count, end in enumerate(spans.end.tolist(), 1):
        text = tokenizer.decode([*ids.prompt_ids, *ids.response_ids[0][:count]])[before:]
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            start = text.find(response[:1])
            shown = text[start:] if start >= 0 else ""
            assert min(len(shown.encode()), size) == end


def test_carried_by_hand():
    """A text of 4 bytes: theirs [0,3) [3,4) end, ours [0,1) [1,4) end; -3 is spread as -1 a byte."""
    theirs, ours = spans_of([3, 4, 4], 4), spans_of([1, 4, 4], 4)
    assert byte_logps(theirs, np.array([-3.0, -0.5, -0.25])).tolist() == [-1, -1, -1, -0.5, -0.25]
    assert carry(theirs, np.array([-3.0, -0.5, -0.25]), ours).tolist() == [-1.0, -2.5, -0.25]
    skipped = carry(spans_of([3, 4], 4), np.array([-3.0, -0.5]), ours)
    assert skipped[:2].tolist() == [-1.0, -2.5]
    assert np.isnan(skipped[2])  # the reference says nothing of the end


def spans_of(ends, size):
    borders = np.array([0, *ends])
    return Spans(borders[:-1], borders[1:], size)


@pytest.mark.parametrize("response", RESPONSES, ids=["signs", "code", "short"])
def test_sums_are_kept_and_the_same_tokenizer_changes_nothing(response):
    generator = np.random.default_rng(0)
    placed = {name: spans for name in NAMES if (spans := found(name, response)[1]) is not None}
    assert len(placed) >= 8
    for theirs in placed.values():
        logps = -generator.exponential(size=len(theirs.begin))
        for ours in placed.values():
            values = carry(theirs, logps, ours)
            assert values.sum() == pytest.approx(logps.sum(), abs=1e-9)
            closing = theirs.begin >= theirs.size
            assert values[-1] == pytest.approx(logps[closing].sum())  # end for end
        wide = theirs.end > theirs.begin
        again = carry(theirs, logps, theirs)
        if wide[:-1].all():
            np.testing.assert_allclose(again, logps, atol=1e-9)
