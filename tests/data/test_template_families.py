"""Tools, calls, thoughts and several turns come through the chat templates of the families in use, or the row is
refused for what the family's record says it cannot write. There is no third outcome."""

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_ref.data.sources import preferences
from dpo_ref.data.tokenise import encode_prompts, tokenise
from dpo_ref.types import Message, PromptGroup, turns_of
from tests.support.template_families import NAMES, calls_of, family, features

TEXTS = [
    "hi", "a", "end", "think", "tide", "null", "final", "user", " the cat sat", "trailing \n",
    "\n\nlines\n\n", 'say "no"', "it's", "back\\slash", "{}", "Zürich 潮 🌊", "<b>&amp;</b>", "yes\tno",
    "ends in a backslash\\",
]  # fmt: skip
# No template's marks by chance, and nothing that stands for something in dpo_ref.
ANY = st.text(st.characters(exclude_categories=["Cs", "Co"], exclude_characters="\0<[⟦"), min_size=1, max_size=8)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "tide",
            "description": "Height of the tide",
            "parameters": {
                "type": "object",
                "properties": {
                    "harbour": {"type": "string", "description": "where", "enum": ["Husum", "Büsum"]},
                    "hour": {"type": "integer", "default": None},
                    "notes": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["harbour"],
            },
        },
    },
    {"type": "function", "function": {"name": "a", "parameters": {"type": "object", "properties": {}}}},
)


def user(words):
    return Message(role="user", content=words)


def said(words="", **more):
    return Message(role="assistant", content=words, **more)


def call(name="tide", **arguments):
    return {"id": "callabcde", "type": "function", "function": {"name": name, "arguments": arguments}}


RESULT = Message(role="tool", content='{"metres": 2.4}', tool_call_id="callabcde", name="tide")


def group(*responses, prompt, tools=None, origin="row 7", **more):
    """A pair where there are two responses; one turn of words alone is a text."""
    taken = tuple(
        r[0]["content"] if not isinstance(r, str) and len(r) == 1 and len(r[0]) == 2 else r for r in responses
    )
    pairs = ((0, 1),) if len(taken) == 2 else ()
    return PromptGroup(tuple(prompt), taken, pairs, origin=origin, tools=tools, **more)


# --- rows


_IN_WORDS = ("thought in words behind a question",)


class Writer:
    """Draws what is said; `able`: only what the family can write."""

    def __init__(self, draw, its, able):
        self.draw, self.its, self.able = draw, its, able
        self.words = st.one_of(st.sampled_from([*TEXTS, f"x{its.end}y"]), ANY).filter(str.strip)
        values = st.one_of(st.none(), st.booleans(), st.integers(-9, 999), st.just(0.1), self.words)
        nested = st.one_of(values, st.lists(values, max_size=2), st.dictionaries(self.words, values, max_size=1))
        self.arguments = st.dictionaries(st.sampled_from(["harbour", "hour", "notes", "ü n"]), nested, max_size=2)

    def may(self, *kinds):
        """Whether there is something of these kinds in the row."""
        return self.draw(st.booleans()) and not (self.able and set(kinds) & set(self.its.cannot))

    def thought(self, *kinds):
        return {self.its.thoughts: self.draw(self.words)} if self.may("thought", *kinds) else {}

    def called(self, *kinds):
        """A turn with calls, and the results."""
        count = 2 if self.may("several calls") else 1
        names = st.sampled_from(["tide", "tide_of_all"])
        calls = [
            call(self.draw(names), **self.draw(self.arguments)) | {"id": f"callabc{index:02}"}
            for index in range(count)
        ]
        words = self.draw(self.words) if self.may("words beside calls", "words beside calls, then an answer") else ""
        results = [
            Message(role="tool", content=self.draw(st.one_of(st.just(""), self.words)), tool_call_id=one["id"])
            for one in calls
        ]
        thought = self.thought("thought beside calls, then an answer", *kinds)
        return [said(words, tool_calls=calls, **thought), *results]

    def answer(self, *kinds):
        words, thought = self.draw(self.words), self.thought(*kinds)
        if not thought and self.may(*(kind.replace("thought", "thought in words") for kind in kinds), *_IN_WORDS):
            behind = self.draw(st.sampled_from(["", " ", "\n", "\n\n"]))
            begin = self.draw(st.sampled_from(["<think>\n", ""])) if self.its.begins_within_a_thought else "<think>\n"
            words = f"{begin}{self.draw(self.words)}\n</think>{behind}{words}"
        return said(words, **thought)

    def prompt(self):
        turns = [Message(role="system", content=self.draw(self.words))] if self.may("system") else []
        for _ in range(self.draw(st.integers(0, 2))):
            turns.append(user(self.draw(self.words)))
            if self.may("calls", "results"):
                turns += self.called("earlier thought")
            turns.append(self.answer("earlier thought"))
        turns.append(user(self.draw(self.words)))
        if self.may("calls", "results", "scored behind a result"):
            turns += self.called()
        return turns

    def response(self):
        if self.may("calls"):
            calling = self.called()
            beside = [f"{what} beside calls, then an answer" for what in ("words", "thought")]
            if self.may("results", "scored behind a result", *beside):
                return (*calling, self.answer())
            return tuple(calling[:1])
        if self.may("another question", "scored, then others"):
            return (self.answer("earlier thought"), user(self.draw(self.words)), self.answer())
        return (self.answer(),)


@st.composite
def rows(draw, its, responses=1):
    """Turn structures of all kinds, half of them such as the family can write."""
    writer = Writer(draw, its, draw(st.booleans()))
    options = draw(st.sampled_from([None, *its.options]))
    prompt = writer.prompt()
    return group(
        *(writer.response() for _ in range(responses)),
        prompt=prompt, tools=draw(st.sampled_from([TOOLS, TOOLS[1:]])) if writer.may("tools") else None,
        template_options=options,
    )  # fmt: skip


# --- outcomes


def outcome(its, row, **options) -> Any:
    """The token group, None where nothing is scored, or why it was refused."""
    try:
        return next(iter(tokenise([row], its.tokenizer, max_length=10**6, **options).groups), None)
    except ValueError as error:
        return str(error)


def decoded(its, ids):
    return its.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def scored(its, ids, index=0):
    """The text of a response's scored tokens."""
    mask = ids.scored[index] if ids.scored else [True] * len(ids.response_ids[index])
    return decoded(its, [token for token, counts in zip(ids.response_ids[index], mask, strict=True) if counts])


def holds(its, row, score="last"):
    """Whether the row passes; it is written whole, or refused for what its family cannot write."""
    found, lacking = outcome(its, row, score=score), features(row, score) & set(its.cannot)
    if isinstance(found, str):
        assert found.startswith("row 7 "), found
        assert "chat template" in found
        assert any(re.search(its.cannot[feature], found) for feature in lacking), (lacking, found)
        return False
    assert not lacking
    for index, response in enumerate(row.responses):
        turns = [*(row.prompt if score == "all" else ()), *turns_of(response)]
        expected = "".join(before + answer for before, answer in its.expected(row, response, score))
        assert scored(its, found, index) == expected
        assert its.read(expected) == [one for turn in turns for one in calls_of(turn)]
        assert decoded(its, [*found.prompt_ids, *found.response_ids[index]]) == its.written(row, response)
    return True


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_said_is_scored_or_the_row_is_refused(name, data):
    its = family(name)
    holds(its, data.draw(rows(its)))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_of_all_turns_as_well(name, data):
    its = family(name)
    holds(its, data.draw(rows(its)), score="all")


def unblank(text):
    return "".join(text.split())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_thought_and_answer_are_the_whole(name, data):
    """Blanks between the two are of either."""
    its = family(name)
    row = data.draw(rows(its))
    whole, answer, thought = (outcome(its, row, score_thinking=part) for part in ("all", "answer", "thought"))
    if isinstance(whole, str):
        assert isinstance(answer, str)
        assert isinstance(thought, str)
        return
    (before, answers) = map("".join, zip(*its.expected(row, row.responses[0], "last"), strict=True))
    assert unblank(scored(its, answer)) == unblank(answers)
    assert scored(its, answer).endswith(its.ends)
    assert (thought is None) == (not before.strip())
    if thought is None:
        assert scored(its, answer).lstrip() == answers.lstrip()
        return
    assert unblank(scored(its, thought)) == unblank(before)
    (of_answer,), (of_thought,) = answer.scored, thought.scored
    of_both = whole.scored[0] if whole.scored else [True] * len(of_answer)
    assert [a + b for a, b in zip(of_answer, of_thought, strict=True)] == of_both
    assert answer.response_ids == thought.response_ids == whole.response_ids


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_sides_of_a_pair_share_the_prompt(name, data):
    its, score = family(name), data.draw(st.sampled_from(["last", "all"]))
    row = data.draw(rows(its, responses=2))
    alone = [
        outcome(
            its,
            group(response, prompt=row.prompt, tools=row.tools, template_options=row.template_options),
            score=score,
        )
        for response in row.responses
    ]
    both = outcome(its, row, score=score)
    if any(isinstance(one, str) for one in alone):
        assert isinstance(both, str)
    elif alone[0].response_ids == alone[1].response_ids:
        assert both is None
    else:
        assert [one.prompt_ids for one in alone] == [both.prompt_ids] * 2
        assert [one.response_ids[0] for one in alone] == list(both.response_ids)
        assert [scored(its, one) for one in alone] == [scored(its, both, index) for index in range(2)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_one_bos_where_the_template_writes_one(name, data):
    """Though the tokenizer puts one before every text; and the prompt is as in generation."""
    its = family(name)
    row, bos = data.draw(rows(its)), its.tokenizer.bos_token_id
    found = outcome(its, row)
    if isinstance(found, str):
        return
    if bos is not None:
        assert its.tokenizer("a").input_ids[0] == bos
    assert (found.prompt_ids[0] == bos) == its.writes_bos
    if bos != its.tokenizer.convert_tokens_to_ids(its.end):
        assert [*found.prompt_ids, *found.response_ids[0]].count(bos) == its.writes_bos
    assert found.prompt_ids[:2].count(bos) == its.writes_bos
    if not row.tools and not row.template_options:
        assert encode_prompts(its.tokenizer, [row.prompt]) == [found.prompt_ids]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_becomes_of_a_row_does_not_depend_on_those_before_it(name, data):
    its = family(name)
    several = data.draw(st.lists(rows(its), min_size=2, max_size=4))
    alone = [outcome(its, row) for row in several]
    together = tokenise(several, its.tokenizer, max_length=10**6, on_bad_row="skip", max_bad_share=1.0).groups
    passed = {one.group_index: (one.prompt_ids, one.response_ids, one.scored) for one in together}
    assert passed == {
        index: (one.prompt_ids, one.response_ids, one.scored)
        for index, one in enumerate(alone)
        if not isinstance(one, str)
    }


# --- conversations of many turns


def long_rows(its):
    """Rows of more turns than are written together."""

    @st.composite
    def drawn(draw):
        writer, turns = Writer(draw, its, able=True), []
        for _ in range(draw(st.integers(6, 9))):
            turns.append(user(draw(writer.words)))
            if writer.may("calls", "results", "scored behind a result"):
                turns += writer.called("earlier thought")
            turns.append(writer.answer("earlier thought"))
        return group(turns.pop()["content"], prompt=turns, tools=TOOLS if writer.may("tools") else None)

    return drawn()


def with_all_before(its, row, monkeypatch, **options):
    with monkeypatch.context() as patched:
        patched.setattr("dpo_ref.data.scoring._NEAR", 10**6)
        return outcome(its, row, **options)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_turns_written_with_those_near_them_are_as_with_all_before(name, monkeypatch, data):
    its = family(name)
    row, options = data.draw(long_rows(its)), {"score": "all"}
    options |= data.draw(st.sampled_from([{}, {"score_thinking": "answer"}]))
    found, exact = outcome(its, row, **options), with_all_before(its, row, monkeypatch, **options)
    if isinstance(exact, str):
        assert found == exact
        return
    assert (found.prompt_ids, found.response_ids, found.scored) == (exact.prompt_ids, exact.response_ids, exact.scored)


def written_as(template):
    """Qwen 2.5's record under another template."""
    its = family("qwen 2.5")
    tokenizer = copy.deepcopy(its.tokenizer)
    tokenizer.chat_template = template
    return its._replace(tokenizer=tokenizer)


NUMBERED = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + ' ' + loop.index | string }}
    {{- ': ' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant ' + (messages | length + 1) | string + ': ' }}{% endif %}
"""
MANY = [turn for number in range(12) for turn in (user(f"a{number}"), said(f"b{number}"))][:-1]


def test_a_template_for_which_near_turns_are_not_enough(monkeypatch):
    """It numbers the turns, so that none is written as behind a few others."""
    its, row = written_as(NUMBERED), group("yes", prompt=MANY)
    found, exact = outcome(its, row, score="all"), with_all_before(its, row, monkeypatch, score="all")
    assert found == exact
    assert scored(its, found) == "".join(f"b{number}<|im_end|>" for number in range(11)) + "yes<|im_end|>"
    assert decoded(its, found.response_ids[0]).endswith("<|im_start|>assistant 24: yes<|im_end|>")


MOODY = """
{%- for m in messages %}{{ '<|im_start|>' + m.role }}
    {{- ('. ' if messages | length > 20 and loop.index == PLACE else ': ') + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}
"""


@pytest.mark.parametrize("place", [4, 13, 14])
def test_a_template_that_rewrites_a_turn_once_many_others_follow(place):
    """One of the assistant's first turns, a later one, and one of the user's."""
    its = written_as(MOODY.replace("PLACE", str(place)))
    assert "writes a turn differently once others follow" in outcome(its, group("yes", prompt=MANY), score="all")
    assert outcome(its, group("yes", prompt=MANY[:15]), score="all").scored
    assert outcome(its, group("yes", prompt=MANY)).response_ids


# --- keys, one by one

ROUND = (user("how high?"), said(tool_calls=[call(harbour="Husum")]), RESULT)


def plain(*before, last=None, **more):
    return group((last or said("2.4 metres."),), prompt=(*before, user("and now?")), **more)


def with_thought(its, key):
    thought = {key: "Ask the harbour."}
    return {
        "thought": plain(last=said("No.", **thought)),
        "earlier thought": plain(user("a"), said("b", **thought)),
    }


CASES = {
    "tools": ("tools", plain(tools=TOOLS)),
    "tools that say little": ("tools", plain(tools=TOOLS[1:])),
    "a call in the response": ("tool_calls", plain(last=said(tool_calls=[call(harbour="Husum")]))),
    "a call before": ("tool_calls", group("2.4 metres.", prompt=ROUND)),
    "an earlier call": ("tool_calls", plain(*ROUND, said("2.4 metres."))),
    "the same function called twice": (
        "tool_calls",
        plain(user("a"), said(tool_calls=[call(hour=1), call(hour=2) | {"id": "callabcdf"}]), RESULT,
              RESULT | {"tool_call_id": "callabcdf"}, said("1 or 2")),
    ),
    "an answer that quotes a result": (
        "tool_calls", plain(*ROUND, said('It says {"metres": 2.4}, so wait.'), user("and what is {}?"), said("{}")),
    ),
    "a thought": ("KEY", plain(last=said("No.", KEY="Ask the harbour."))),
    "an earlier thought": ("KEY", plain(user("a"), said("b", KEY="Ask the harbour."))),
    "a system turn": ("", plain(Message(role="system", content="be brief"))),
}  # fmt: skip


def keyed(its, row):
    """The row, thoughts under the family's key."""

    def turned(turn):
        return {its.thoughts if key == "KEY" else key: value for key, value in turn.items()}

    responses = [r if isinstance(r, str) else tuple(map(turned, r)) for r in row.responses]
    return group(*responses, prompt=map(turned, row.prompt), tools=row.tools)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_what_a_family_writes_passes_and_no_more(name, case):
    its = family(name)
    key, row = CASES[case]
    row = keyed(its, row)
    lacking = features(row) & set(its.cannot)
    assert holds(its, row) == (not lacking)
    if lacking and key and "leaves out" in (found := outcome(its, row)):
        assert f"leaves out {key.replace('KEY', its.thoughts)}" in found


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(
    data=st.data(),
    key=st.sampled_from(["rationale", "name", "train", "loss", "weight"]),
    value=st.one_of(st.text("xyz ", min_size=3), st.just(False), st.integers(1000, 9999), st.just(["one", "two"])),
)
def test_a_key_that_no_template_writes_is_refused_wherever_it_stands(name, data, key, value):
    its = family(name)
    turns = [user("a?"), said("b."), user("c?"), said("d.")]
    place = data.draw(st.integers(0, 3))
    turns[place] = turns[place] | {key: value}
    thought = {its.thoughts: "Why?"} if its.begins_within_a_thought else {}
    found = outcome(its, group((turns[3] | thought,), (said("e.", **thought),), prompt=turns[:3]))
    assert isinstance(found, str)
    assert found.startswith("row 7 would lose words: the chat template leaves out ")
    assert key in found


# --- what a property hits too seldom


def passes(name, row, **options):
    """The prompt and what is scored of the first response, as text."""
    its = family(name)
    found = outcome(its, row, **options)
    assert not isinstance(found, str), found
    return decoded(its, found.prompt_ids), scored(its, found)


def refusal(name, row, **options):
    found = outcome(family(name), row, **options)
    assert isinstance(found, str)
    return found


THOUGHTFUL = "<think>\nTry 7.\n</think>\n\n7 is odd."


def test_a_thought_that_is_cut_is_missed_though_it_stands_elsewhere():
    """Of two turns of the same words Qwen 3 and DeepSeek cut the thought of the earlier alone."""
    repeated = group(
        "Yes.", prompt=(user("a"), said(THOUGHTFUL), user("b"), said(THOUGHTFUL, tool_calls=[call()]), RESULT)
    )
    for name in ("qwen 3", "deepseek"):
        assert "leaves out" in refusal(name, repeated)
    assert THOUGHTFUL in passes("hermes, ours", repeated)[0]


@pytest.mark.parametrize("score", ["last", "all"])
def test_a_later_turn_that_begins_with_a_line_break(score):
    """It would share a token with the break that the template writes before it."""
    row = group((said("b"), user("c"), said("\n\nd")), prompt=(user("a"), said("\ne"), user("f")))
    passing = [name for name in NAMES if holds(family(name), row, score)]
    assert {"qwen 2.5", "hermes, ours", "llama 3.1, ours", "tulu", "zephyr"} <= set(passing)


def test_a_result_that_is_written_as_the_users_words():
    """SmolLM 3 does, so that the next turn of the assistant would answer somebody else."""
    row = group("2.4 metres.", prompt=(user("how high?"), said("I look."), RESULT))
    assert "leaves out the role of turn 3" in refusal("smollm 3", row)
    assert holds(family("qwen 2.5"), row)


def test_words_beside_a_call_that_stand_in_the_call_as_well():
    """A template that writes thoughts, but no words beside calls; the first row's turn has as many keys."""
    tokenizer = copy.deepcopy(family("qwen 3").tokenizer)
    either = tokenizer.chat_template.replace("ns.words = m.content", "ns.words = '' if m.tool_calls else m.content")
    assert either != tokenizer.chat_template
    tokenizer.chat_template = either
    thinks = plain(last=said("No.", reasoning_content="Ask the harbour."))
    calls = plain(last=said("tide", tool_calls=[call(harbour="Husum")]))
    for several in ([thinks, calls], [calls, thinks]):
        found = tokenise(several, tokenizer, max_length=999, on_bad_row="skip", max_bad_share=1.0).groups
        assert [several[one.group_index] for one in found] == [thinks]


@pytest.mark.parametrize("behind", ["", " ", "\n\n", "\n\n "])
def test_the_first_word_of_an_answer_is_of_the_answer(behind):
    """Though it is one token with the blank before it."""
    row = plain(last=said(f"<think>\nWhy?\n</think>{behind}the cat sat"))
    for name in ("qwen 2.5", "hermes, ours", "llama 3.1, ours", "tulu"):
        _, answer = passes(name, row, score_thinking="answer")
        _, thought = passes(name, row, score_thinking="thought")
        assert answer.lstrip().removesuffix(family(name).end) == "the cat sat"
        assert thought.rstrip() == "<think>\nWhy?\n</think>"


def test_of_two_calls_of_a_function_both_are_written_or_the_row_is_refused():
    calls = [call(hour=1), call(hour=2) | {"id": "callabcdf"}]
    row = plain(user("at 1 or 2?"), said(tool_calls=calls), RESULT, RESULT | {"tool_call_id": "callabcdf"}, said("2"))
    assert "leaves out tool_calls" in refusal("gpt-oss", row)
    assert '{"hour": 2}' in passes("deepseek", row)[0]


@pytest.mark.parametrize("words", ["think", "hi", "i", "n", "</"])
def test_an_answer_is_not_looked_for_in_the_templates_own_words(words):
    row = plain(last=said(words, reasoning_content="Why?"))
    for name in ("qwen 3", "hermes, ours"):
        assert passes(name, row, score_thinking="answer")[1] == f"{words}<|im_end|>"
        assert passes(name, row, score_thinking="thought")[1] == "<think>\nWhy?\n</think>\n\n"
    assert passes("qwen 3", plain(last=said(words)), score_thinking="answer")[1] == f"{words}<|im_end|>"
    for answer in ("end", "a", "final"):
        assert (
            passes("gpt-oss", plain(last=said(answer, thinking="Why?")), score_thinking="answer")[1]
            == f"{answer}<|return|>"
        )


def test_a_call_is_an_answer_from_its_mark_on():
    row = plain(last=said(tool_calls=[call(harbour="Husum")], reasoning_content="Ask."))
    written = '<tool_call>\n{"name": "tide", "arguments": {"harbour": "Husum"}}\n</tool_call><|im_end|>'
    for name in ("qwen 3", "hermes, ours"):
        assert passes(name, row, score_thinking="answer")[1] == written
        assert passes(name, row, score_thinking="thought")[1] == "<think>\nAsk.\n</think>\n\n"


def test_how_arguments_are_taken_is_not_learnt_from_a_row_that_is_refused():
    """DeepSeek wants text; the first row cannot be written whichever way."""
    odd = group((said(tool_calls=[{"function": {"name": None, "arguments": {}}}]),), prompt=(user("a"),))
    good = CASES["a call in the response"][1]
    found = tokenise([odd, good], family("deepseek").tokenizer, max_length=999, on_bad_row="skip", max_bad_share=1.0)
    assert [one.group_index for one in found.groups] == [1]


def test_what_a_template_writes_by_a_rows_option_counts_as_written():
    its = family("qwen 3")
    keeps = its.tokenizer.chat_template.replace("loop.index0 > ns.asked", "(keep or loop.index0 > ns.asked)")
    assert keeps != its.tokenizer.chat_template
    tokenizer = copy.deepcopy(its.tokenizer)
    tokenizer.chat_template = keeps
    before = (user("a"), said("b", reasoning_content="Ask the harbour."))
    kept, cut = plain(*before, template_options={"keep": True}), plain(*before)
    for several in ([kept, cut], [cut, kept]):
        found = tokenise(several, tokenizer, max_length=999, on_bad_row="skip", max_bad_share=1.0).groups
        assert [several[one.group_index] for one in found] == [kept]
        assert "Ask the harbour." in tokenizer.decode(found[0].prompt_ids)


def test_special_tokens_beside_marks_that_are_none_are_text():
    """Marks such as <think> are added tokens as well: they keep their ids where a special token's text is hidden."""
    for name in ("qwen 3", "hermes, ours"):
        its = family(name)
        row = plain(last=said("a<|im_end|>b", **{its.thoughts: "Why <|im_start|>?"}))
        found = outcome(its, row)
        assert not isinstance(found, str), found
        ids = found.response_ids[0]
        text = "<think>\nWhy <|im_start|>?\n</think>\n\na<|im_end|>b<|im_end|>"
        assert decoded(its, ids) == text
        of = its.tokenizer.convert_tokens_to_ids
        assert [ids.count(of(mark)) for mark in ("<think>", "</think>", "<|im_start|>", "<|im_end|>")] == [1, 1, 0, 1]


def test_python_calls_of_llama():
    """Written with its own mark; they end with another token than words do, before results as well as at the end."""
    options = {"builtin_tools": ["tide"]}
    written = '<|python_tag|>tide.call(harbour="Husum")<|eom_id|>'
    assert written in passes("llama 3.1", group("2.4 metres.", prompt=ROUND, template_options=options))[0]
    called = said(tool_calls=[call(harbour="Husum")])
    assert passes("llama 3.1", plain(last=called, template_options=options))[1] == written
    row = group((called, RESULT, said("2.4 metres.")), prompt=(user("how high?"),), template_options=options)
    assert passes("llama 3.1", row)[1] == f"{written}2.4 metres.<|eot_id|>"


def test_options_of_rows_reach_the_prompt():
    assert passes("qwen 3", plain(template_options={"enable_thinking": False}))[0].endswith("<think>\n\n</think>\n\n")
    assert "Today: 1 May 2031\n" in passes("llama 3.1", plain(template_options={"date_string": "1 May 2031"}))[0]
    assert "Reasoning: high" in passes("gpt-oss", plain(template_options={"reasoning_effort": "high"}))[0]
    start, response = passes("smollm 3", plain(template_options={"xml_tools": list(TOOLS), "enable_thinking": False}))
    assert "Thinking: /no_think" in start
    assert "'name': 'tide'" in start
    assert start.endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    assert response == "2.4 metres.<|im_end|>"


def test_ids_of_calls_that_mistral_does_not_take():
    for row in (CASES["a call before"][1], CASES["an earlier call"][1]):
        turns = [dict(turn) for turn in row.prompt]
        for turn in turns:
            turn |= {"tool_call_id": "c1"} if turn["role"] == "tool" else {}
        assert "ids of calls have 9 characters" in refusal("mistral", group(*row.responses, prompt=turns))


EARLIER = (
    user("a"), said("<think>\nOnce.\n</think>\n\nb"), user("c"), said("d", reasoning_content="Twice."),
    user("how high?"), said(reasoning_content="Ask the harbour.", tool_calls=[call(harbour="Husum")]), RESULT,
)  # fmt: skip


def test_thoughts_before_the_last_question_can_be_left_out(tmp_path):
    """As Qwen 3 would show them to the model; those behind the question stay."""
    path = tmp_path / "rows.jsonl"
    row = {"prompt": EARLIER, "chosen": "2.4 metres.", "rejected": "Who knows?"}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "a?"}) + "\n")
    whole = preferences(0, path=str(path)).train
    remedy = "data.earlier_thoughts=drop leaves out all thoughts before the prompt's last question"
    assert remedy in refusal("qwen 3", whole[0])
    assert remedy in refusal("qwen 3", plain(user("a"), said("b", reasoning_content="Once.")))
    assert remedy not in refusal("mistral", plain(last=said("b", reasoning_content="Once.")))
    data = preferences(0, path=str(path), earlier_thoughts="drop")
    assert data.reading.notes == ("prompts without their earlier thoughts: 1",)
    assert data.train[0].prompt == (user("a"), said("b"), user("c"), said("d"), *EARLIER[4:])
    assert data.train[1] == whole[1]
    prompt, response = passes("qwen 3", data.train[0])
    assert prompt.count("think>") == 2
    assert "<think>\nAsk the harbour.\n</think>\n\n<tool_call>" in prompt
    assert response == "<think>\n\n</think>\n\n2.4 metres.<|im_end|>"
