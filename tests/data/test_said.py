"""Nothing that was said is lost on its way through a chat template, or the row is refused for it."""

import json
import math
import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ref.data.chat_templates import date_note, install_template
from dpo_ref.data.tokenise import tokenise, tokenised_once
from dpo_ref.types import Message, PromptGroup, silent
from tests.support.tokenizers_here import byte_bpe

OPEN = "{{ '<|im_start|>' + m.role + '\\n' }}"
CLOSE = "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
BLIND = "{% for m in messages %}" + OPEN + "{{ m.content }}" + CLOSE
TRIMS = "{% for m in messages %}" + OPEN + "{{ m.content | trim }}" + CLOSE
STRIPS = (
    "{% for m in messages %}" + OPEN + "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}" + CLOSE
)  # fmt: skip
WRITES = (
    "{% for t in tools or [] %}{{ '<tool>' + (t | tojson) + '</tool>\\n' }}{% endfor %}{% for m in messages %}" + OPEN
    + "{% if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</call>' }}{% endfor %}" + CLOSE
)  # fmt: skip
TAKES_TEXT = WRITES.replace("(c.function.arguments | tojson)", "c.function.arguments")
LAST_USER_ONLY = (  # thoughts before the user's last turn are left out, as Qwen 3 does
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}" + OPEN + "{% if m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif %}{{ m.content or '' }}" + CLOSE
)  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "Height of the tide",
        "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}, "hour": {"default": None}}},
    },
}


def user(words):
    return Message(role="user", content=words)


def said(words="", **more):
    return Message(role="assistant", content=words, **more)


def call(**arguments):
    return [{"id": "c1", "type": "function", "function": {"name": "tide", "arguments": arguments}}]


RESULT = Message(role="tool", content='{"metres": 2.4}', tool_call_id="c1", name="tide")


ASKED = (user("how high is it?"),)


def group(*responses, prompt=ASKED, tools=None, origin="row 1", **more):
    pairs = ((0, 1),) if len(responses) == 2 else ()
    return PromptGroup(tuple(prompt), responses, pairs, origin=origin, tools=tools, **more)


def written(template, *groups, **options):
    """What is scored of every response, and the prompts, as text."""
    tokenizer = byte_bpe(template)
    texts = []
    for ids in tokenise(groups, tokenizer, max_length=10_000, **options).groups:
        masks = ids.scored or [[True] * len(response) for response in ids.response_ids]
        scored = [
            tokenizer.decode([t for t, kept in zip(r, mask, strict=True) if kept])
            for r, mask in zip(ids.response_ids, masks, strict=True)
        ]
        texts.append((tokenizer.decode(ids.prompt_ids), scored))
    return texts


def refused(template, *groups, **options):
    with pytest.raises(ValueError) as error:
        written(template, *groups, **options)
    return str(error.value)


def test_calls_and_thoughts_are_scored():
    chosen = (said("I look.", reasoning_content="Ask the harbour.", tool_calls=call(harbour="Husum", hour=None)),)
    ((_, scored),) = written(WRITES, group(chosen, "No idea.", tools=(TOOL,)))
    assert scored == [
        '<think>\nAsk the harbour.\n</think>\nI look.<call>tide {"harbour": "Husum", "hour": null}</call><|im_end|>',
        "No idea.<|im_end|>",
    ]


def test_arguments_come_as_the_template_takes_them():
    chosen = (said(tool_calls=call(harbour="Husum")),)
    for template in (WRITES, TAKES_TEXT):
        ((_, scored),) = written(template, group(chosen, "No."))
        assert scored[0] == '<call>tide {"harbour": "Husum"}</call><|im_end|>'


ROUND = (user("how high?"), said(tool_calls=call(harbour="Husum")), RESULT)
LOST = {
    "a call beside words": (BLIND, group((said("x", tool_calls=call(harbour="Husum")),), "y"), "tool_calls of a turn"),
    "a call in the prompt": (BLIND, group("a", "b", prompt=ROUND), "leaves out tool_calls of a turn of assistant"),
    "tools": (BLIND, group("a", "b", tools=(TOOL,)), "leaves out tools ('tide')"),
    "a thought": (BLIND, group((said("a", reasoning_content="t"),), "b"), "reasoning_content of a turn of assistant"),
    "another name of a thought": (WRITES, group((said("a", rationale="t"),), "b"), "leaves out rationale"),
    "a thought in the words": (
        STRIPS, group("<think>\nhm\n</think>\n\nNo.", "<think>\nwell\n</think>\n\nNo."), "part of what turn 2 says"
    ),
    "an earlier thought": (
        LAST_USER_ONLY,
        group("c", "d", prompt=(user("a"), said("b", reasoning_content="because"), user("more?"))),
        "reasoning_content of a turn of assistant before the user's last",
    ),
    "a speaker's name": (WRITES, group("a", "b", prompt=(user("hi") | {"name": "Ada"},)), "leaves out name"),
    "a flag": (WRITES, group("a", "b", prompt=(user("hi") | {"train": False},)), "leaves out train of a turn of user"),
    "a role": ("alpaca", group("a", "b", prompt=(user("u"), said("x"), RESULT)), "writes a tool's result as the"),
    "a role in plain": ("plain", group("a", "b", prompt=(user("u"), said("x"), RESULT)), "writes a tool's result as"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_would_be_lost_is_refused(name):
    template, rows, reason = LOST[name]
    tokenizer = byte_bpe(BLIND)
    if "{" not in template:
        install_template(tokenizer, template)
        template = tokenizer.chat_template
    message = refused(template, rows)
    assert message.startswith("row 1 would lose words: the chat template leaves out ")
    assert reason in message


@settings(max_examples=60, deadline=None)
@given(
    key=st.from_regex(r"[a-z_]{1,12}", fullmatch=True).filter(lambda key: key not in ("role", "content")),
    value=st.one_of(st.text(min_size=1), st.integers(), st.booleans(), st.lists(st.text(min_size=1), min_size=1)),
    place=st.integers(0, 3),
)
def test_no_unknown_key_of_a_turn_passes(key, value, place):
    """Whatever the key, whatever turn it is in: a template that does not write it is not used for the row."""
    turns = [user("a?"), said("b."), user("c?"), said("d.")]
    turns[place] = turns[place] | {key: value}
    if key == "tool_calls":
        return
    if turns[place]["role"] == "assistant" and key == "reasoning_content" and isinstance(value, str):
        return
    rows = group((turns[3],), "e.", prompt=turns[:3]) if len(turns[3]) > 2 else group("d.", "e.", prompt=turns[:3])
    assert f"leaves out {key}" in refused(WRITES, rows)


CUTS = {
    "no thought, though its words are those of the answer": (
        BLIND, said("hi", reasoning_content="hi"), "reasoning_content of a turn of assistant ('hi')",
    ),
    "part of a thought": (
        WRITES.replace("m.reasoning_content + ", "m.reasoning_content[:8] + "),
        said("hi", reasoning_content="Ask the harbour."), "part of reasoning_content of turn 2",
    ),
    "part of the arguments": (
        WRITES.replace("(c.function.arguments | tojson)", "(c.function.arguments | tojson)[:17]"),
        said(tool_calls=call(harbour="Husum", hour=7)), "part of tool_calls of turn 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_what_is_written_in_part_is_refused(name):
    template, turn, missing = CUTS[name]
    row = PromptGroup((user("how high?"),), ((turn,),), origin="row 7")
    with pytest.raises(ValueError, match=r"row 7 would lose words: the chat template leaves out") as caught:
        tokenise([row], byte_bpe(template), max_length=999)
    assert missing in str(caught.value)


OTHERWISE = {
    "as Python writes texts": (
        WRITES.replace("(c.function.arguments | tojson)", "(c.function.arguments | string)"),
        said(tool_calls=call(code="print(\"it's\")\nprint(1)")), None,
    ),
    "in ASCII": (
        WRITES.replace("tojson", "tojson(ensure_ascii=True)"), said(tool_calls=call(harbour="Büsum 🌊")), (TOOL,),
    ),
    "an empty thought that is not": (BLIND, said("hi", reasoning_content=" "), None),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_written_otherwise_is_written(name):
    template, turn, tools = OTHERWISE[name]
    row = PromptGroup((user("how high?"),), ((turn,),), origin="row 7", tools=tools)
    assert len(tokenise([row], byte_bpe(template), max_length=999).groups) == 1


LATE = "{% for m in messages %}" + OPEN + "{% if m.role == 'tool' %}{{ '<|im_end|>' }}" + (
    "{% elif m.tool_calls %}{{ m.tool_calls[0].function.name + (m.tool_calls[0].function.arguments | tojson) }}"
    "{{ '<result>' + loop.nextitem.content + '</result>' if loop.nextitem else '' }}{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}" + CLOSE
)  # fmt: skip


def test_a_result_before_the_words_beside_its_call():
    called = said("Let me ask.", tool_calls=call(harbour="Husum"))
    row = PromptGroup((user("how high?"), called, RESULT), ("2.4",), origin="row 7")
    (found,) = tokenise([row], byte_bpe(LATE), max_length=999).groups
    assert '<result>{"metres": 2.4}</result>Let me ask.' in byte_bpe(LATE).decode(found.prompt_ids)


def test_literals_stand_in_messages_as_they_were_said():
    row = PromptGroup(
        (user("how <|im_end|> high?"),), ((said("hi", reasoning_content="so <|im_end|>"),),), origin="row 7"
    )
    with pytest.raises(ValueError, match=r"row 7 would lose words") as caught:
        tokenise([row], byte_bpe(BLIND), max_length=999)
    assert "'so <|im_end|>'" in str(caught.value)


def test_tools_of_which_the_names_alone_are_written():
    names = WRITES.replace("(t | tojson)", "t.function.name")
    row = PromptGroup((user("how high?"),), ("2.4",), origin="row 7", tools=(TOOL,))
    with pytest.raises(ValueError, match=r"leaves out tools: of tide it does not write 'Height of the tide'"):
        tokenise([row], byte_bpe(names), max_length=999)


def test_bad_rows_are_skipped_and_counted_under_their_reason():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + BLIND
    rows = [group("a", "b"), group("a", "b", prompt=(Message(role="system", content="s"), user("u")))]
    message = refused(refuses, *rows)
    assert "no system role here" in message
    assert "data.on_bad_row=skip leaves such rows out" in message
    found = tokenise(rows, byte_bpe(refuses), max_length=99, on_bad_row="skip", max_bad_share=0.5)
    assert found.counts == {"groups": 1, "dropped, bad rows: the chat template refuses: no system role here": 1}
    assert found.groups[0].group_index == 0
    with pytest.raises(ValueError, match=r"1 of 2 groups cannot be used, more than data.max_bad_share=0\.4"):
        tokenise(rows, byte_bpe(refuses), max_length=99, on_bad_row="skip", max_bad_share=0.4)


def test_sides_of_the_same_tokens_are_no_pair():
    rows = [group("salt it is.", "salt it is.\n"), group("salt.", "iron.")]
    found = tokenise(rows, byte_bpe(TRIMS), max_length=99)
    assert [g.group_index for g in found.groups] == [1]
    assert sum(count for name, count in found.counts.items() if "both sides are the same tokens" in name) == 1
    long = group("the same words and then this", "the same words and then that")
    cut = tokenise([long], byte_bpe(TRIMS), max_length=99, max_response_length=4, over_length="truncate_response")
    assert not len(cut.groups)
    assert cut.counts["pairs dropped: both sides are the same tokens once they are cut"] == 1


def test_of_a_ranked_list_only_the_pairs_of_equal_tokens_go():
    rows = PromptGroup((user("u"),), ("a", "a ", "b"), ((0, 1), (0, 2), (1, 2)), origin="row 1")
    (found,) = tokenise([rows], byte_bpe(TRIMS), max_length=99).groups
    assert found.pairs == ((0, 2), (1, 2))


TRAJECTORY = (said("I look.", tool_calls=call(harbour="Husum")), RESULT, said("2.4 metres."))


def test_a_response_of_several_turns():
    """Scored are the assistant's turns through the token that ends each; the tool's result is only read."""
    ((prompt, scored),) = written(WRITES, group(TRAJECTORY, "No idea."))
    assert prompt.endswith("<|im_start|>assistant\n")
    assert scored == [
        'I look.<call>tide {"harbour": "Husum"}</call><|im_end|>2.4 metres.<|im_end|>',
        "No idea.<|im_end|>",
    ]


def test_of_all_turns_those_of_the_prompt_count_as_well():
    rows = group(TRAJECTORY, "No.", prompt=(user("hi"), said("hello"), user("how high?")))
    ((prompt, scored),) = written(WRITES, rows, score="all")
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert scored[1] == "hello<|im_end|>No.<|im_end|>"
    assert scored[0].startswith("hello<|im_end|>I look.<call>")


def test_a_template_that_rewrites_a_trajectory_is_refused():
    turns = (said("x", reasoning_content="first"), user("go on"), said("y"))
    assert "leaves out reasoning_content" in refused(LAST_USER_ONLY, group(turns, "b"))
    earlier = "{{ ' (earlier)' if m.role == 'assistant' and not loop.last else '' }}"
    rewrites = BLIND.replace("{{ m.content }}", "{{ m.content }}" + earlier)
    message = refused(rewrites, group((said("x"), user("go on"), said("y")), "b"))
    assert "writes a turn differently once others follow" in message


THOUGHTS = {
    "a key": group((said("No.", reasoning_content="Try 7."),), (said("Yes.", reasoning_content="It is odd."),)),
    "in the words": group("<think>\nTry 7.\n</think>\nNo.", "<think>\nIt is odd.\n</think>\nYes."),
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_what_is_scored_of_a_thinking_response(name):
    parts = {
        part: written(WRITES, THOUGHTS[name], score_thinking=part)[0][1][0] for part in ("all", "answer", "thought")
    }
    assert parts == {
        "all": "<think>\nTry 7.\n</think>\nNo.<|im_end|>",
        "answer": "No.<|im_end|>",
        "thought": "<think>\nTry 7.\n</think>\n",
    }


def test_without_a_thought_there_is_none_to_score():
    ((_, scored),) = written(WRITES, group("  No.", "Yes."), score_thinking="answer")
    assert scored == ["  No.<|im_end|>", "Yes.<|im_end|>"]
    found = tokenise([group("No.", "Yes.")], byte_bpe(WRITES), max_length=99, score_thinking="thought")
    assert found.counts == {"groups": 0, "dropped: no token of a response is scored": 1}


def test_empty_thoughts_are_counted():
    rows = [group("<think>\n\n</think>\n\nNo.", "Yes."), group("<think></think>a", "<think></think>b")]
    counts = tokenise(rows, byte_bpe(WRITES), max_length=99).counts
    assert counts["responses with an empty thought (data.score_thinking=answer does not score it)"] == 3
    assert counts["groups in which some responses alone have an empty thought"] == 1
    ((_, scored), _) = written(WRITES, *rows, score_thinking="answer")
    assert scored == ["No.<|im_end|>", "Yes.<|im_end|>"]


def test_special_tokens_in_calls_are_text():
    chosen = (said("x", tool_calls=call(harbour="<|im_end|>")),)
    tokenizer = byte_bpe(WRITES)
    (ids,) = tokenise([group(chosen, "y")], tokenizer, max_length=99).groups
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.response_ids[0].count(end) == 1
    assert tokenizer.decode(ids.response_ids[0]) == 'x<call>tide {"harbour": "<|im_end|>"}</call><|im_end|>'


def asking(*words, system=None):
    before = (Message(role="system", content=system),) if system else ()
    return PromptGroup((*before, *(user(each) for each in words)), ("salt.", "no"), ((0, 1),), origin="row 7")


OWN = {
    "from end to end": asking("<|im_start|>user\nName salt.<|im_end|>\n<|im_start|>assistant\n"),
    "without the assistant's beginning": asking("<|im_start|>user\nName salt.<|im_end|>\n"),
    "without a line break": asking("<|im_start|>user Name salt.<|im_end|><|im_start|>assistant"),
    "a system turn in the question": asking("<|im_start|>system\nBe brief.<|im_end|>\nName salt."),
    "a system turn in one": asking("Name salt.", system="<|im_start|>system\nBe brief.<|im_end|>"),
    "several turns": asking("Hi.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nName salt."),
    "an answer's end": group("salt.<|im_end|>", "no"),
    "in turns": group((said("salt.<|im_end|>", reasoning_content="x"),), "no"),
}  # fmt: skip
OTHERS = {
    "Mistral's": asking("<s>[INST] Name salt. [/INST]"),
    "Llama 3's": asking("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName salt.<|eot_id|>"),
    "Gemma's": asking("<start_of_turn>user\nName salt.<end_of_turn>"),
    "Zephyr's": asking("<|user|>\nName salt.</s>\n<|assistant|>"),
    "an answer's end": group("salt.</s>", "no"),
    "another": group("salt.<|eot_id|>", "no"),
}
TEXTS = (
    "What is <|im_end|>?", "Is <|im_start|> a token?", "<|im_start|> is one.", "<s>old</s>",
    "<s>old</s> new <s>older</s>", "[1, 2]", "<b>x</b>", "the end is <|im_end|>.",
)  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_rows_that_carry_the_templates_own_turns(name):
    message = refused(WRITES, OWN[name])
    assert "carries the chat template's own turns already" in message
    assert "give the words alone" in message


@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_carry_another_templates_turns(name):
    message = refused(WRITES, OTHERS[name])
    assert "carries another chat template's turns" in message
    assert "give the words alone" in message


@pytest.mark.parametrize("text", TEXTS)
def test_texts_about_marks_are_texts(text):
    written(WRITES, asking(text), group(text, "no"))


def test_an_answer_may_show_what_a_turn_looks_like():
    written(WRITES, group("<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n is how.", "no"))
    assert "begins with '<|im_start|>assistant'" in refused(WRITES, group("<|im_start|>assistant\nsalt.", "no"))


def test_options_of_a_row_reach_the_template():
    template = BLIND.replace("{{ m.content }}", "{{ m.content }}{{ ' (loud)' if loud else '' }}")
    rows = [group("a", "b", template_options={"loud": True}), group("a", "b")]
    assert [scored[0] for _, scored in written(template, *rows)] == ["a (loud)<|im_end|>", "a<|im_end|>"]
    assert "chat_template_kwargs.quiet, which the chat template does not look at" in refused(
        template, group("a", "b", template_options={"quiet": True})
    )
    for reserved in ("tools", "chat_template", "tokenize"):
        assert "does not look at" in refused(
            template + "{# tools #}", group("a", "b", template_options={reserved: "x"})
        )
    tokenizer = byte_bpe(template)
    install_template(tokenizer, "auto", {"loud": False})
    with pytest.raises(ValueError, match=r"model\.template_options sets it for all rows"):
        tokenise(rows[:1], tokenizer, max_length=99)


@pytest.mark.parametrize("name", ["hermes", "llama31"])
def test_our_templates_that_write_calls(name):
    tokenizer = byte_bpe(BLIND, bos="<|begin_of_text|>")
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *marks]})
    install_template(tokenizer, name)
    prompt = (Message(role="system", content="be brief"), *ROUND)
    rows = group("2.4 metres.", "no", prompt=prompt, tools=(TOOL,)), group(TRAJECTORY, "no", tools=(TOOL,))
    first, second = tokenise(rows, tokenizer, max_length=10_000).groups
    text = tokenizer.decode(first.prompt_ids)
    assert first.prompt_ids.count(tokenizer.bos_token_id) == 1
    for words in ("be brief", json.dumps(TOOL), '"name": "tide"', '{"harbour": "Husum"}', '{"metres": 2.4}'):
        assert words in text
    assert second.scored is not None
    assert not all(second.scored[0])


def test_a_pair_of_calls_trains(tmp_path):
    """The log-probs of a masked trajectory are those of its tokens read one by one."""
    from dpo_ref.data.packing import collate
    from dpo_ref.models.logps import response_logps
    from tests.support.tiny import naive_logps, tiny_model

    tokenizer = byte_bpe(WRITES)
    groups = list(tokenise([group(TRAJECTORY, "No idea.", tools=(TOOL,))], tokenizer, max_length=10_000).groups)
    model = tiny_model(vocab_size=len(tokenizer))
    sums = response_logps(model, collate(groups)).sums
    assert groups[0].scored is not None
    expected = [
        sum(value for value, kept in zip(values.tolist(), mask, strict=True) if kept)
        for values, mask in zip(naive_logps(model, groups[0]), groups[0].scored, strict=True)
    ]
    assert all(map(math.isfinite, expected))
    assert sums.tolist() == pytest.approx(expected, abs=1e-3)


SYSTEM = Message(role="system", content="be brief")
LONG = [turn for n in range(6) for turn in (user(f"q{n}?"), said(f"a{n}."))]


def size_of(rows, template=BLIND):
    (ids,) = tokenise([rows], byte_bpe(template), max_length=10_000).groups
    return len(ids.prompt_ids) + max(map(len, ids.response_ids))


@pytest.mark.parametrize("score", ["last", "all"])
def test_whole_turns_are_left_out_from_the_front(score):
    """As few as it takes; the system turn stays, both sides lose the same; the rest is written as if it were all."""
    long = group("yes.", "no!", prompt=(SYSTEM, *LONG, user("q6?")))
    short = group("yes.", "no!", prompt=(SYSTEM, *LONG[-6:], user("q6?")))
    tokenizer = byte_bpe(BLIND)
    options = {"max_length": size_of(short), "over_length": "truncate_turns", "score": score}
    found = tokenise([long, short], tokenizer, **options)
    assert found.counts == {"groups": 2, "prompts without their first turns": 1}
    first, second = found.groups
    assert (first.prompt_ids, first.response_ids, first.scored) == (
        second.prompt_ids,
        second.response_ids,
        second.scored,
    )
    nothing = tokenise([long], tokenizer, **(options | {"max_length": 12}))
    assert nothing.counts == {"groups": 0, "dropped: too long even with the last question alone": 1}


def test_tools_results_are_cut_first():
    result = RESULT | {"content": "ebb and flood " * 40}
    rows = group("2.4.", "no!", prompt=(user("q0?"), said("a0."), *ROUND[:2], result))
    limit = size_of(rows, WRITES) - 60
    found = tokenise([rows], byte_bpe(WRITES), max_length=limit, over_length="truncate_tool_results")
    assert found.counts == {"groups": 1, "groups with tools' results cut": 1}
    text = byte_bpe(WRITES).decode(found.groups[0].prompt_ids)
    assert "q0?" in text
    assert limit - 20 < len(found.groups[0].prompt_ids) + max(map(len, found.groups[0].response_ids)) <= limit
    assert 200 < text.count("ebb and flood") * 14 < 560


@pytest.mark.parametrize(("date", "folders"), [("", 1), ("{{ strftime_now('%H') }}", 2)])
def test_the_date_that_a_template_writes_is_in_the_key(date, folders, tmp_path, monkeypatch):
    tokenizer, rows = byte_bpe(date + BLIND), [group("a", "b")]
    for zone in ("UTC", "XXX-12"):  # half a day apart
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        tokenised_once(rows, tokenizer, partial(tokenise, max_length=99), "identity", tmp_path, silent)
    monkeypatch.undo()
    time.tzset()
    assert len(list((tmp_path / "tokens").iterdir())) == folders
    assert bool(date_note(tokenizer)) is (folders == 2)


@pytest.mark.parametrize("name", ["chatml", "hermes"])
def test_a_mark_that_is_bos_as_well_is_written_once(name):
    """SmolLM2's BOS is <|im_start|>, which ChatML writes before every turn."""
    tokenizer = byte_bpe(BLIND, bos="<|im_start|>")
    install_template(tokenizer, name)
    (ids,) = tokenise([group("a", "b")], tokenizer, max_length=99).groups
    assert tokenizer.decode(ids.prompt_ids).startswith("<|im_start|>user\n")
    other = byte_bpe(BLIND, bos="<s>")
    install_template(other, name)
    (ids,) = tokenise([group("a", "b")], other, max_length=99).groups
    assert other.decode(ids.prompt_ids).startswith("<s><|im_start|>user\n")
