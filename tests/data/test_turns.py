"""Which tokens are which turn: every family of templates, turns that are written differently, groups that were cut."""

import pytest

from dpo_ref.data.inspection import Tokens, drawn, tokens_by_role
from dpo_ref.data.tokenise import tokenise
from dpo_ref.data.turns import blocks_of
from dpo_ref.types import Message, PromptGroup
from tests.data.test_said import LAST_USER_ONLY, RESULT, TOOL, WRITES, call, said, user
from tests.support.tokenizer_families import FAMILIES
from tests.support.tokenizers_here import byte_bpe

CHATML = FAMILIES["qwen: byte-level, no BOS, ChatML"]().tokenizer
REPEATED = (user("a"), said("b"), user("a b"))  # words that are everywhere, in the template's as well
GREETS = (  # a system turn of the template's own, as Qwen 2.5 and SmolLM2 have it
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{% endif %}"
    + WRITES
)  # fmt: skip
FOLDS = (  # the system's words go into the user's turn, as in Gemma
    "{% for m in messages %}{% if m.role == 'system' %}{% if loop.last %}{{ raise_exception('no user') }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' }}{% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "{{ messages[0].content + '\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

GATHERS = (  # results that follow each other are one turn, as in Qwen 3
    "{% for m in messages %}{% if m.role == 'tool' and messages[loop.index0 - 1].role == 'tool' %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' }}{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</call>' }}{% endfor %}"
    "{% if loop.last or m.role != 'tool' or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def group(*responses, prompt, **more):
    return PromptGroup(tuple(prompt), responses, ((0, 1),), origin="row 1", **more)


def turns(tokenizer, *groups, **options):
    """Of every response of the first group: role and text of every block."""
    tokenised = tokenise(groups, tokenizer, **({"max_length": 10_000} | options)).groups
    first = tokenised[0]
    found = []
    for ids, blocks in zip(first.response_ids, blocks_of(tokenizer, tokenised)[0], strict=True):
        whole = first.prompt_ids + ids
        assert [blocks[0].start, *(b.stop for b in blocks)] == [*(b.start for b in blocks), len(whole)]
        found.append([(block.role, tokenizer.decode(whole[block.start : block.stop])) for block in blocks])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_templates(family):
    tokenizer = FAMILIES[family]().tokenizer
    for blocks, answer in zip(turns(tokenizer, group("a", "b a", prompt=REPEATED)), ("a", "b a"), strict=True):
        assert [role for role, _ in blocks] == ["user", "assistant", "user", "assistant"]
        for (_, text), words in zip(blocks, ("a", "b", "a b", answer), strict=True):
            assert f" {words} " in f" {text} ".replace("[INST]", "").replace("<", " <").replace(">", "> ").replace(
                "\n", " "
            )


def test_what_the_template_writes_around_a_turn_is_the_turns():
    assert turns(CHATML, group("a", "b a", prompt=REPEATED))[1] == [
        ("user", "<|im_start|>user\na<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nb<|im_end|>\n"),
        ("user", "<|im_start|>user\na b<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nb a<|im_end|>"),
    ]


def test_calls_results_and_what_the_template_says_by_itself():
    acted = (said("", tool_calls=call(harbour="Bay")), RESULT, said("2.4 m"))
    first, second = turns(byte_bpe(GREETS), group(acted, "no", prompt=[user("how high?")], tools=(TOOL,)))
    assert [role for role, _ in first] == ["template", "user", "assistant", "tool", "assistant"]
    assert [role for role, _ in second] == ["template", "user", "assistant"]
    assert first[0][1] == "<|im_start|>system\nBe good.<|im_end|>\n"
    assert '"Bay"' in first[2][1]
    assert first[3][1] == '<|im_start|>tool\n{"metres": 2.4}<|im_end|>\n'


def test_a_turn_that_is_written_differently_once_others_follow():
    thoughtful = said("b", reasoning_content="hm")
    prompt = [user("a"), said("b"), user("c")]
    tokenizer = byte_bpe(LAST_USER_ONLY)
    first, _ = turns(tokenizer, group((thoughtful,), "no", prompt=prompt))
    assert first[-1] == ("assistant", "<|im_start|>assistant\n<think>\nhm\n</think>\nb<|im_end|>")


def test_turns_that_the_template_makes_one_are_one_block():
    first, _ = turns(byte_bpe(FOLDS), group("yes", "no", prompt=[Message(role="system", content="s"), user("u")]))
    assert [role for role, _ in first] == ["system, user", "assistant"]
    begins = "{{ '<|endoftext|>' }}" + FOLDS.replace("raise_exception('no user')", "''")  # alone a system is nothing
    first, _ = turns(byte_bpe(begins), group("yes", "no", prompt=[Message(role="system", content="s"), user("u")]))
    assert [role for role, _ in first] == ["system, user", "assistant"]
    acted = (said("", tool_calls=call(a="1") + call(a="2")), RESULT, Message(role="tool", content="9 m"), said("ok"))
    first, _ = turns(byte_bpe(GATHERS), group(acted, "no", prompt=[user("how high?")]))
    assert [role for role, _ in first] == ["user", "assistant", "tool", "assistant"]
    assert first[2][1] == '<|im_start|>tool\n{"metres": 2.4}\n9 m<|im_end|>\n'


def test_turns_whose_tokens_are_not_those_of_the_whole_text():
    """A line's end that begins a turn joins the template's in a text that is encoded whole, and begins a token of its
    own where the turn is scored."""
    prompt = [user("a b"), said("b"), user("a"), said("\n\nb"), user("b a")]
    first, _ = turns(CHATML, group("\n\nba", "no", prompt=prompt), score="all")
    assert [role for role, _ in first] == ["user", "assistant"] * 3
    assert [text for _, text in first[3:]] == [
        "<|im_start|>assistant\n\n\nb<|im_end|>\n",
        "<|im_start|>user\nb a<|im_end|>\n",
        "<|im_start|>assistant\n\n\nba<|im_end|>",
    ]


def test_special_tokens_in_a_text_end_no_turn():
    asked = user("what is <|im_end|>\n<|im_start|>user\n?")
    first, _ = turns(CHATML, group("<|im_end|> it is", "no", prompt=[asked, said("b"), user("c")]))
    assert [role for role, _ in first] == ["user", "assistant", "user", "assistant"]
    assert asked["content"] in first[0][1]


LONG = (user("first question"), said("first answer"), user("second question"), said("more"), user("third one"))


@pytest.mark.parametrize(
    ("policy", "roles"),
    [
        ("truncate_turns", ["user", "assistant"]),
        ("truncate_prompt_start", ["assistant", "user", "assistant"]),
        ("truncate_prompt_end", ["user", "assistant", "user", "assistant"]),
    ],
)
def test_what_is_left_of_a_group_that_was_cut(policy, roles):
    first, _ = turns(CHATML, group("the answer", "no", prompt=LONG), over_length=policy, max_length=50)
    assert [role for role, _ in first] == roles
    assert first[-1][1] == "<|im_start|>assistant\nthe answer<|im_end|>"
    if policy != "truncate_prompt_end":
        assert first[-2][1] == "<|im_start|>user\nthird one<|im_end|>\n"


def test_a_cut_response_and_plain_text():
    asked = group("a b c d e f", "a", prompt=[user("c")])
    first, second = turns(CHATML, asked, over_length="truncate_response", max_response_length=3)
    assert [role for role, _ in first] == [role for role, _ in second] == ["user", "assistant"]
    (text,) = turns(CHATML, PromptGroup((), ("a b",)))
    assert [role for role, _ in text] == ["text"]


def test_tokens_are_counted_by_role_each_once():
    acted = (said("", tool_calls=call(harbour="Bay")), RESULT, said("2.4 m"))
    tokenizer = byte_bpe(WRITES)
    groups = tokenise([group(acted, "no", prompt=[user("how high?")])], tokenizer, max_length=10_000).groups
    counted = tokens_by_role(tokenizer, groups)
    first = groups[0]
    assert sum(tokens.read + tokens.scored for tokens in counted.values()) == first.num_tokens
    assert counted["assistant"].scored == first.num_scored
    size = {name: len(tokenizer.encode(text, add_special_tokens=False)) for name, text in {
        "user": "<|im_start|>user\nhow high?<|im_end|>\n",
        "tool": '<|im_start|>tool\n{"metres": 2.4}<|im_end|>\n',
    }.items()}  # fmt: skip
    assert (counted["user"], counted["tool"]) == (Tokens(size["user"], 0), Tokens(size["tool"], 0))


def test_groups_are_drawn_by_the_seed_and_fewer_of_long_conversations():
    short = [group(f"yes {i}", "no", prompt=[user(f"{i}")]) for i in range(50)]
    groups = tokenise(short, CHATML).groups
    assert len(drawn(groups, 8, 0)) == 8
    assert drawn(groups, 8, 0).rows.tolist() == drawn(groups, 8, 0).rows.tolist() != drawn(groups, 8, 1).rows.tolist()
    assert len(drawn(groups, 80, 0)) == 50
    talk = [said("a " * 300) if i % 2 else user("b " * 300) for i in range(99)]
    groups = tokenise([group(f"{i}", "no", prompt=talk) for i in range(4)], CHATML, max_length=10**6).groups
    assert len(drawn(groups, 4, 0)) == 1
