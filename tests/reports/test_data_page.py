"""The page on data: what differs between two texts, whose the tokens are, what was read, rows to look at."""

import re
from contextlib import nullcontext

import numpy as np

from dpo_ref.data.anomalies import anomalies
from dpo_ref.data.inspection import examples_of, inspect, tokens_by_role
from dpo_ref.data.tokenise import tokenise
from dpo_ref.reports.data import Looked, data_page, difference
from dpo_ref.types import Message, PreferenceData, PromptGroup, Reading, silent
from tests.data.test_said import RESULT, STRIPS, TOOL, WRITES, call, said, user
from tests.support.pages import parsed
from tests.support.pictures import undrawn
from tests.support.tokenizers_here import byte_bpe


def sides(html):
    """What the first and the second text say that the other does not."""
    return [re.findall(f'<{tag} class="token">(.*?)</{tag}>', html, re.DOTALL) for tag in ("ins", "del")]


def test_differences_are_words():
    assert sides(difference("the cat sat down", "the dog sat down")) == [[" cat"], [" dog"]]
    assert sides(difference("a b c d e", "a b c d e")) == [[], []]
    assert sides(difference("one  two", "one two")) == [["  two"], [" two"]]
    assert sides(difference("", "a <b>")) == [[], ["a &lt;b&gt;"]]


def test_words_that_both_have_by_chance_are_no_common_ground():
    assert sides(difference("who are you all", "they are not all")) == [["who are you"], ["they are not"]]
    kept = difference("x one two three y end", "z one two three w end")
    assert sides(kept) == [["x", " y"], ["z", " w"]]


def test_what_both_begin_with_is_folded_and_long_texts_end():
    opening = " ".join(f"word{i}" for i in range(40))
    html = difference(f"{opening} yes", f"{opening} no")
    assert "both begin with the same 40 words" in html
    assert sides(html) == [[" yes"], [" no"]]
    assert "<summary>" not in difference("a few words alike, yes", "a few words alike, no")
    middle = difference(f"a {opening} b", f"c {opening} d")
    assert "[24 words alike]" in middle
    assert "word20" not in middle
    long = difference(" a" * 1000, " b" * 500)
    assert "600 words of the first and 100 of the second go on" in long


UNREAD = Reading()


def page_of(groups, template=WRITES, reading=UNREAD, pictures=undrawn, **options):
    tokenizer = byte_bpe(template)
    data = PreferenceData(groups, [], [], reading)

    def write(some):
        return tokenise(some, tokenizer, max_length=10_000, **options)

    train, held_out = write(groups), write([])
    roles = tokens_by_role(tokenizer, train.groups)
    looked = Looked(
        examples=examples_of(tokenizer, train.groups),
        roles=roles,
        sampled=roles,
        num_sampled=len(train.groups),
        findings=anomalies(data, train, held_out, write, silent),
    )
    with pictures():
        return data_page(inspect(data, train, held_out), np.array([]), looked, "title")


def test_turns_tools_and_tokens_by_role():
    acted = (said("", tool_calls=call(harbour="Bay")), RESULT, said("2.4 m"))
    page = page_of([PromptGroup((user("how high?"),), (acted, "it is low"), ((0, 1),), tools=(TOOL,))])
    titles = re.findall(r"<b>([a-z: ]+) · ([^<]*)</b>", page)
    assert [title for title, _ in titles] == [
        "user", "assistant", "chosen: assistant", "chosen: tool", "chosen: assistant", "rejected: assistant",
    ]  # fmt: skip
    assert all(counts.endswith(" read") for title, counts in titles if title in ("user", "assistant", "chosen: tool"))
    assert re.fullmatch(r"\d+ scored", titles[-1][1])
    assert "Tools on offer: tide" in page
    assert "Chosen against rejected, word by word" in page
    rows = re.findall(r'<th scope="row">([a-z]+)</th>(.*?)</tr>', page)
    assert [role for role, _ in rows] == ["user", "assistant", "tool"]
    assert re.findall(r"<span>(.*?)</span>", rows[2][1])[1::2] == ["0", "0"]
    parsed(page)


def test_lengths_that_are_alike_are_labelled_in_numbers():
    groups = [PromptGroup((user(f"how {i}?"),), ("by foot" * 2, "by boat"), ((0, 1),)) for i in range(3)]
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", page_of(groups, pictures=nullcontext))
    assert "tokens" in labels
    assert len([label for label in labels if label.isdigit()]) > 3
    assert not [label for label in labels if "$" in label or "math" in label]


def test_columns_and_what_the_template_leaves_out():
    notes = ("columns not read: note, <b>", "no prompts were found")
    groups = [PromptGroup((user(f"how {i}?"),), ("by foot", "by boat"), ((0, 1),)) for i in range(3)]
    page = page_of(groups, reading=Reading(3, notes=notes))
    assert "<dt>columns not read</dt><dd>note, &lt;b&gt;</dd>" in page
    assert "<dt>note</dt><dd>no prompts were found</dd>" in page
    assert "nothing (every word of 3 groups was looked for)" in page
    groups.append(PromptGroup((user("how?"),), ("hm</think>by foot", "by boat"), ((0, 1),)))
    page = page_of(groups, STRIPS, on_bad_row="skip", max_bad_share=0.5)
    assert "nothing (every word of 3 groups was looked for); 1 groups were dropped" in page


def test_rows_to_look_at_can_be_opened_and_kinds_without_any_are_named():
    prompt = (Message(role="system", content="be brief"), user("what <now>?"))
    page = page_of([PromptGroup(prompt, ("Wait a bit", "wait a  bit"), ((0, 1),), origin="row 7")])
    assert re.search(r"<summary>pairs whose sides differ in blanks, .* alone<small>1</small></summary>", page)
    assert "<span>row 7</span> what &lt;now&gt;?</p>" in page
    assert "<dt>pairs whose sides are in different scripts</dt><dd>none</dd>" in page
    assert page.count("<summary>pairs whose") == 1
