"""Thought, calls and words of an answer are told apart, and a judge sees what is said behind the thought."""

from dataclasses import replace

import pytest

from dpo_ref.evaluation.judging.judge import answer_pairs
from dpo_ref.generation.parsing import Drawn, parsed
from dpo_ref.generation.records import read_generations, write_generations
from dpo_ref.reports import page
from tests.support.evaluations import answer
from tests.support.tokenizers_here import byte_bpe

SCHEMA = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "[hm]", "close_pattern": r"\[/hm\]\s*", "content": "text"},
        "tool_calls": {
            "open": "<call>", "close_pattern": r"</call>\s*", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}  # fmt: skip
CALL = {"name": "tide", "arguments": {"harbour": "Husum"}}


def drawn(tokenizer, output, prompt="<|im_start|>assistant\n"):
    return Drawn(tokenizer.encode(prompt), tokenizer.encode(output + "<|im_end|>"), output)


def test_by_the_end_of_a_thought():
    tokenizer = byte_bpe()
    opened = "<|im_start|>assistant\n<think>\n"
    answers = [
        drawn(tokenizer, "<think>\nTry 7.\n</think>\n\nNo."),
        drawn(tokenizer, "Try 7.\n</think>\nNo.", opened),
        drawn(tokenizer, "Try 7, then", opened),
        drawn(tokenizer, "No."),
    ]
    said = {"thinking": "Try 7.", "content": "No."}
    assert parsed(tokenizer, answers) == [said, said, {"thinking": "Try 7, then", "content": ""}, None]


def test_by_the_tokenizers_schema():
    tokenizer = byte_bpe()
    if "prefix" not in tokenizer.parse_response.__doc__:
        pytest.skip("this transformers has no response templates")
    tokenizer.response_template = SCHEMA
    output = '[hm]Ask.[/hm]\n<call>{"name": "tide", "arguments": {"harbour": "Husum"}}</call>\nI look.'
    (said,) = parsed(tokenizer, [drawn(tokenizer, output)])
    assert said == {
        "thinking": "Ask.", "content": "I look.", "tool_calls": [{"type": "function", "function": CALL}],
    }  # fmt: skip
    tokenizer.response_template = SCHEMA | {"fields": {"content": {"close_pattern": "(", "content": "text"}}}
    assert parsed(tokenizer, [drawn(tokenizer, output)]) == [None]


SAID = {"thinking": "Ask the harbour.", "content": "I look.", "tool_calls": [{"type": "function", "function": CALL}]}
WHOLE = "<think>Ask the harbour.</think>I look."


def test_a_judge_sees_what_is_said_behind_the_thought(tmp_path):
    theirs = [answer(text="plain", seed=5)]
    ours = [replace(answer(text=WHOLE), parsed=SAID)]
    said = 'I look.\n{"name": "tide", "arguments": {"harbour": "Husum"}}'
    (pair,), (whole,) = answer_pairs(ours, theirs), answer_pairs(ours, theirs, "all")
    assert (pair.output, pair.baseline_output) == (said, "plain")
    assert whole.output == WHOLE
    write_generations(tmp_path / "generations.jsonl", ours)
    assert read_generations(tmp_path / "generations.jsonl") == ours
    html = page._answer("policy", ours[0], 0.5, "gold")
    assert "<details><summary>thought</summary><p>Ask the harbour.</p></details>" in html
    assert "&lt;think&gt;" not in html
