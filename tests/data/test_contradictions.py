"""Rows that say which response is better twice, or in a way that is not read, are refused; the order of responses is
their ranking where nothing else could be."""

import pytest

from dpo_ref.data.pairing import Filters
from dpo_ref.data.sources import Reader, Rules

SCORES = "a list of scores orders them"
FIRST = "takes the first for the best"


def read(*rows, **rules):
    """A reader behind its rows, and the groups."""
    reader = Reader(Rules(**rules), "rows")
    return list(reader.groups([(f"row {number}", row) for number, row in enumerate(rows, start=1)])), reader


def answers(*rows, **rules):
    return [group.responses for group in read(*rows, **rules)[0]]


def refused(*rows, **rules):
    with pytest.raises(ValueError) as error:
        read(*rows, **rules)
    assert len(str(error.value)) < 400
    return str(error.value)


USER = {"role": "user", "content": "Sky?"}


def said(words, **more):
    return {"role": "assistant", "content": words, **more}


RANKED = {"prompt": "Sky?", "responses": ["Round.", "Blue."]}
PAIR = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Round."}
SHOWN = {"prompt": "Sky?", "completion": "Blue."}


def of_each(key, *values, **more):
    """Responses that are objects with a key more."""
    texts = ("Round.", "Blue.", "Green.")
    return {
        "prompt": "Sky?",
        "responses": [{"text": words, key: value} | more for words, value in zip(texts, values, strict=False)],
    }


# --- the order of responses


CHOICES = [
    *[{name: "Blue."} for name in ("chosen", "chosen_response", "preferred_response", "rejected", "answer", "note")],
    {"messages": [USER, said("Blue.")]},
    {"generations": ["Blue.", "Round."]},
    {"answer": 1},
    {"best": 1},
    {"chosen_model": "a"},
    {"swapped": True},
    {"score_b": 9},
    {"response_1_score": "9"},
]


@pytest.mark.parametrize("columns", CHOICES)
def test_a_column_that_chooses_was_never_said_before(columns):
    (name,) = columns
    message = refused(RANKED | columns)
    assert f"row 1 has {name}, which may " in message
    assert f" its responses: {SCORES}, data.ignore=[{name}] {FIRST}" in message
    assert answers(RANKED | columns, ignore=(name,)) == [("Round.", "Blue.")]


BESIDE = {
    "helpfulness": ([1, 9], "scores"),
    "quality_index": ([1, 9], "scores"),
    "score": (["1", "9"], "scores"),
    "votes_of_users": ((1, 9), "scores"),
    "human_rank": ([2, 1], "ranks"),
    "scores_by_model": ([1, 9], "scores"),
    "score_of_models": ({"a": 1, "b": 9}, None),
    "wins": ({"a": 1, "b": 9}, None),
    "rm_scores": ([None, 9], None),
    "grades": (["bad", "good"], None),
    "annotations": ([{"rating": 1}, {"rating": 5}], None),
    "metrics": ({"reward": [1, 5]}, None),
    "metadata": ({"scores": [1, 9]}, None),
    "judged": ("[1, 9]", None),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_could_score_them_is_no_matter_of_their_order(name):
    value, ours = BESIDE[name]
    remedy = f"data.columns={{{ours}: {name}}} reads it so" if ours else SCORES
    message = refused(RANKED | {name: value})
    assert f"row 1 has {name}, which may " in message
    assert f"its responses: {remedy}, data.ignore=[{name}] {FIRST}" in message
    assert answers(RANKED | {name: value}, ignore=(name,)) == [("Round.", "Blue.")]
    if ours:
        assert answers(RANKED | {name: value}, columns=((ours, name),)) == [("Blue.", "Round.")]


@pytest.mark.parametrize("name", ["upvotes", "rm_score", "helpfulness", "x", "elo_rating"])
def test_a_key_of_each_that_could_score_is_named_by_data_rating(name):
    row = of_each(name, 1, 9)
    remedy = f"data.rating={name} reads it so, data.ignore=[responses.{name}] {FIRST}"
    assert f"row 1 has responses.{name}, which may score its responses: {remedy}" in refused(row)
    assert answers(row, rating=name) == [("Blue.", "Round.")]
    assert answers(row, ignore=(f"responses.{name}",)) == [("Round.", "Blue.")]


def test_what_data_rating_names():
    assert answers(of_each("my_rank", 2, 1), rating="my_rank") == [("Blue.", "Round.")]
    assert answers(RANKED | {"scores": [9, 1], "rewards": [1, 9]}, rating="rewards") == [("Blue.", "Round.")]
    assert "has no rating wit, neither a key of its responses nor a list" in refused(of_each("x", 1, 9), rating="wit")
    assert "row 1 has no responses.x for response 2 of 2" in refused(of_each("x", 1, None), rating="x")


@pytest.mark.parametrize(
    "row",
    [
        of_each("scores", {"a": 1}, {"a": 9}),
        of_each("verdict", "bad", "good"),
        of_each("chosen", False, True),
        of_each("feedback", "No.", "Yes."),
        RANKED | {"responses": [[said("Round.", verdict="bad")], [said("Blue.", verdict="good")]]},
        RANKED | {"responses": [{"messages": [said("Round.", grade=1)]}, {"messages": [said("Blue.", grade=2)]}]},
    ],
)
def test_a_key_that_is_no_number_can_only_be_ignored(row):
    message = refused(row)
    assert f"which may score its responses: {SCORES}, data.ignore=[responses." in message


@pytest.mark.parametrize(("key", "values"), [("score", (1, 9)), ("reward", ("1", "9")), ("rank", (2, 1))])
def test_a_score_in_each_is_read_whatever_they_are(key, values):
    assert answers(of_each(key, *values)) == [("Blue.", "Round.")]
    turns = [said(words, **{key: value}) for words, value in zip(RANKED["responses"], values, strict=True)]
    assert answers(RANKED | {"responses": turns}) == [("Blue.", "Round.")]
    assert answers(RANKED | {"responses": [[turn] for turn in turns]}) == [("Blue.", "Round.")]


def test_nothing_else_is_asked_where_nothing_could_say_it():
    harmless = {"lengths": [1, 2], "ids": [1, 2], "models": ["a", "b"], "seeds": [1, 2], "metadata": {"score": 3}}
    harmless |= {"completions": RANKED["responses"], "source": "x", "ref_logps": [-1.0, -2.0], "turns": 1}
    assert answers(RANKED | harmless) == [("Round.", "Blue.")]
    assert answers(of_each("model", "a", "b", id=3, num_tokens=4, logprob=-1.0)) == [("Round.", "Blue.")]
    (group,), reader = read(RANKED | {"tags": ["a", "b"]})
    assert (group.responses, reader.reading.notes) == (("Round.", "Blue."), ("columns not read: tags",))


GAPS = [
    (of_each("score", 1, None, 9), "responses.score for response 2 of 3"),
    (RANKED | {"responses": [{"text": "Round.", "score": 1}, {"text": "Blue."}]}, "responses.score for response 2"),
    (RANKED | {"responses": [said("Round.", score=1), said("Blue.")]}, "responses.score for response 2 of 2"),
    (RANKED | {"scores": [None, 9]}, "scores for response 1 of 2"),
    (RANKED | {"scores": ["nan", 9]}, "scores for response 1 of 2"),
    (
        {"prompt": "Sky?", "trajectories": [{"messages": [said("Blue.")], "reward": 1}, {"text": "Red."}]},
        "trajectories.reward for response 2 of 2",
    ),
]


@pytest.mark.parametrize(("row", "gap"), GAPS)
def test_a_score_that_is_missing(row, gap):
    assert f"has no {gap}" in refused(row)


def test_a_list_of_scores_that_is_missing():
    for name in ("scores", "rewards", "ratings", "ranks"):
        message = refused(RANKED | {name: [1, 9]}, RANKED | {name: None})
        assert f"row 2 has null in {name}, a number for each of its responses; data.ignore=[{name}]" in message
    assert answers(RANKED | {"scores": None, "ranks": [2, 1]}) == [("Blue.", "Round.")]


# --- two that disagree


def test_scores_of_responses_that_disagree():
    message = refused(RANKED | {"scores": [1, 9], "rewards": [9, 1]})
    assert (
        "has scores and rewards, which disagree about which of its responses is better; data.ignore=[rewa" in message
    )
    assert "has scores and ranks, which disagree" in refused(RANKED | {"scores": [1, 9], "ranks": [1, 2]})
    assert "has responses.score and rewards, which" in refused(of_each("score", 1, 9) | {"rewards": [9, 1]})
    assert "has responses.score and responses.rank, which" in refused(of_each("score", 1, 9, rank=1) | TWO_RANKS)
    assert answers(RANKED | {"scores": [1, 9], "ranks": [2, 1], "ratings": [3, 3]}) == [("Blue.", "Round.")]


TWO_RANKS = {
    "responses": [{"text": "Round.", "score": 1, "rank": 1}, {"text": "Blue.", "score": 9, "rank": 2}],
}


def test_a_choice_that_is_what_the_scores_say_was_said_before():
    scored = RANKED | {"scores": [1, 9]}
    assert answers(scored | {"chosen": "Blue.", "rejected_2": "Round."}) == [("Blue.", "Round.")]
    assert "has a column chosen that format ranked does not read" in refused(scored | {"chosen": "Round."})
    assert "has a column rejected_2 that" in refused(scored | {"rejected_2": "Blue."})


def test_scores_of_a_pair_that_disagree():
    row = PAIR | {"score_chosen": 1, "score_rejected": 9, "chosen_score": 9, "rejected_score": 1}
    message = refused(row)
    assert (
        "has scores that disagree, in score_chosen and score_rejected and in chosen_score and rejected_sc" in message
    )
    (group,), _ = read(row, ignore=("score_chosen", "score_rejected"))
    assert group.rewards == (9, 1)
    (group,), _ = read(row | {"score_chosen": 10})
    assert group.rewards == (10, 9)


def test_one_score_of_two():
    row = PAIR | {"score_chosen": 1, "score_rejected": None}
    message = refused(row)
    assert "has null in score_rejected beside score_chosen; data.ignore=[score_chosen, score_rejected] p" in message
    assert read(PAIR | {"chosen_score": 1})[1].reading.notes == (
        "columns not read: chosen_score",
    )  # no other was meant


def test_labels_that_disagree():
    assert "has label and kto_tag that contradict each other; data.ignore=[kto_tag] passes over one" in refused(
        SHOWN | {"label": True, "kto_tag": False}
    )
    (group,), reader = read(SHOWN | {"label": True, "kto_tag": 1})
    assert (group.labels, reader.reading.notes) == ((True,), ())
    assert "has a column thumbs_up that format unpaired" in refused(SHOWN | {"label": True, "thumbs_up": False})
    assert "has a column reward that format unpaired" in refused(SHOWN | {"label": True, "reward": -1})
    assert len(answers(SHOWN | {"label": False, "thumbs_up": False, "failed": True, "reward": -2})) == 1


@pytest.mark.parametrize("preference", [-4, 3.5, 100])
def test_a_preference_out_of_its_range(preference):
    row = {"prompt": "Sky?", "response1": "Round.", "response2": "Blue.", "overall_preference": preference}
    assert f"has {preference:g} in overall_preference, which runs from -3 (the first is better) to 3" in refused(row)


@pytest.mark.parametrize("options", [{"enable_thinking": "false"}, '{"enable_thinking": "False"}'])
def test_a_text_is_no_boolean(options):
    message = refused(PAIR | {"chat_template_kwargs": options})
    assert "in chat_template_kwargs.enable_thinking, which templates take for true; false without quotes" in message


# --- verdicts on demonstrations


VERDICTS = [
    *[{name: value} for name in ("thumbs_up", "approved", "passed", "success", "valid") for value in (False, True)],
    *[{"status": "rejected"}, {"feedback": "thumbs_down"}, {"feedback": "\N{THUMBS DOWN SIGN}"}, {"reward": -1}],
    *[
        {"user_rating": "-2"},
        {"thumbs_down": True},
        {"failed": "yes"},
        {"toxic": 1},
        {"thumbs": "down"},
        {"rating": "bad"},
        {"outcome": "Failed."},
    ],
]


@pytest.mark.parametrize("column", VERDICTS)
def test_a_verdict_on_a_demonstration_is_a_label(column):
    ((name, value),) = column.items()
    for row in (SHOWN, {"messages": [USER, said("Blue.")]}):
        message = refused(row | column)
        assert f"has a column {name} that format" in message
        if name in ("thumbs_up", "approved", "passed", "success", "valid"):
            assert f"data.columns={{label: {name}}} reads it as label" in message
            (group,), _ = read(row | column, columns=(("label", name),))
            assert group.labels == (value,)
        else:
            assert "data.columns" not in message
    assert read(PAIR | column)[1].reading.notes == (f"columns not read: {name}",)  # both sides are as they are


@pytest.mark.parametrize(
    "column",
    [
        *[{"status": "done"}, {"feedback": "Not bad."}, {"feedback": "..."}, {"reward": 0.5}, {"logprob": -3}],
        *[{"toxic": False}, {"valid": "for a year"}, {"success_rate": 0.2}, {"rationale": "It is wrong to say so."}],
    ],
)
def test_other_words_on_a_demonstration_are_reported(column):
    assert read(SHOWN | column)[1].reading.notes == (f"columns not read: {next(iter(column))}",)


# --- said before, where it belongs


@pytest.mark.parametrize(
    ("prompt", "columns"),
    [
        ("Who wrote it?", {"context": "Blue."}),
        ("Is the sea blue or not?", {"context": "not"}),
        ("Johanna went home again.", {"context": "anna went home"}),
        ("q?", {"system": "Be brief.", "system_prompt": "q"}),
        ("q", {"system": "Be brief.", "system_prompt": "q"}),
        ("Sky?", {"history": "Blue."}),
    ],
)
def test_an_answer_or_a_piece_of_a_word_does_not_say_the_context(prompt, columns):
    name = list(columns)[-1]
    assert f"has a column {name} that format preference does not read" in refused(PAIR | {"prompt": prompt} | columns)


@pytest.mark.parametrize(
    ("prompt", "columns"),
    [
        ("Ann went home. Where is she?", {"context": "Ann went home."}),
        ("请说天空为什么是蓝的", {"context": "天空为什么是蓝"}),
        ("Sky?", {"question": "Sky?", "user_query": " Sky"}),
        ("Sky?", {"system": "Be brief.", "system_prompt": "Be brief. "}),
        ("You are a pirate. Sky?", {"persona": "You are a pirate."}),
        ("Sky?", {"conversation": ["Sky?", "Blue."]}),
    ],
)
def test_what_the_prompt_says_whole_was_said(prompt, columns):
    assert len(answers(PAIR | {"prompt": prompt} | columns)) == 1


# --- prompts that are elsewhere, or missing


SIDES = {"chosen": "The sky is blue.", "rejected": "The sky is round."}


@pytest.mark.parametrize(
    ("column", "place"),
    [
        ({"metadata": {"question": "What is up?"}}, "metadata.question"),
        ({"meta": '{"of": {"prompt": "What"}}'}, "meta.of.prompt"),
        ({"extra_info": [{"query": "What is up?"}]}, "extra_info.query"),
    ],
)
def test_a_prompt_inside_of_a_column_is_not_guessed_at(column, place):
    (name,) = column
    message = (
        f"has no column prompt, and {place} may be it: it has to be a column of its own, data.ignore=[{name}] pass"
    )
    assert message in refused(SIDES | column)
    assert len(answers(SIDES | column, ignore=(name,))) == 1


@pytest.mark.parametrize("column", [{"category": "What is up?"}, {"task_name": "Say what is up"}, {"domain": "What?"}])
def test_a_question_is_a_prompt_whatever_its_column_is_called(column):
    (name,) = column
    assert f"and {name} may be it: data.columns={{prompt: {name}}} reads it so" in refused(SIDES | column)
    assert len(answers(SIDES | {name: "physics", "url": "http://a.b/?"})) == 1


@pytest.mark.parametrize("cell", ["nan", "NaN", "None", "null", "<NA>", float("nan")])
def test_a_missing_cell_says_nothing(cell):
    (group,), reader = read(PAIR | dict.fromkeys(("system", "history", "tools", "question", "images"), cell))
    assert (len(group.prompt), group.tools, reader.reading.notes) == (1, None, ())
    (group,), _ = read({"instruction": "Name it.", "input": cell, "output": "Blue."})
    assert group.prompt[0]["content"] == "Name it."
    (group,), _ = read({"context": cell, "question": "Sky?"} | SIDES)
    assert group.prompt[0]["content"] == "Sky?"
    message = refused(PAIR | {"prompt": cell})
    assert f"row 1 has {cell!r} in prompt, which is what became of a missing cell: fill it, or leave it e" in message


@pytest.mark.parametrize("cell", ["nan", None, ""])
def test_a_prompt_that_is_missing_is_not_guessed_at(cell):
    message = refused(SIDES | {"question": cell})
    assert "has nothing in question; data.ignore=[question] takes the words that both sides share" in message
    assert answers(SIDES | {"question": cell}, ignore=("question",)) == [("blue.", "round.")]


def test_a_label_none_is_no_missing_cell():
    assert "has a column winner that format preference does not read" in refused(PAIR | {"winner": "None"})


# --- what is told of the first row, and of layouts that are not read


@pytest.mark.parametrize(
    ("row", "name", "format"),
    [
        (PAIR | {"rejected": None}, "rejected", "preference"),
        (RANKED | {"responses": None}, "responses", "ranked"),
        (SHOWN | {"completion": None}, "completion", "completion"),
    ],
)
def test_a_null_in_the_first_row_is_told(row, name, format):
    assert f"row 1 has null in {name}, which format {format} needs; fill it, or leave" in refused(row)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": -1}, "answer_0 and answer_1"),
        ({"prompt": "q", "response_x": "a", "response_y": "b", "winner": "x"}, "response_x and response_y"),
    ],
)
def test_two_answers_are_not_told_to_be_a_demonstration(row, names):
    message = refused(row)
    assert (
        f"{names} are read as chosen and rejected, or as one list, responses, with another, scores, besid" in message
    )
    assert "completion" not in message


@pytest.mark.parametrize(("winner", "best"), [("model_a", "Round."), ("model_b", "Blue."), ("B", "Blue.")])
def test_the_winner_of_an_arena(winner, best):
    row = {"prompt": "Sky?", "response_a": "Round.", "response_b": [said("Blue.")], "model_a": "x", "model_b": "y"}
    (group,), reader = read(row | {"winner": winner})
    assert (group.responses[0], group.rewards, reader.reading.notes) == (best, (1, 0), ())
    _, reader = read(row | {"winner": winner}, row | {"winner": "tie (bothbad)"})
    assert reader.reading.dropped == {"scores tied": 1}
    assert "has 'model_c' in winner, where model_a, model_b or tie is expected" in refused(row | {"winner": "model_c"})
    assert "has null in winner, which format annotated needs" in refused(row | {"winner": None})


def test_a_list_of_answers_is_told_its_name():
    row = {"prompt": "Sky?", "generations": ["Round.", "Blue."], "ratings": [1, 9]}
    assert "data.columns={responses: generations} gives columns" in refused(row)
    assert answers(row, columns=(("responses", "generations"),)) == [("Blue.", "Round.")]


def test_answers_that_are_texts_are_ranked_by_their_scores():
    row = {"question": "Sky?", "answers": ["Round.", "Blue."]}
    assert answers(row | {"scores": [1, 9]}) == [("Blue.", "Round.")]
    assert "has answers without scores; a list of scores, rewards, ratings, ranks orders them" in refused(row)


def test_a_row_without_scores_among_rows_that_have_them():
    scored, listed = RANKED | {"scores": [1, 9]}, of_each("score", 1, 9)
    assert "row 3 has no scores, while the rows before have them" in refused(scored, listed, RANKED)
    assert "row 2 has scores, while the rows before have none" in refused(RANKED, scored)
    assert "row 2 has scores, while the rows before have none" in refused(RANKED, listed)
    groups, reader = read(scored, RANKED, scored, on_bad_row="skip", max_bad_share=0.5)
    assert (len(groups), reader.reading.dropped) == (2, {"bad rows": 1})


# --- pairs


def test_pairs_whose_rejected_side_scores_higher_are_counted():
    """They may be meant so, and data.min_margin=0 leaves them out."""
    turned, tied = (PAIR | {"score_chosen": better, "score_rejected": 5} for better in (1, 5))
    groups, reader = read(PAIR, turned, tied)
    assert len(groups) == 3
    note = "pairs whose rejected side has the higher score: 1 (data.min_margin=0 leaves them out)"
    assert reader.reading.notes == (note,)
    groups, reader = read(PAIR | {"score_chosen": 6, "score_rejected": 5}, turned, filters=Filters(min_margin=0.0))
    assert (len(groups), reader.reading.notes) == (1, ())
