"""Rows that users of other trainers brought, each with the right outcome (`DPO_REF_CASES` names their folder; without
it the same kinds stand in test_said.py, test_layouts.py, test_columns.py and test_readers.py)."""

import os
from pathlib import Path

import pytest

from dpo_ref.data.chat_templates import install_template
from dpo_ref.data.sources import preferences
from dpo_ref.data.tokenise import tokenise
from tests.support.tokenizers_here import byte_bpe

CASES = Path(os.environ.get("DPO_REF_CASES", Path(__file__).parents[3] / "shared" / "cases" / "data"))
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="DPO_REF_CASES names no folder of cases")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prepared(template):
    tokenizer = byte_bpe(CHATML)
    if template.endswith(".jinja"):
        tokenizer.chat_template = (CASES / "templates" / template).read_text()
    elif template:
        install_template(tokenizer, template)
    return tokenizer


def read(name, template="", **options):
    """Prompts and scored responses of a case, as text, and what was said of it."""
    reading = {key: options.pop(key) for key in ("on_bad_row", "max_bad_share", "split") if key in options}
    data = preferences(0, path=str(CASES / name), **reading)
    reading.pop("split", None)
    tokenizer = prepared(template)
    found = tokenise(data.train, tokenizer, **({"max_length": 10_000} | reading | options))
    texts = [(tokenizer.decode(g.prompt_ids), *map(tokenizer.decode, g.response_ids)) for g in found.groups]
    return data, found, texts


def refused(name, template="", **options):
    with pytest.raises(ValueError) as error:
        read(name, template, **options)
    return str(error.value)


CALL = '<call>tide_height {"harbour": "Husum"}</call>'


def test_call_beside_text():
    _, _, texts = read("call_beside_text.jsonl", "writes_calls.jinja")
    assert f"Let me look that up.{CALL}" in texts[0][1]
    assert '{"harbour": "nowhere"}' in texts[0][2]


def test_call_without_text():
    assert read("call_without_text.jsonl", "writes_calls.jinja")[2][0][1].startswith(CALL)


@pytest.mark.parametrize("name", ["tools_column.jsonl", "tool_round_in_prompt.jsonl"])
@pytest.mark.parametrize("template", ["blind_to_tools.jinja", "alpaca", "plain"])
def test_a_template_without_tools(name, template):
    message = refused(name, template)
    assert f"{name} row 1" in message
    assert "tool" in message


def test_arguments_as_json_text():
    assert CALL in read("arguments_as_json_text.jsonl", "writes_calls.jinja")[2][0][0]


def test_explicit_null():
    prompt = read("explicit_null.jsonl", "writes_calls.jinja")[2][0][0]
    assert '"hour": null' in prompt
    assert '"default": null' in prompt


@pytest.mark.parametrize("name", ["reasoning_content.jsonl", "same_answer_other_reasoning.jsonl"])
def test_reasoning(name):
    _, found, texts = read(name, "writes_calls.jinja")
    assert len(found.groups) == 2
    assert texts[0][1].startswith("<think>\nTry small divisors of 91.\n</think>\nNo")
    assert texts[0][2].startswith("<think>\n")
    assert "reasoning_content" in refused(name, "blind_to_tools.jinja")


def test_thought_in_text():
    assert "leaves out part of what turn 2 says" in refused("thought_in_text.jsonl", "strips_thoughts.jinja")


def test_one_system_turn():
    assert "data.on_bad_row=skip" in refused("one_system_turn.jsonl", "refuses_system.jinja")
    _, found, _ = read("one_system_turn.jsonl", "refuses_system.jinja", on_bad_row="skip", max_bad_share=0.5)
    assert len(found.groups) == 4
    assert found.counts["dropped, bad rows: the chat template refuses: no system role here"] == 1


def test_sides_that_differ_in_blanks():
    _, found, _ = read("differ_in_blanks.jsonl", "trims.jinja")
    assert not len(found.groups)
    assert sum(count for name, count in found.counts.items() if "same tokens" in name) == 3


def test_sides_that_differ_in_unicode_form():
    from tokenizers import normalizers

    data, tokenizer = preferences(0, path=str(CASES / "differ_in_unicode_form.jsonl")), prepared("")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert not len(tokenise(data.train, tokenizer, max_length=99).groups)


def test_sides_that_differ_behind_the_cut():
    _, found, _ = read("differ_behind_the_cut.jsonl", max_length=96, over_length="truncate_response")
    assert not len(found.groups)


PROMPTS = {
    "prompt_in_question.jsonl": ("system\nYou are brief.", "Where does the river Elbe end?"),
    "prompt_in_instruction.jsonl": ("Correct the spelling.", "I haev time."),
    "messages_beside_sides.jsonl": ("Where does the river Elbe end?",),
    "sharegpt_pairs.jsonl": ("Where does the river Elbe end?",),
    "rejected_response.jsonl": ("Where does the river Elbe end?",),
    "messages_as_json_text.jsonl": ("user\nWhere does the Elbe end?",),
    "messages_as_python_text.csv": ("user\nWhere does the Elbe end?",),
    "alpaca_history.jsonl": ("You are brief.", "Where does the Elbe end?", "In the sea.", "And which is longer?"),
}
ANSWERS = {
    "prompt_in_question.jsonl": ("The Elbe ends in the North Sea.", "The Elbe ends in a lake."),
    "prompt_in_instruction.jsonl": ("The sentence is: I have time.", "The sentence is: I haev time."),
    "messages_as_json_text.jsonl": ("In the sea.", "In a lake."),
    "messages_as_python_text.csv": ("In the sea.", "In a lake."),
    "alpaca_history.jsonl": ("The Elbe.",),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_where_the_prompt_is(name):
    prompt, *answers = read(name)[2][0]
    place = 0
    for words in PROMPTS[name]:
        place = prompt.index(words, place)
    expected = ANSWERS.get(name, ("In the North Sea.", "In a lake."))
    assert answers == [f"{words}<|im_end|>" for words in expected]


def test_messages_with_label():
    data, _, _ = read("messages_with_label.jsonl")
    assert [group.labels for group in data.train] == [(True,), (False,), (True,), (False,)]


def test_a_folder_with_splits():
    data, found, _ = read("folder_with_splits")
    lines = (CASES / "folder_with_splits" / "train.jsonl").read_text().splitlines()
    assert len(found.groups) == len(lines)
    assert any("test.jsonl" in note for note in data.reading.notes)


def test_a_folder_with_unknown_kinds():
    message = refused("folder_with_unknown_kinds")
    assert "part-00001.jsonl.zst" in message or "part-00002.arrow" in message


def test_an_array_behind_a_byte_order_mark():
    assert len(read("bom_array.json")[2]) == 2


def test_a_scalar():
    assert "scalar.json" in refused("scalar.json")


def test_images():
    message = refused("images_column.jsonl")
    assert "images" in message
    assert "row 1" in message


def test_already_templated():
    assert "carries the chat template's own turns already" in refused("already_templated.jsonl")


def test_rounds_of_helpsteer():
    prompt = read("helpsteer_rounds.jsonl")[2][0][0]
    assert "<extra_id_1>" not in prompt
    for turn in ("user\nName a river.", "assistant\nElbe.", "user\nWhere does it end?"):
        assert turn in prompt
