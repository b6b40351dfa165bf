"""A reference with its own tokenizer scores the same text: equal to explicit tokenisation and a plain forward pass."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dpo_ref.data.packing import collate
from dpo_ref.data.tokenise import tokenise
from dpo_ref.references import other_tokenizer, policies
from dpo_ref.references.other_tokenizer import ReferenceText
from dpo_ref.references.table import scorer_of
from dpo_ref.types import Message
from tests.support.reference_contexts import mixed
from tests.support.reference_texts import OTHERS, POLICY, SIZE, TEXTS, context_of, data, plain_sum
from tests.support.tiny import tiny_model
from tests.support.tokenizer_families import FAMILIES

EDGES = [("edges", "  leading", "trailing  "), ("more", "\nline", "end\n")]


PRIOR = {"reference": "prior"}


def explicit_ids(family, group, response):
    """Ids by one call of the tokenizer on the whole text; harmless texts only."""
    messages = list(group.prompt)
    prompt = family.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    words = response.strip() if family.trims else response
    whole = family.tokenizer(prompt + family.before + words + family.end, add_special_tokens=False).input_ids
    start = family.tokenizer(prompt, add_special_tokens=False).input_ids
    return start, whole[len(start) :] if whole[: len(start)] == start else None


@pytest.mark.parametrize("name", OTHERS)
def test_equals_explicit_tokenisation_and_a_plain_forward_pass(name, tmp_path, capsys):
    family = OTHERS[name]
    groups = data(
        [text for text in [*TEXTS, *EDGES] if ("<|" not in "".join(text) and not family.trims) or text in TEXTS]
    )
    context = context_of(groups, tmp_path, family.tokenizer)
    reference = policies.other(context, path="5", max_altered=1.0)
    sums_by_group = reference.logps(collate(list(context.groups))).sums.view(-1, 2)
    assert reference.logps(collate(list(context.groups)[1:2])).token_logps is None
    model, checked = tiny_model(seed=5, vocab_size=SIZE), 0
    for group, sums in zip(groups, sums_by_group, strict=True):
        for response, value in zip(group.responses, sums.tolist(), strict=True):
            start, ids = explicit_ids(family, group, response)
            if "<" in response + group.prompt[0]["content"] or ids is None:
                continue  # special strings are text, which one call cannot say; see the test below
            assert value == pytest.approx(plain_sum(model, start, ids), abs=2e-4)
            checked += 1
    assert checked >= 8
    (note,) = reference.notes
    assert note.startswith("reference text: ")
    assert "of its tokens for one of the policy's" in note
    assert capsys.readouterr().out == ""


def test_special_strings_of_either_side_are_text(tmp_path):
    """Text that is special to the reference but not to the policy, and the other way round."""
    family = OTHERS["mistral: SentencePiece with a prefix on the first"]
    groups = data([TEXTS[3]])
    context = context_of(groups, tmp_path, family.tokenizer)
    sums = policies.other(context, path="5", max_altered=0.0).logps(collate(list(context.groups))).sums
    (ids,) = tokenise(groups, family.tokenizer, max_length=10**6).groups
    model = tiny_model(seed=5, vocab_size=SIZE)
    expected = [plain_sum(model, ids.prompt_ids, response) for response in ids.response_ids]
    assert sums.tolist() == pytest.approx(expected, abs=2e-4)
    ends = family.tokenizer.eos_token_id
    assert [list(response).count(ends) for response in ids.response_ids] == [1, 1]


def test_the_same_tokenizer_by_text_equals_the_path_by_ids(tmp_path):
    context = context_of(data(TEXTS + EDGES), tmp_path, POLICY)
    batch = collate(list(context.groups))
    by_ids = policies.other(context, path="5").logps(batch)
    model = tiny_model(seed=5, vocab_size=SIZE)
    own = ReferenceText(POLICY, None, "count", 0.0)
    by_text = other_tokenizer.from_text("other", scorer_of(model), own, "id", "w", context, "off").logps(batch)
    torch.testing.assert_close(by_text.sums, by_ids.sums, atol=1e-5, rtol=1e-6)
    skipped = policies.other(context, path="5", terminator="skip").logps(batch)
    last = by_ids.tokens()[batch.lengths.cumsum(0) - 1].double()
    torch.testing.assert_close(skipped.sums, by_ids.sums - last, atol=1e-4, rtol=0)


def test_a_cut_response_is_scored_as_far_as_it_goes(tmp_path):
    family = OTHERS["olmo: byte-level, tulu"]
    groups = data([("why?", "one two three four five six", "no")])
    (whole,) = tokenise(groups, POLICY, max_length=10**6).groups
    kept = len(whole.response_ids[0]) // 2
    limits = {"max_response_length": kept, "over_length": "truncate_response"}
    context = context_of(groups, tmp_path, family.tokenizer, **limits)
    sums = policies.other(context, path="5").logps(collate(list(context.groups))).sums
    text = POLICY.decode(whole.response_ids[0][:kept])
    cut = replace(groups[0], responses=(text, "no"))
    (ids,) = tokenise([cut], family.tokenizer, max_length=10**6).groups
    model = tiny_model(seed=5, vocab_size=SIZE)
    assert sums[0].item() == pytest.approx(plain_sum(model, ids.prompt_ids, ids.response_ids[0][:-1]), abs=2e-4)


def test_the_audit_stops_a_reference_that_changes_the_text(tmp_path, capsys):
    context = context_of(data(EDGES), tmp_path, OTHERS["llama 3: byte-level, BOS"].tokenizer)
    with pytest.raises(ValueError, match=r"100\.0% of the responses .*max_altered=0\.02.*'  leading' became 'leading"):
        policies.other(context, path="5")
    assert capsys.readouterr().out.startswith("reference text: 0.00% of ")
    dropping = FAMILIES["mistral: SentencePiece with a prefix on the first"]().tokenizer  # knows no system turn
    (group,) = data([("a", "b", "c")])
    system = replace(group, prompt=(Message(role="system", content="be brief"), *group.prompt))
    with pytest.raises(ValueError, match="a turn of the prompt is missing"):
        policies.other(context_of([system], tmp_path, dropping), path="5")


def test_the_table_is_shared_and_missed_when_the_text_changes(tmp_path):
    tokenizer = OTHERS["llama 3: byte-level, BOS"].tokenizer
    context = context_of(data(TEXTS[:2]), tmp_path, tokenizer)
    passes = []

    def counting(items, description, total):
        passes.append(description)
        return items

    context = replace(context, work=replace(context.work, progress=counting))
    first = policies.other(context, path="5")
    again = policies.other(context, path="5")
    assert passes.count("reference log-probs") == 1
    assert first.values_digest == again.values_digest
    template = policies.other(context, path="5", template="plain")
    tokenizer.chat_template = FAMILIES["llama 3: byte-level, BOS"]().tokenizer.chat_template
    assert template.identity != first.identity
    policies.other(context, path="6")
    assert passes.count("reference log-probs") == 3


def test_prior_is_the_response_without_its_prompt(tmp_path):
    groups = data(TEXTS)
    context = context_of(groups, tmp_path, POLICY)
    batch = collate(list(context.groups))
    logps = policies.prior(context).logps(batch)
    begin = [POLICY.eos_token_id]
    expected = [plain_sum(context.policy.model, begin, ids) for group in context.groups for ids in group.response_ids]
    assert logps.sums.tolist() == pytest.approx(expected, abs=2e-4)
    assert len(logps.tokens()) == int(batch.lengths.sum())


def test_mixtures_by_their_formulas(tmp_path):
    context = context_of(data(TEXTS), tmp_path, OTHERS["olmo: byte-level, tulu"].tokenizer)
    batch = collate(list(context.groups))
    parts = [{"reference": "initial"}, {"reference": "other", "path": "5"}]
    initial, other = (
        make(context).logps(batch).sums for make in (policies.initial, partial(policies.other, path="5"))
    )
    reference = mixed(context, *parts, weights=[3.0, 1.0])
    assert [note.partition(":")[0] for note in reference.notes] == ["reference text"]
    geometric = reference.logps(batch)
    np.testing.assert_allclose(geometric.sums, 0.75 * initial + 0.25 * other)
    assert geometric.token_logps is None  # the other has none
    arithmetic = mixed(context, *parts, mean="arithmetic").logps(batch)
    np.testing.assert_allclose(arithmetic.sums, np.log(0.5 * np.exp(initial) + 0.5 * np.exp(other)), rtol=1e-9)
    both = mixed(context, "initial", "prior").logps(batch)
    torch.testing.assert_close(
        both.tokens(),
        (policies.initial(context).logps(batch).tokens() + policies.prior(context).logps(batch).tokens()) / 2,
    )
