"""Question files in the formats of their authors, asked turn by turn, and what is said about files that are not."""

import json

import pytest

from dpo_ref.generation.engine import PromptSet, Question, answer, held_out
from dpo_ref.generation.prompt_sets import alpaca_eval, arena_hard, jsonl, mt_bench
from dpo_ref.generation.sampling import generate
from dpo_ref.lab.gold import gold_rewards
from dpo_ref.lab.preferences import lab_prompts
from dpo_ref.types import silent
from tests.support.questions import ALPACA, MT_BENCH, TOKENIZER, engine, written


def asked(read, path, **options) -> PromptSet:
    return read(0, silent, path=path, **options)


def user(text):
    return {"role": "user", "content": text}


def test_alpaca_eval_is_a_list_known_by_place(tmp_path):
    prompt_set = asked(alpaca_eval, written(tmp_path / "alpaca_eval.json", ALPACA))
    assert prompt_set.name == "alpaca_eval"
    assert prompt_set.questions == (
        Question((user("a cat"),), (), 0, "helpful_base"),
        Question((user("the dog ran"),), (), 1, "koala"),
    )
    assert asked(alpaca_eval, str(tmp_path / "alpaca_eval.json"), limit=1).questions == prompt_set.questions[:1]


def test_both_versions_of_arena_hard(tmp_path):
    old = [{"question_id": "ab12", "category": "arena-hard-v0.1", "cluster": "x", "turns": [{"content": "a cat"}]}]
    new = [{"uid": "cd34", "category": "hard_prompt", "subcategory": "coding", "prompt": "a cat"}]
    for name, rows in (("old", old), ("new", new)):
        (question,) = asked(arena_hard, written(tmp_path / f"{name}.jsonl", rows)).questions
        assert question == Question(
            (user("a cat"),), (), *((("ab12", "arena-hard-v0.1"), ("cd34", "hard_prompt"))[name == "new"])
        )


def test_own_rows_of_every_form(tmp_path):
    chat = [user("hi"), {"role": "assistant", "content": "hello"}, user("a cat")]
    rows = [{"prompt": "x", "id": "a", "category": "c"}, {"messages": chat}, {"turns": ["one", "two"]}]
    questions = asked(jsonl, written(tmp_path / "own.jsonl", rows)).questions
    assert questions == (
        Question((user("x"),), (), "a", "c"),
        Question(tuple(chat), (), 1, ""),
        Question((user("one"),), ("two",), 2, ""),
    )


BAD = {
    "no file": (alpaca_eval, None, "q.json is no file; it is alpaca_eval.json of the data set tatsu-lab/alpaca_eval"),
    "no instruction": (
        alpaca_eval,
        [ALPACA[0], {"output": "x"}],
        "row 2 needs a text under 'instruction'; it has 'out",
    ),
    "a text": (alpaca_eval, [ALPACA[0], "x"], "row 2 is a JSON str, not an object"),
    "no turns": (
        mt_bench,
        [{"question_id": 1, "prompt": "x"}],
        "row 1 needs a list of texts under 'turns'; it has 'qu",
    ),
    "empty turn": (mt_bench, [{"question_id": 1, "turns": ["x", " "]}], "row 1 has no text as turn 2 of 'turns'"),
    "no id": (mt_bench, [{"turns": ["x"]}], "row 1 needs 'question_id', a number or a text by which answers are"),
    "id twice": (mt_bench, [MT_BENCH[0], MT_BENCH[0]], "row 2 has the id 81 of an earlier row"),
    "other set": (arena_hard, ALPACA, "row 1 needs 'question_id'"),
    "no question": (jsonl, [], "q.json holds no question; a row is {prompt: text or messages} or"),
    "two prompts": (jsonl, [{"prompt": "x", "instruction": "y"}], "it has 'prompt', 'instruction'. A row is {prompt"),
    "answered already": (
        jsonl,
        [{"messages": [user("x"), {"role": "assistant", "content": "y"}]}],
        "must end with a m",
    ),
    "limit": (jsonl, [{"prompt": "x"}], "prompts.limit=0 must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_row_and_remedy(case, tmp_path):
    read, rows, message = BAD[case]
    path = tmp_path / "q.json"
    if rows is not None:
        written(path, rows)
    with pytest.raises(ValueError) as error:
        asked(read, str(path), **({"limit": 0} if case == "limit" else {}))
    assert message in str(error.value)


def test_a_file_cut_short_names_its_row(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps(MT_BENCH[0]) + '\n{"question_id": 2, "tur')
    with pytest.raises(ValueError, match=r"question.jsonl row 2 is not JSON .* It is fastchat/llm_judge"):
        asked(mt_bench, str(path))


def test_the_second_turn_is_asked_after_the_own_first_answer(tmp_path):
    """Every sample goes on with its own conversation, as if that had been the prompt from the beginning."""
    questions = asked(mt_bench, written(tmp_path / "question.jsonl", MT_BENCH))
    generations = answer(engine(), questions, 7)
    assert [(g.question_id, g.sample_index, g.turn) for g in generations] == [
        (id, sample, turn) for id in (81, 111) for sample in (0, 1) for turn in (1, 2)
    ]
    for first, second in zip(generations[::2], generations[1::2], strict=True):
        turns = MT_BENCH[first.prompt_index]["turns"]
        assert first.prompt == (user(turns[0]),)
        assert second.prompt == (*first.prompt, {"role": "assistant", "content": first.output}, user(turns[1]))
        assert (second.prompt_set, second.category) == ("mt_bench", MT_BENCH[first.prompt_index]["category"])
    assert len({g.prompt_ids for g in generations if g.turn == 2}) == 4
    alone = held_out([generations[3].prompt])
    again = generate(
        engine().model(), TOKENIZER, [q.prompt for q in alone.questions], 7, samples_per_prompt=2, max_new_tokens=12
    )
    assert again[1].token_ids == generations[3].token_ids


def test_what_was_asked_is_the_same_question_whatever_the_first_answer():
    questions = PromptSet("", (Question((user("a cat"),), ("why?",)), Question((user("the dog"),), ("why?",))))
    ours, theirs = (answer(engine(), questions, seed) for seed in (1, 2))
    keys = [[g.question for g in generations] for generations in (ours, theirs)]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 4
    assert ours[1].prompt != theirs[1].prompt


def test_categories_have_temperatures_of_their_own(tmp_path):
    path = written(tmp_path / "question.jsonl", MT_BENCH)
    questions = asked(mt_bench, path, temperatures={"writing": 0.7, "math": 0.0})
    generations = answer(engine(), questions, 3)
    assert [(g.category, g.temperature, g.sample_index) for g in generations if g.turn == 1] == [
        ("writing", 0.7, 0), ("writing", 0.7, 1), ("math", 0.0, 0),
    ]  # fmt: skip
    greedy = answer(engine(temperature=0.0, samples_per_prompt=1), asked(mt_bench, path), 99)
    assert [g.token_ids for g in generations if g.category == "math"] == [
        g.token_ids for g in greedy if g.category == "math"
    ]
    with pytest.raises(ValueError, match=r"prompts.temperatures has none for math"):
        asked(mt_bench, path, temperatures={"writing": 0.7})


def test_prompts_of_the_lab_can_be_scored_whatever_the_data():
    prompt_set = lab_prompts(5, silent, num_prompts=6)
    assert [question.prompt for question in lab_prompts(6, silent, num_prompts=6).questions] == [
        q.prompt for q in prompt_set.questions
    ]
    assert len(gold_rewards([q.prompt for q in prompt_set.questions], ["x"] * 6, [True] * 6)) == 6
