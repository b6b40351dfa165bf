"""Whatever the tokenizer and the text: the prompt is as in generation, the response is its words and its end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ref.data.tokenise import end_of_turn_ids, tokenise
from dpo_ref.types import Message, PromptGroup
from tests.support.tokenizer_families import FAMILIES

MADE = {name: make() for name, make in FAMILIES.items()}
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), min_size=1, max_size=25)
TEXT = ANY.filter(lambda text: text.strip() and "<" not in text and "[" not in text)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@st.composite
def conversations(draw, words):
    """Any turn structure that ends with the user, and two answers."""
    text = st.sampled_from(words) if words else TEXT
    turns = []
    for _ in range(draw(st.integers(0, 2))):
        turns += [Message(role="user", content=draw(text)), Message(role="assistant", content=draw(text))]
    turns.append(Message(role="user", content=draw(text)))
    return tuple(turns), (draw(text), draw(text))


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_text_and_turn_structure(name, data):
    family = MADE[name]
    tokenizer = family.tokenizer
    prompt, responses = data.draw(conversations(family.words))
    (token_group,) = tokenise([PromptGroup(prompt, responses)], tokenizer, max_length=10**6).groups
    expected = tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert token_group.prompt_ids == expected
    if tokenizer.bos_token and tokenizer.bos_token != tokenizer.eos_token and "llama 2" not in name:
        assert token_group.prompt_ids.count(tokenizer.bos_token_id) == 1
    start = decoded(tokenizer, token_group.prompt_ids)
    for ids, text in zip(token_group.response_ids, responses, strict=True):
        words = text.strip() if family.trims else text
        assert decoded(tokenizer, [*token_group.prompt_ids, *ids]) == start + family.before + words + family.end
        assert ids[-1] in end_of_turn_ids(tokenizer)
        assert not set(ids[:-1]) & end_of_turn_ids(tokenizer)


@pytest.mark.parametrize("name", [name for name in MADE if MADE[name].words is None])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_special_strings_in_texts_are_text(name, data):
    """As many special tokens as without them, and the same text."""
    family = MADE[name]
    tokenizer = family.tokenizer
    special = data.draw(st.sampled_from(tokenizer.all_special_tokens))
    question, answer = f"why{data.draw(TEXT)}{special}b", f"{special}so{special}{data.draw(TEXT)}x"
    prompt = (Message(role="user", content=question),)
    tokenised = tokenise([PromptGroup(prompt, (answer, "no"), ((0, 1),))], tokenizer, max_length=10**6)
    assert tokenised.counts["special tokens in a text, encoded as text"] == 1
    (token_group,) = tokenised.groups
    (harmless,) = tokenise([PromptGroup((Message(role="user", content="why"),), ("so", "no"))], tokenizer).groups
    ids = set(tokenizer.all_special_ids)
    assert [i for i in token_group.prompt_ids if i in ids] == [i for i in harmless.prompt_ids if i in ids]
    assert [i for i in token_group.response_ids[0] if i in ids] == [i for i in harmless.response_ids[0] if i in ids]
    written = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    start = decoded(tokenizer, token_group.prompt_ids)
    assert start.replace(" ", "") == written.replace(" ", "")  # some write a blank of their own
    assert (
        decoded(tokenizer, [*token_group.prompt_ids, *token_group.response_ids[0]])
        == start + family.before + answer + family.end
    )


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_all_assistant_turns_are_scored_and_nothing_else(name, data):
    family = MADE[name]
    tokenizer = family.tokenizer
    prompt, (answer, _) = data.draw(conversations(family.words))
    (all_turns,) = tokenise([PromptGroup(prompt, (answer,))], tokenizer, score="all", max_length=10**6).groups
    (last_turn,) = tokenise([PromptGroup(prompt, (answer,))], tokenizer, max_length=10**6).groups
    both = [[*group.prompt_ids, *group.response_ids[0]] for group in (all_turns, last_turn)]
    assert decoded(tokenizer, both[0]) == decoded(tokenizer, both[1])
    if not any(turn["role"] == "assistant" and turn["content"][0].isspace() for turn in prompt):
        assert both[0] == both[1]
    answers = [turn["content"] for turn in prompt if turn["role"] == "assistant"] + [answer]
    mask = all_turns.scored[0] if all_turns.scored else [True] * len(all_turns.response_ids[0])
    scored = [token for token, counts in zip(all_turns.response_ids[0], mask, strict=True) if counts]
    ends = end_of_turn_ids(tokenizer)
    assert sum(token in ends for token in scored) == len(answers)
    assert scored[-1] in ends
    assert all_turns.num_bytes == (sum(len(text.encode()) for text in answers),)
    one_by_one = [
        tokenise([PromptGroup(prompt[:index], (turn["content"],))], tokenizer, max_length=10**6).groups[0]
        for index, turn in enumerate([*prompt, Message(role="assistant", content=answer)])
        if turn["role"] == "assistant"
    ]
    assert scored == [token for alone in one_by_one for token in alone.response_ids[0]]


def test_a_token_across_the_boundary_is_counted_and_resolved():
    """A response that begins with a line break: this tokenizer writes two of them as one token."""
    tokenizer = MADE["qwen: byte-level, no BOS, ChatML"].tokenizer
    tokenised = tokenise([PromptGroup((Message(role="user", content="a"),), ("\n\nb", "c"), ((0, 1),))], tokenizer)
    assert tokenised.counts["merged at the boundary"] == 1
    assert decoded(tokenizer, tokenised.groups[0].response_ids[0]) == "\n\nb<|im_end|>"


def test_tokenised_at_once_equals_tokenised_alone():
    """The end of the prompt from its last special token on decides how a response is encoded: the rest is left out."""
    for family in MADE.values():
        groups = [
            PromptGroup((Message(role="user", content=f"{'the cat ' * n}{n}"),), ("yes " * n + "a", "no"), ((0, 1),))
            for n in range(1, 9)
        ]
        together = tokenise(groups, family.tokenizer).groups
        for index, group in enumerate(groups):
            (alone,) = tokenise([group], family.tokenizer).groups
            assert (alone.prompt_ids, alone.response_ids) == (
                together[index].prompt_ids, together[index].response_ids,
            )  # fmt: skip


def test_a_scored_turn_keeps_its_own_side_of_a_token_that_straddles():
    """ChatML opens a turn with a line break. In the history a turn that begins with one shares a token with it; as a
    turn that is scored it cannot: generation starts behind the template's own."""
    tokenizer = MADE["qwen: byte-level, no BOS, ChatML"].tokenizer
    prompt = (
        Message(role="user", content="0"),
        Message(role="assistant", content="\n0"),
        Message(role="user", content="0"),
    )
    (all_turns,) = tokenise([PromptGroup(prompt, ("0",))], tokenizer, score="all").groups
    (last_turn,) = tokenise([PromptGroup(prompt, ("0",))], tokenizer).groups
    assert tokenizer.convert_ids_to_tokens(all_turns.response_ids[0][:2]) == ["Ċ", "0"]
    assert "ĊĊ" in tokenizer.convert_ids_to_tokens(last_turn.prompt_ids)
    assert "ĊĊ" not in tokenizer.convert_ids_to_tokens([*all_turns.prompt_ids, *all_turns.response_ids[0]])
