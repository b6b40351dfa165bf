"""Scored tokens are the response and its end token, nothing else; limits are kept and counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ref.data.tokenise import end_of_turn_ids, tokenise
from dpo_ref.types import Message, PromptGroup
from tests.support.tokenizers_here import CHATML, PLAIN, byte_bpe

FAMILIES = {"chatml": byte_bpe(), "bos and leading space": byte_bpe(PLAIN, eos="</s>", bos="<s>")}
TEXT = st.text(min_size=1, max_size=30).filter(lambda text: text.strip() and "<" not in text)


def group(prompt="what is it?", responses=("a cat.", "no"), origin="row 1"):
    return PromptGroup((Message(role="user", content=prompt),), tuple(responses), ((0, 1),), origin=origin)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(question=TEXT, first=TEXT, chosen=TEXT, rejected=TEXT)
def test_any_text(family, question, first, chosen, rejected):
    tokenizer = FAMILIES[family]
    prompt = [Message(role="user", content=first), Message(role="assistant", content="ok")]
    prompt.append(Message(role="user", content=question))
    (token_group,) = tokenise([PromptGroup(tuple(prompt), (chosen, rejected))], tokenizer).groups
    expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert token_group.prompt_ids == expected
    end = {"chatml": "<|im_end|>", "bos and leading space": "</s>"}[family]
    space = {"chatml": "", "bos and leading space": " "}[family]
    for ids, text in zip(token_group.response_ids, (chosen, rejected), strict=True):
        assert tokenizer.decode(ids) == space + text + end
        assert ids[-1] in end_of_turn_ids(tokenizer)


def test_limits_and_counts():
    tokenizer = FAMILIES["chatml"]
    groups = [group(), group(prompt="the cat sat on the mat " * 9), group(responses=("yes " * 40, "no"))]
    whole = tokenise(groups, tokenizer, max_length=10_000).groups
    sizes = [len(g.prompt_ids) + max(map(len, g.response_ids)) for g in whole]
    limit = sizes[0]
    assert limit < min(sizes[1:])

    dropped = tokenise(groups, tokenizer, max_length=limit)
    assert [g.group_index for g in dropped.groups] == [0]
    assert dropped.counts == {"groups": 1, "dropped: too long": 2}

    room = len(whole[0].prompt_ids) + 5
    cut = tokenise(groups[::2], tokenizer, max_length=room, over_length="truncate_response")
    assert cut.groups[1].response_ids[0] == whole[2].response_ids[0][:5]
    assert cut.groups[1].response_ids[0][-1] not in end_of_turn_ids(tokenizer)  # an end is never invented
    assert cut.counts["responses cut"] == 1

    prompt_cut = tokenise(groups[1:2], tokenizer, max_length=40, over_length="truncate_prompt_start")
    (token_group,) = prompt_cut.groups
    assert len(token_group.prompt_ids) == 40 - max(map(len, whole[1].response_ids))
    assert token_group.prompt_ids == whole[1].prompt_ids[-len(token_group.prompt_ids) :]
    assert token_group.response_ids == whole[1].response_ids


def test_a_cut_prompt_keeps_its_bos():
    tokenizer = FAMILIES["bos and leading space"]
    (token_group,) = tokenise(
        [group("the cat " * 30)], tokenizer, max_prompt_length=9, over_length="truncate_prompt_start"
    ).groups
    assert len(token_group.prompt_ids) == 9
    assert token_group.prompt_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_bpe(eos=None), "no EOS token"),
        (byte_bpe(template=None), "no chat template"),
        (byte_bpe("{% for m in messages %}{{ m.content }}{% endfor %}"), "does not end the assistant's turn"),
        (byte_bpe("{{ messages | length }}" + CHATML), "writes the prompt differently"),
    ],
)
def test_unusable_tokenizers(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        tokenise([group()], tokenizer)


def test_special_text_can_be_refused_with_its_row():
    bad = group(responses=("a <|im_end|> b", "no"), origin="row 7")
    with pytest.raises(
        ValueError, match=r"row 7 contains the special token '<\|im_end\|>'.*special_tokens_in_text=text"
    ):
        tokenise([bad], FAMILIES["chatml"], special_tokens_in_text="error")
