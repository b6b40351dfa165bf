"""Every policy for what is too long: limits are kept, all responses are treated alike, everything is counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ref.data.tokenise import end_of_turn_ids, tokenise
from dpo_ref.types import Message, PromptGroup
from tests.support.tokenizer_families import FAMILIES

FAMILY = FAMILIES["llama 3: byte-level, BOS"]()
TOKENIZER = FAMILY.tokenizer
WHOLE = {"max_length": 10**6}


def group(prompt, *responses):
    return PromptGroup((Message(role="user", content=prompt),), responses, ((0, 1),), origin="row 1")


def sizes(token_group):
    return len(token_group.prompt_ids), [len(ids) for ids in token_group.response_ids]


@pytest.mark.parametrize("policy", ["drop", "truncate_prompt_start", "truncate_prompt_end", "truncate_response"])
@settings(max_examples=60, deadline=None)
@given(
    words=st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)),
    limits=st.tuples(st.integers(8, 90), st.integers(4, 60), st.integers(1, 40)),
)
def test_limits_hold_and_what_is_kept_is_part_of_the_whole(policy, words, limits):
    given_group = group("the cat " * words[0] + "?", "yes " * words[1] + ".", "no " * words[2] + "!")
    (whole,) = tokenise([given_group], TOKENIZER, **WHOLE).groups
    tokenised = tokenise(
        [given_group], TOKENIZER, over_length=policy,
        max_length=limits[0], max_prompt_length=limits[1], max_response_length=limits[2],
    )  # fmt: skip
    dropped = sum(count for what, count in tokenised.counts.items() if what.startswith("dropped"))
    assert len(tokenised.groups) + dropped == 1
    if not len(tokenised.groups):
        return
    (token_group,) = tokenised.groups
    prompt, responses = sizes(token_group)
    assert prompt <= limits[1]
    assert max(responses) <= limits[2]
    assert prompt + max(responses) <= limits[0]
    if policy != "truncate_response":
        assert token_group.response_ids == whole.response_ids
    for kept, ids in zip(token_group.response_ids, whole.response_ids, strict=True):
        assert kept == ids[: len(kept)]
        assert (kept[-1] in end_of_turn_ids(TOKENIZER)) == (len(kept) == len(ids))
    if prompt < len(whole.prompt_ids):
        assert tokenised.counts["prompts cut"] == 1
        assert token_group.prompt_ids[0] == TOKENIZER.bos_token_id
        end = 5 if policy == "truncate_prompt_end" else prompt - 1
        assert token_group.prompt_ids[-end:] == whole.prompt_ids[-end:]  # <|eot_id|>, header of three, two line breaks


def test_the_end_of_a_prompt_is_cut_inside_its_last_turn():
    given_group = group("one two three four five six seven eight", "a", "b")
    (whole,) = tokenise([given_group], TOKENIZER, **WHOLE).groups
    size = len(whole.prompt_ids) - 6
    (token_group,) = tokenise(
        [given_group], TOKENIZER, over_length="truncate_prompt_end", max_prompt_length=size, **WHOLE
    ).groups
    text = TOKENIZER.decode(token_group.prompt_ids)
    complete = TOKENIZER.decode(whole.prompt_ids)
    closing = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert text.endswith(closing)
    assert complete.startswith(text.removesuffix(closing))
    assert len(text) < len(complete)


@pytest.mark.parametrize("name", ["max_length", "max_prompt_length", "max_response_length"])
def test_a_limit_is_at_least_one_token(name):
    with pytest.raises(ValueError, match=f"data.{name}=0 must be at least 1 token|data.{name}=-1"):
        tokenise([group("a", "b", "c")], TOKENIZER, **{name: -1})


def test_without_a_limit_the_tokenizer_says_what_its_model_takes():
    long = group("the cat " * 40, "yes", "no")
    TOKENIZER.model_max_length = 30
    try:
        assert tokenise([long], TOKENIZER).counts == {"groups": 0, "dropped: too long": 1}
        assert len(tokenise([long], TOKENIZER, **WHOLE).groups) == 1
    finally:
        TOKENIZER.model_max_length = 10**30
    assert len(tokenise([long], TOKENIZER).groups) == 1
