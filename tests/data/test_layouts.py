"""Corners of the layouts that people bring: what is read from which column, however a conversation is written down."""

import json
import re

import pytest

from dpo_ref.data import sources
from dpo_ref.data.formats.recognise import FORMATS
from dpo_ref.data.sources import Reader, Rules
from dpo_ref.data.tokenise import tokenise
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.unpaired import bco, sft
from dpo_ref.training.rounds import groups_for
from dpo_ref.types import Message
from tests.support.command import ROOT
from tests.support.format_rows import CALL, CASES, WEATHER, turns
from tests.support.tokenizer_families import FAMILIES


def user(content):
    return {"role": "user", "content": content}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
ASK, YES, NO = user("why?"), said("because"), said("no idea")
LOOK_UP = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "why"}}}]
PAIR = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}


def groups_of(*rows, **rules):
    return list(Reader(Rules(**rules), "rows").groups([(f"row {n}", row) for n, row in enumerate(rows, start=1)]))


def refused(*rows, **rules):
    with pytest.raises(ValueError) as error:
        groups_of(*rows, **rules)
    assert len(str(error.value)) < 400
    return str(error.value)


# --- where the prompt is


PROMPTS = {
    "prompt": ({"prompt": "why?"}, turns("why?")),
    "a turn alone": ({"prompt": ASK}, turns("why?")),
    "parts of text": (
        {"prompt": [user([{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}])]}, turns("why?"),
    ),
    "messages": ({"messages": [SYSTEM, ASK]}, turns("why?", system="Be brief.")),
    "conversation": ({"conversation": [{"from": "user", "value": "why?"}]}, turns("why?")),
    "instruction": ({"instruction": "why?"}, turns("why?")),
    "instruction and input": ({"instruction": "why?", "input": "Rain."}, turns("why?\n\nRain.")),
    "instruction of messages": ({"instruction": [ASK]}, turns("why?")),
    "question": ({"question": "why?", "system_prompt": "Be brief."}, turns("why?", system="Be brief.")),
    "query": ({"query": "why?", "history": [["Hi", "Yes?"]]}, turns("Hi", "Yes?", "why?")),
    "history of messages": ({"query": "why?", "history": [user("Hi"), said("Yes?")]}, turns("Hi", "Yes?", "why?")),
    "history as text": ({"query": "why?", "history": "[['Hi', 'Yes?']]"}, turns("Hi", "Yes?", "why?")),
    "input": ({"input": "why?", "system": ""}, turns("why?")),
    "null before": ({"prompt": None, "question": "why?"}, turns("why?")),
    "the same twice": ({"prompt": "why?", "question": "why?", "conversation": [ASK]}, turns("why?")),
    "markers of hh": (
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: why?\n\nAssistant:"}, turns("Hi", "Yes?", "why?"),
    ),
    "markers of NeMo": (
        {"prompt": "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nwhy?\n<extra_id_1>Assistant\n"},
        turns("why?", system="Be brief."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_is_read_from_its_column(name):
    """Not from the words that both answers begin with."""
    columns, prompt = PROMPTS[name]
    (group,) = groups_of(columns | {"chosen": "The reason is rain.", "rejected": "The reason is you."})
    assert (group.prompt, group.responses) == (prompt, ("The reason is rain.", "The reason is you."))
    (group,) = groups_of(columns | {"completion": "because"})
    assert (group.prompt, group.responses) == (prompt, ("because",))
    (group,) = groups_of(columns | {"responses": ["bees", "because"], "scores": [1, 2]})
    assert (group.prompt, group.responses) == (prompt, ("because", "bees"))


def test_messages_may_hold_the_better_answer_too():
    (group,) = groups_of({"messages": [SYSTEM, ASK, YES], "chosen": "because", "rejected": [NO]})
    assert (group.prompt, group.responses) == (turns("why?", system="Be brief."), ("because", "no idea"))
    assert "has a prompt that ends with a turn of assistant" in refused(
        {"messages": [ASK, said("bees")], "chosen": "because", "rejected": "no idea"}
    )


@pytest.mark.parametrize("name", ["task", "title", "Frage", "document", "user_text", "source"])
def test_common_words_are_no_prompt_beside_a_column_that_could_be(name):
    row = {"chosen": "The reason is rain.", "rejected": "The reason is you.", "margin": "0.5", "annotator": "ann"}
    assert f"row 1 has no column prompt, and {name} may be it: data.columns={{prompt: {name}}}" in refused(
        row | {name: "Say why."}
    )
    (group,) = groups_of(row | {name: "Say why."}, columns=(("prompt", name),))
    assert group.prompt == turns("Say why.")
    assert groups_of(row | {name: "Say why."}, ignore=(name,))[0].prompt == turns("The reason is")
    assert groups_of(row | {name: 7, "source": "sharegpt"})[0].prompt == turns("The reason is")


SIDES = {
    "bare": ([YES], [NO]),
    "the whole of it": ([ASK, YES], [ASK, NO]),
    "one and one": ([ASK, YES], "no idea"),
    "a system turn in both": ([SYSTEM, ASK, YES], [SYSTEM, ASK, NO]),
    "a dialogue of hh": ("\n\nHuman: why?\n\nAssistant: because", "\n\nHuman: why?\n\nAssistant: no idea"),
    "JSON": (json.dumps([ASK, YES]), json.dumps(NO)),
    "Python": (str([ASK, YES]), str([NO])),
    "ShareGPT": (
        [{"from": "human", "value": "why?"}, {"from": "chatgpt", "value": "because"}],
        {"from": "model", "value": "no idea"},
    ),
    "lists": (
        {"role": ["user", "assistant"], "content": ["why?", "because"]},
        {"from": ["gpt"], "value": ["no idea"]},
    ),
}


@pytest.mark.parametrize("name", SIDES)
def test_sides_however_they_are_written(name):
    chosen, rejected = SIDES[name]
    (group,) = groups_of({"prompt": "why?", "chosen": chosen, "rejected": rejected})
    assert group.prompt == turns("why?", system="Be brief." if "system" in name else None)
    assert group.responses == ("because", "no idea")


def test_sides_that_do_not_fit():
    assert "has a chosen whose conversation begins with another prompt" in refused(
        {"chosen": [ASK, YES], "rejected": [ASK, NO], "prompt": [SYSTEM, user("who?")]}
    )
    message = refused({"chosen": [YES], "rejected": [NO]})
    assert "row 1 has no prompt, and chosen or rejected begins with the assistant" in message


def test_turns_after_the_prompt_are_answers():
    """Two turns of a user behind the prompt belong to what is scored, on each side its own."""
    more = [user("and?"), said("bees")]
    (group,) = groups_of(PAIR | {"chosen": [YES, *more], "rejected": [NO]})
    assert group.responses == ((YES, *more), "no idea")
    (group,) = groups_of({"chosen": [ASK, YES, *more], "rejected": [ASK, NO, user("so?"), said("nothing")]})
    assert group.prompt == turns("why?")
    assert group.responses == ((YES, *more), (NO, user("so?"), said("nothing")))
    (group,) = groups_of({"chosen": [ASK, YES, *more], "rejected": [ASK, YES, more[0], NO]})
    assert group.prompt == turns("why?", "because", "and?")


def test_lists_that_are_no_turns():
    cut = {"role": ["user", "assistant"], "content": ["why?"]}
    assert "row 1 has lists of different lengths in role, content, which together are turns" in refused(
        {"chosen": cut, "rejected": [ASK, NO]}
    )
    nameless = {"role": ["user", "assistant"], "content": ["why?", None], "tool_calls": [None, LOOK_UP]}
    (group,) = groups_of({"chosen": nameless, "rejected": [ASK, NO]})
    assert group.responses == ((said("", tool_calls=LOOK_UP),), "no idea")


def test_other_names_of_roles_and_of_calls():
    """OpenAI's later developer, and its earlier function and function_call."""
    before = [{"role": "developer", "content": "Be brief."}, ASK]
    called = {"role": "assistant", "content": None, "function_call": LOOK_UP[0]["function"]}
    result = {"role": "function", "name": "look_up", "content": "rain"}
    (group,) = groups_of({"prompt": [*before, called, result], "chosen": "because", "rejected": "no idea"})
    now = (said("", tool_calls=LOOK_UP), {"role": "tool", "name": "look_up", "content": "rain"})
    assert group.prompt == (*turns("why?", system="Be brief."), *now)
    (group,) = groups_of({"prompt": before, "chosen": [called], "rejected": "no idea"})
    assert group.responses == ((said("", tool_calls=LOOK_UP),), "no idea")
    two = groups_of({"prompt": [ASK, called | {"tool_calls": LOOK_UP}, result], "chosen": "a", "rejected": "b"})
    assert two[0].prompt[1]["function_call"] == LOOK_UP[0]["function"]  # which no template writes


def test_functions_on_offer_are_not_said_by_a_call():
    row = {"prompt": "why?", "chosen": [said("", tool_calls=LOOK_UP)], "rejected": "no idea"}
    offer = [{"name": "look_up", "parameters": {}}]
    assert "has a column functions that format preference does not read; data.columns={tools: functions}" in refused(
        row | {"functions": offer}
    )
    assert groups_of(row | {"functions": offer}, columns=(("tools", "functions"),))[0].tools == tuple(offer)
    assert groups_of(row | {"function_names": ["look_up"]})[0].tools is None


# --- conversations as text


@pytest.mark.parametrize("before", ["", "\n", " \n\n", "\r\n\r\n"])
def test_dialogues_whatever_comes_before_them(before):
    dialogue = f"{before}Human: why?\n\nAssistant: rain?\n\nHuman: why?\n\nAssistant:"
    for prompt in (dialogue, dialogue.removesuffix("\n\nAssistant:"), dialogue.replace("\n", "\r\n")):
        (group,) = groups_of(PAIR | {"prompt": prompt})
        assert group.prompt == turns("why?", "rain?", "why?")
    assert groups_of(PAIR | {"prompt": "Human: why?"})[0].prompt == turns("Human: why?")  # no dialogue
    assert "has the marker 'Assistant:' at the beginning of chosen" in refused(
        PAIR | {"prompt": dialogue, "chosen": "\n\nAssistant: because"}
    )


TEXTS = {
    "a list of something": '["role:", "content:"]',
    "an object": '{"role": "nurse", "content": "A nurse\'s day"}',
    "a list of people": '[{"role": "nurse", "content": "x"}, {"role": "cook", "content": "y"}]',
    "no list": "[I do not know.",
    "code": '[{"role": "user", "content": "hi"}] is a list of messages in JSON.',
    "a list in a list": '[[{"role": "user", "content": "hi"}]]',
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_begins_like_a_list_stays_text(name):
    (group,) = groups_of(PAIR | {"chosen": TEXTS[name]})
    assert group.responses[0] == TEXTS[name]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ASK, YES])[:-20],
        str([ASK, YES])[:-8],
        "[{'role': 'user', 'content': 'why?'}\n {'role': 'assistant', 'content': 'because'}]",  # as numpy prints
        "{'from': 'gpt', 'value': 'it's'}",
        "array([{'role': 'user', 'content': 'why?'}], dtype=object)",
        "({'role': 'user', 'content': 'why?'},)",
        " " * 40 + json.dumps([ASK, YES])[:-20],
    ],
)
def test_messages_that_were_cut_or_printed_are_refused(text):
    assert "row 1 has messages as text in chosen that is neither JSON nor Python" in refused(PAIR | {"chosen": text})


ODD = {
    "capitals": ([{"from": "Human", "value": "why?"}], "has the unknown speaker 'Human'"),
    "capital roles": ([{"role": "User", "content": "why?"}], "has the unknown role 'User'"),
    "null beside": ([ASK, None], "with a turn that is not {role"),
    "words under another name": ([{"role": "user", "text": "why?"}], "has null in"),
}


@pytest.mark.parametrize("name", ODD)
def test_messages_as_text_are_refused_as_they_are_in_lists(name):
    messages, message = ODD[name]
    for prompt in (messages, json.dumps(messages), str(messages)):
        assert message in refused(PAIR | {"prompt": prompt})


def test_unknown_speakers_in_text_are_refused_as_in_lists():
    messages = [{"from": "human", "value": "why?"}, {"from": "bard", "value": "because"}]
    for conversations in (messages, json.dumps(messages)):
        assert "has the unknown speaker 'bard' in conversations; known are system, human," in refused(
            {"conversations": conversations}
        )


# --- tools, options, calls


CONVERSATIONAL = """trl_explicit trl_conversational_implicit kto kto_messages kto_alpaca sharegpt sharegpt_pairs
    swift_rejected_response alpaca alpaca_pairs sft_completion sft_messages hh ultrafeedback alpaca_farm helpsteer2
    helpsteer3 helpsteer2_preference safe_rlhf ranked_scores trajectories nectar rejected_response"""


@pytest.mark.parametrize("name", [name for name in CONVERSATIONAL.split() if name in CASES])
def test_tools_and_options_reach_the_group(name):
    forms = ([WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)])
    for tools in forms:
        more = {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
        for before, after in zip(
            groups_of(*CASES[name].rows), groups_of(*(row | more for row in CASES[name].rows)), strict=True
        ):
            assert after.tools == (WEATHER,)
            assert after.template_options == {"enable_thinking": False}
            assert (after.prompt, after.responses) == (before.prompt, before.responses)
            assert after.group_id != before.group_id


def test_rows_of_one_prompt_with_other_tools_are_not_one_group():
    rows = [row | {"tools": [{"name": name}]} for row, name in zip(CASES["helpsteer2"].rows[:2], "ab", strict=True)]
    with pytest.raises(ValueError, match="no usable row: 2 one response alone"):
        groups_of(*rows)


CALLS = {
    "as an object": [CALL],
    "arguments as text": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
    "without function": [{"name": "weather", "arguments": {"city": "Rome"}}],
    "all as text": json.dumps([CALL]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_however_it_is_written(name):
    (group,) = groups_of(PAIR | {"chosen": [said(None, tool_calls=CALLS[name])], "rejected": [said("18 degrees")]})
    assert group.responses == ((Message(role="assistant", content="", tool_calls=[CALL]),), "18 degrees")


def test_a_call_keeps_what_it_says_and_its_order():
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "now", "arguments": "", "strict": True},
        "index": None,
    }
    (group,) = groups_of(PAIR | {"chosen": [said("", tool_calls=[call])]})
    (turn,) = group.responses[0]
    assert turn["tool_calls"] == [call | {"function": {"name": "now", "arguments": {}, "strict": True}}]
    assert list(turn["tool_calls"][0]) == ["type", "id", "function", "index"]


RESULT = {"role": "tool", "content": "18 degrees"}


@pytest.mark.parametrize(
    ("caller", "result"),
    [
        (said(None, tool_calls=[CALL]), RESULT),
        (said(None, tool_calls=[CALL | {"id": "c1"}]), RESULT),
        (said(None, tool_calls=[CALL]), RESULT | {"tool_call_id": "c1"}),
        (said(None, tool_calls=[CALL | {"id": "c0"}, CALL | {"id": "c1"}]), RESULT),  # of both
        (said('<tool_call>{"name": "weather"}</tool_call>'), RESULT),
    ],
)
def test_results_behind_their_calls(caller, result):
    (group,) = groups_of(PAIR | {"prompt": [ASK, caller, result]})
    assert [turn["role"] for turn in group.prompt] == ["user", "assistant", "tool"]
    assert group.prompt[2] == result


def answers(*ids, **more):
    return [RESULT | {"tool_call_id": id_} | more for id_ in ids]


WIND = {"type": "function", "function": {"name": "wind", "arguments": {}}}
BOTH = (CALL | {"id": "c0"}, WIND | {"id": "c1"})
ASTRAY = {
    "one of two": (BOTH, answers("c0"), "has 1 results for 2 calls in prompt: turn 3"),
    "in another order": (
        BOTH, answers("c1", "c0"), "has results in prompt: turn 4 that answer c1, c0, while the calls are c0, c1",
    ),
    "one of them twice": (BOTH, answers("c0", "c0"), "that answer c0, c0, while the calls are c0, c1"),
    "one too many": ((CALL,), answers("c0", "c1"), "has 2 results for 1 calls in prompt: turn 4"),
    "in another order, by name": (
        (CALL, WIND), [RESULT | {"name": "wind"}, RESULT | {"name": "weather"}],
        "that answer wind, weather, while the calls are weather, wind",
    ),
    "of no call": ((CALL,), [RESULT | {"name": "tide"}], "answers 'tide', while the calls before it are weather"),
}  # fmt: skip


@pytest.mark.parametrize("name", ASTRAY)
def test_results_that_are_not_one_for_each_call_in_order(name):
    """Templates tell by their order which result is whose."""
    calls, results, message = ASTRAY[name]
    assert message in refused(PAIR | {"prompt": [ASK, said("", tool_calls=list(calls)), *results]})


ROME = {"city": "Rome"}
NAMED = {
    "LangChain": {"name": "weather", "args": ROME},
    "Llama": {"function": {"name": "weather", "parameters": ROME}},
    "Anthropic": {"type": "tool_use", "name": "weather", "input": ROME},
    "beside the function": {"function": {"name": "weather"}, "arguments": json.dumps(ROME)},
    "the function by its name": {"function": "weather", "arguments": ROME},
}


@pytest.mark.parametrize("name", NAMED)
def test_arguments_under_their_other_names(name):
    (group,) = groups_of(PAIR | {"chosen": [said("", tool_calls=[NAMED[name]])]})
    assert group.responses[0][0]["tool_calls"] == [CALL]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (CALL | {"arguments": {"city": "Kiel"}}, "with two arguments, beside function and in it"),
        ({"name": "weather", "arguments": ROME, "args": ROME}, "under two names"),
        ({"name": "weather", "parameter_values": ROME}, "with parameter_values, which is not read"),
        ({"function": {"name": "weather", "arguments": {}, "payload": ROME}}, "with payload, which is not read"),
        ({"function": [1]}, "as a call's function"),
    ],
)
def test_calls_of_which_something_would_be_lost(call, message):
    assert message in refused(PAIR | {"chosen": [said("", tool_calls=[call])]})


def test_openais_rows_as_text():
    request = {"messages": [ASK], "tools": [WEATHER]}
    row = {"input": request, "preferred_output": [YES], "non_preferred_output": [NO]}
    for written in (row, {name: json.dumps(value) for name, value in row.items()}):
        (group,) = groups_of(written)
        assert (group.prompt, group.responses, group.tools) == (turns("why?"), ("because", "no idea"), (WEATHER,))


# --- several responses


RANKED = {
    "scores": ({"responses": ["a", "b", "c"], "scores": [1, 3, 2]}, ("b", "a")),
    "rewards as text": ({"responses": ["a", "b", "c"], "rewards": ["1", "3", "2"]}, ("b", "a")),
    "ratings": ({"responses": ["a", "b"], "ratings": [1, 3]}, ("b", "a")),
    "ranks": ({"responses": ["a", "b", "c"], "ranks": [2, 3, 1]}, ("c", "b")),
    "objects": ({"responses": [{"text": "a", "score": 1, "model": "m"}, {"text": "b", "score": 2}]}, ("b", "a")),
    "ranked objects": ({"answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]}, ("b", "a")),
    "objects beside scores": ({"responses": [{"content": "a"}, {"content": "b"}], "scores": [1, 2]}, ("b", "a")),
    "whole trajectories": ({"trajectories": [[ASK, NO], [ASK, YES]], "rewards": [0, 1]}, ("because", "no idea")),
    "objects with turns": (
        {"trajectories": [{"messages": [NO], "reward": 0}, {"messages": [YES], "reward": 1}]}, ("because", "no idea"),
    ),
    "the best first": ({"responses": ["a", "b"], "logprobs": [-3.0, -2.0], "lengths": [1, 1]}, ("a", "b")),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKED)
def test_responses_in_the_order_of_their_scores(name):
    columns, responses = RANKED[name]
    (group,) = groups_of({"prompt": "why?"} | columns)
    assert (group.prompt, group.responses, group.pairs) == (turns("why?"), responses, ((0, 1),))


def test_an_order_is_not_guessed_beside_numbers_that_could_say_it():
    row = {"prompt": "why?", "responses": ["a", "b"], "helpful": [0.1, 0.9]}
    assert "has helpful, which may score its responses: data.columns={scores: helpful} reads it so" in refused(row)
    assert groups_of(row, columns=(("scores", "helpful"),))[0].responses == ("b", "a")
    assert groups_of(row, ignore=("helpful",))[0].responses == ("a", "b")
    row = {"prompt": "why?", "trajectories": [[NO], [YES]]}
    assert "has trajectories without scores; a list of scores, rewards, ratings, ranks orders them" in refused(row)


def test_which_of_two_judgements_of_safe_rlhf():
    row = CASES["safe_rlhf"].rows[0]
    assert groups_of(row, rating="safer_response_id")[0].responses == ("Wood", "Iron")
    assert "has 'both' in safer_response_id, where true or false" in refused(
        row | {"safer_response_id": "both"}, rating="safer_response_id"
    )


# --- demonstrations and labels


def test_unwanted_demonstrations_are_not_fitted(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": [ASK, said(words)], "label": label} for words, label in (("good", True), ("bad", 0.0))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = sources.preferences(0, path=str(tmp_path / "rows.jsonl"))
    tokenizer = FAMILIES["qwen: byte-level, no BOS, ChatML"]().tokenizer
    groups = tokenise(data.train, tokenizer).groups
    fitted = [tokenizer.decode(ids) for group in groups_for(bind(sft), groups) for ids in group.response_ids]
    assert fitted == ["good<|im_end|>"]
    assert [group.labels for group in groups_for(bind(bco), groups)] == [(True,), (False,)]


def test_a_label_that_is_none():
    rows = [{"messages": [ASK, YES], "label": True}, {"messages": [ASK, YES], "label": None}]
    assert "row 2 has null in label, so it looks like format messages, while the rows before are unp" in refused(*rows)
    assert "row 1 has 'maths' in label, where true or false (1 or 0) is expected" in refused(
        rows[0] | {"label": "maths"}
    )
    assert groups_of(rows[1])[0].labels is None


def test_mixed_types_in_one_column():
    rows = [PAIR, PAIR | {"prompt": [SYSTEM, ASK], "chosen": [YES]}, PAIR | {"chosen": json.dumps([YES])}]
    assert [group.responses for group in groups_of(*rows)] == [("because", "no idea")] * 3


def test_columns_of_no_format_are_told_how_to_be_called():
    pair = {"Question": "why?", "good_chosen": "because", "bad_rejected": "no idea"}
    names = "data.columns={prompt: Question, chosen: good_chosen, rejected: bad_rejected}"
    assert names in refused(pair)
    given = (("chosen", "good_chosen"), ("prompt", "Question"), ("rejected", "bad_rejected"))
    assert groups_of(pair, columns=given)[0].responses == ("because", "no idea")
    assert "data.columns={completion: response}" in refused({"prompt": "why?", "response": "because"})
    assert "data.columns={prompt: ..., completion: ...}" in refused({"x": 1, "y": 2})


EXAMPLES = re.findall(r"^\{.*\}$", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_rows_in_the_documentation_are_read(line):
    reader = Reader(Rules(), "rows")
    assert len(list(reader.groups([("the example", json.loads(line))]))) == 1
    assert reader.reading.notes == ()


def test_the_documentation_names_every_format():
    page = (ROOT / "docs" / "data.md").read_text()
    table = "".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))
    assert set(FORMATS) <= set(re.findall(r"`(\w+)`", table))
    assert len(EXAMPLES) >= 14
