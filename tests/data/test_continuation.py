"""What the assistant writes behind where generation begins, by hand, for each way in which templates begin and end."""

import copy

import pytest

from dpo_ref.data.chat_templates import ChatText
from dpo_ref.data.continuation import ThoughtMissing, written_behind
from dpo_ref.data.render_check import TemplateRefuses
from dpo_ref.data.thoughts import without_earlier_thoughts, without_thought
from dpo_ref.data.tokenise import end_of_turn_ids
from dpo_ref.types import Message
from tests.support.template_families import family


def said(words="", **more):
    return Message(role="assistant", content=words, **more)


THOUGHT = said("4", reasoning_content="Count.")
IN_WORDS = said("<think>\nCount.\n</think>\n\n4")
GOES_ON = said("Count.\n</think>\n\n4")  # as a model writes it that is begun within a thought
WRITTEN = {
    "as it is": ("A:", "A: 4<e>", said("4"), " 4<e>"),
    "the thought as it is": ("A:<think>\n", "A:<think>\nCount.\n</think>\n4<e>", THOUGHT, "Count.\n</think>\n4<e>"),
    "other blanks at its mark": ("A:<think>\n", "A:<think>Count.</think>4<e>", THOUGHT, "Count.</think>4<e>"),
    "a cut thought, in a key": ("A:<think>\n", "A:4<e>", THOUGHT, "Count.\n</think>\n\n4<e>"),
    "a cut thought, in words": ("A:<think>\n", "A:\n\n4<e>", IN_WORDS, "Count.\n</think>\n\n4<e>"),
    "words that go on": ("A:<think>\n", "A:\n\n4<e>", GOES_ON, "Count.\n</think>\n\n4<e>"),
    "words that go on, behind an empty one": (
        "A:<think>\n", "A:<think></think>Count.\n</think>\n\n4<e>", GOES_ON, "Count.\n</think>\n\n4<e>",
    ),
    "another family's mark": ("A:[THINK]", "A:4<e>", THOUGHT, "Count.\n[/THINK]\n\n4<e>"),
    "an empty thought of the prompt's": ("A:<think>\n\n</think>\n\n", "A:4<e>", said("4"), "4<e>"),
    "the same, its end written": ("A:<think></think>", "A:</think>4<e>", said("4"), "4<e>"),
    "the same, all of it written": ("A:<think></think>", "A:<think></think>4<e>", said("4"), "4<e>"),
    "the same, of another family": ("A:<|channel>thought\n<channel|>", "A:4<e>", said("4"), "4<e>"),
    "blanks of the words": ("A:<think></think>", "A: 4<e>", said(" 4"), " 4<e>"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_behind_the_prompt(name):
    start, full, turn, written = WRITTEN[name]
    assert written_behind(start, full, turn, "") == written


REFUSED = {
    "no thought, and the template writes none": ("A:<think>\n", "A:4<e>", said("4"), "has no thought"),
    "no thought, and the answer would be one": ("A:<think>\n", "A:<think>\n4<e>", said("4"), "has no thought"),
    "an empty thought": ("A:<think>\n", "A:<think></think>4<e>", said("4"), "has no thought"),
    "a thought behind an empty one": ("A:<think></think>", "A:4<e>", THOUGHT, "has a thought"),
    "the same, both written": (
        "A:<think></think>", "A:<think></think><think>\nCount.\n</think>\n\n4<e>", IN_WORDS, "has a thought",
    ),
    "an answer that is not there": ("A:<think>\n", "A:5<e>", THOUGHT, "writes '5<e>' of a turn that begins within"),
    "another prompt": ("B:<think>\n", "A:<think>\n4<e>", THOUGHT, "writes the prompt differently"),
    "no thought at all": ("B:", "A:4<e>", said("4"), "writes the prompt differently"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_model_would_write_is_refused(name):
    start, full, turn, reason = REFUSED[name]
    with pytest.raises(TemplateRefuses, match=reason) as caught:
        written_behind(start, full, turn, "; do this")
    assert isinstance(caught.value, ThoughtMissing) == ("thought" in reason)
    assert str(caught.value).endswith("; do this") == ("thought" in reason)


def test_the_option_that_switches_a_thought_is_named():
    for name, option in (("nemotron", "model.template_options.enable_thinking"), ("r1", None)):
        chat = ChatText(family(name).tokenizer)
        with pytest.raises(ThoughtMissing) as caught:
            chat.render([Message(role="user", content="2 + 2?")], ["4"])
        assert ("model.template_options" in str(caught.value)) == bool(option)
        assert (option or "choose another template (model.template=...)") in str(caught.value)


def test_turns_without_their_thoughts():
    assert without_thought(THOUGHT) == without_thought(IN_WORDS) == without_thought(GOES_ON) == said("4")
    ask = Message(role="user", content="2 + 2?")
    turns = (ask, THOUGHT, ask, THOUGHT)
    assert without_earlier_thoughts(turns) == (ask, said("4"), ask, THOUGHT)
    assert without_earlier_thoughts(turns[1:2]) == turns[1:2]


# --- where turns end


def ends(name, template=None):
    tokenizer = copy.deepcopy(family(name).tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    chat = ChatText(tokenizer)
    return chat.ending, chat.tail, set(tokenizer.convert_ids_to_tokens(sorted(chat.end_ids)))


SEVERAL = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|endoftext|><|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}
"""


def test_the_tokens_that_end_a_turn():
    """Its last mark, if others follow as well: one that ends the conversation ends no turn."""
    assert ends("qwen 2.5") == ("<|im_end|>", "\n", {"<|im_end|>"})
    assert ends("qwen 2.5", SEVERAL) == ("<|endoftext|><|im_end|>", "\n<|endoftext|>", {"<|im_end|>"})
    assert ends("gpt-oss") == ("<|return|>", "", {"<|return|>", "<|call|>"})
    assert ends("glm") == ("<|user|>", "", {"<|user|>", "<|observation|>"})


def test_generation_stops_where_calls_end():
    for name in ("gpt-oss", "glm"):
        tokenizer = family(name).tokenizer
        stops = set(tokenizer.convert_ids_to_tokens(sorted(end_of_turn_ids(tokenizer))))
        assert stops == {tokenizer.eos_token, family(name).end, family(name).call_end}
