"""What the assistant writes behind where generation begins, by hand, for each way in which templates begin and end."""

import copy

import pytest

from dpo_ref.data.chat_templates import ChatText, install_template
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
    "a thought in words behind an empty one that is written": (
        "A:<think>\n", "A:<think>\n\n</think>\n\n<think>\nCount.\n</think>\n\n4<e>", IN_WORDS,
        "Count.\n</think>\n\n4<e>",
    ),
    "the same, where the prompt begins none": (
        "A:", "A:<think></think><think>\nCount.\n</think>\n\n4<e>", IN_WORDS, "<think>\nCount.\n</think>\n\n4<e>",
    ),
    "an empty thought that is ended": (
        "A:<think>\n", "A:<think>\n\n</think>\n\n4<e>", said("4"), "\n</think>\n\n4<e>",
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
    "the same, its beginning not marked": (
        "A:<think></think>", "A:<think></think>Count.\n</think>\n\n4<e>", GOES_ON, "has a thought",
    ),
    "another family's thought": (
        "A:<think>\n", "A:[THINK]Count.[/THINK]4<e>", said("[THINK]Count.[/THINK]4"),
        r"has a thought behind \[THINK\], and the chat template begins one with <think>",
    ),
    "a thought alone, that the template takes for words": (
        "A:<think>\n", "A:<words><think>\nCount.\n</think><e>", said("<think>\nCount.\n</think>"), "writes '<words>",
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
    is_missing = reason in ("has a thought", "has no thought")
    assert isinstance(caught.value, ThoughtMissing) == is_missing
    assert str(caught.value).endswith("; do this") == is_missing


def test_the_option_that_switches_a_thought_is_named():
    for name, option in (("nemotron", "model.template_options.enable_thinking"), ("r1", None)):
        chat = ChatText(family(name).tokenizer)
        with pytest.raises(ThoughtMissing) as caught:
            chat.render([Message(role="user", content="2 + 2?")], ["4"])
        assert ("model.template_options" in str(caught.value)) == bool(option)
        assert (option or "choose another template (model.template=...)") in str(caught.value)


def test_turns_without_their_thoughts():
    assert without_thought(THOUGHT) == without_thought(IN_WORDS) == without_thought(GOES_ON) == said("4")
    for words in ("They write `</think>` and then 4.", "The tags <think> and </think> are so: 4"):
        assert without_thought(said(words)) == said(words)
    ask = Message(role="user", content="2 + 2?")
    turns = (ask, THOUGHT, ask, THOUGHT)
    assert without_earlier_thoughts(turns) == (ask, said("4"), ask, THOUGHT)
    assert without_earlier_thoughts(turns[1:2]) == turns[1:2]


BY_OPTION = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('<think>\n' if thinking else '') }}{% endif %}
"""


def test_a_thought_that_an_option_of_the_row_begins():
    tokenizer = copy.deepcopy(family("qwen 2.5").tokenizer)
    tokenizer.chat_template = BY_OPTION
    chat, ask = ChatText(tokenizer), Message(role="user", content="2 + 2?")
    start, bodies = chat.render([ask], [(THOUGHT,)], None, {"thinking": True})
    assert start.endswith("<|im_start|>assistant\n<think>\n")
    assert bodies == ["Count.\n</think>\n\n4<|im_end|>"]
    with pytest.raises(TemplateRefuses, match="leaves out reasoning_content"):
        chat.render([ask], [(THOUGHT,)])


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


ALWAYS = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|endoftext|><|im_end|>' }}{% endfor %}
{{- '<|im_start|>assistant\n' }}
"""


def test_the_tokens_that_end_a_turn():
    """Its last mark, if others follow as well: one that ends the conversation ends no turn."""
    assert ends("qwen 2.5") == ("<|im_end|>", "\n", {"<|im_end|>"})
    assert ends("qwen 2.5", SEVERAL) == ("<|endoftext|><|im_end|>", "\n<|endoftext|>", {"<|im_end|>"})
    assert ends("qwen 2.5", ALWAYS)[:2] == ("<|endoftext|><|im_end|>", "<|im_start|>assistant\n")
    assert ends("gpt-oss") == ("<|return|>", "", {"<|return|>", "<|call|>"})
    assert ends("glm") == ("<|user|>", "", {"<|user|>", "<|observation|>"})


def test_generation_stops_where_calls_end():
    for name in ("gpt-oss", "glm"):
        tokenizer = family(name).tokenizer
        stops = set(tokenizer.convert_ids_to_tokens(sorted(end_of_turn_ids(tokenizer))))
        assert stops == {tokenizer.eos_token, family(name).end, family(name).call_end}


def test_a_tokenizer_of_several_templates():
    """One for rows without tools, one for rows with."""
    its = family("qwen 3")
    tokenizer = copy.deepcopy(its.tokenizer)
    tokenizer.chat_template = {"default": SEVERAL, "tool_use": its.tokenizer.chat_template}
    install_template(tokenizer, "auto", {"enable_thinking": False})
    assert tokenizer.chat_template["tool_use"].startswith("{%- set enable_thinking = false -%}")
    ask, tool = Message(role="user", content="2 + 2?"), {"type": "function", "function": {"name": "add"}}
    with pytest.raises(TemplateRefuses, match=r"model\.template_options sets it for all rows"):
        ChatText(tokenizer).render([ask], ["4"], None, {"enable_thinking": True})
    start = ChatText(tokenizer).write([[ask]], start=True)[0]
    assert start == "<|im_start|>user\n2 + 2?<|endoftext|><|im_end|>\n<|im_start|>assistant\n"
    start = ChatText(tokenizer).write([[ask]], start=True, tools=(tool,))[0]
    assert start.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_template_that_wants_content_in_parts():
    with pytest.raises(ValueError, match="does not write an answer that is a text; it may want content in parts"):
        ends("qwen 2.5", SEVERAL.replace("m.content", "(m.content | map(attribute='text') | join)"))
