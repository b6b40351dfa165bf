"""No column is passed over in silence: it is read, harmless, said before, or named; and what names columns does so."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_ref.data import sources
from dpo_ref.data.formats.checks import BadRow
from dpo_ref.data.formats.conversations import turn
from dpo_ref.data.formats.names import kind_of
from dpo_ref.data.formats.recognise import FORMATS
from dpo_ref.data.inspection import inspect, short_report
from dpo_ref.data.rows import Source, open_source
from dpo_ref.data.sources import Reader, Rules, preferences
from dpo_ref.data.tokenise import tokenise
from tests.support.format_rows import CASES
from tests.support.tokenizer_families import FAMILIES

PAIR = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}
USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}
IMAGE = {"bytes": b"\x89PNG", "path": None}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, *rows, **options):
    return sources.preferences(0, path=written(tmp_path / "rows.jsonl", *rows), **options)


def refused(tmp_path, *rows, **options):
    with pytest.raises(ValueError) as error:
        read(tmp_path, *rows, **options)
    return str(error.value)


def words(text):
    return text.split()


def reader_of(*rows, **rules):
    """A reader behind its rows."""
    reader = Reader(Rules(**rules), "rows")
    list(reader.groups([(f"row {number}", row) for number, row in enumerate(rows, start=1)]))
    return reader


REFUSED = words("""
    image images img input_image imagePath image_url chosenImages rejected-images videos video_path audio audioClips
    pixel_values attachments files inputFile screenshots
    functions available_tools toolList function_call tool_choice tool_names
    systemMessage custom_system system_instruction sysPrompt systemprompt
    question user_query Instruction inputs raw_input context contexts history chatHistory message conversation
    conversations dialogue documents Document retrieved_passages passage_text article text_input few_shot_prompt
    prompt_2 userprompt choices options
    chosen2 rejected_responses rejected_2 chosen_text responses response_c modelResponse answer reference_answer
    gold_completion completions output output_2 outputText rawoutput
    label labels is_correct isChosen is_safe better_response best_index winner winner_id human_preference preference
    verdict rankings chosen_index correct
    chat_template_kwargs loss_mask enable_thinking reasoning thinking_content rejected_thinking
    schema table_schema facts examples hint prefix preamble guidelines developer role swapped is_flipped
""")
HARMLESS = words("""
    id ids uid qid prompt_id promptId conversation_hash uuid source chosen_source dataset data_source domain subset
    model chosen_model rejected-model chosen_policy generator metadata meta url source_urls timestamp
    created_at updated_at created_at_utc_A date category prompt_category categories language lang length
    response_length num_tokens n_turns total_tokens token_count char_count helpfulness verbosity
    instruction_following preference_type label_source license
    example_id table_name schema_version role_type original_chosen_model
""")
REPORTED = words("""
    margin annotator annotators notes title topic_words 图片说明 x rater critique feedback rationale
    judge_response labelling_prompt logprob chosen_logprobs elo_rating solution ground_truth task
    difficulty_estimate response_confidence quality comment constraints kto_tags extra_info split
    status approved valid thumbs_up success_rate tags
""")


@pytest.mark.parametrize("name", REFUSED)
def test_a_column_that_changes_the_meaning_is_refused_and_can_be_ignored(tmp_path, name):
    row = PAIR | {name: "Something else is said here."}
    if name == "chat_template_kwargs":
        row = CASES["shp"].rows[0] | {name: {"enable_thinking": False}}  # the others read it
    message = refused(tmp_path, row)
    assert message.startswith(f"rows.jsonl row 1 has {name}, and only") or f"row 1 has a column {name} that" in message
    assert f"data.ignore=[{name}] passes over it" in message
    assert len(message) < 400
    data = read(tmp_path, row, ignore=[name])
    assert (len(data.train), data.reading.notes) == (1, ())
    skipped = read(tmp_path, {k: v for k, v in row.items() if k != name}, row, on_bad_row="skip", max_bad_share=0.5)
    assert skipped.reading.dropped == {"bad rows": 1}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_column_is_not_mentioned(tmp_path, name):
    assert read(tmp_path, PAIR | {name: "a text of it"}).reading.notes == ()


@pytest.mark.parametrize("name", REPORTED)
def test_any_other_column_is_reported(tmp_path, name):
    assert read(tmp_path, PAIR | {name: "a text of it"}).reading.notes == (f"columns not read: {name}",)


@pytest.mark.parametrize("nothing", [None, "", " \n", [], {}, [None, ""], {"bytes": None, "path": None}])
def test_what_is_empty_says_nothing(tmp_path, nothing):
    empty = dict.fromkeys(("images", "tools", "system", "question", "label", "margin", "rejected_2"), nothing)
    data = read(tmp_path, PAIR | empty)
    assert (data.reading.notes, data.train[0].tools, len(data.train[0].prompt)) == ((), None, 1)


SAME = {
    "messages of the chosen side": {"messages": [USER, ANSWER]},
    "its words": {"question": "why?"},
    "blanks around them": {"question": " why?\n"},
    "the text of messages": {"messages": json.dumps([USER, ANSWER])},
    "ShareGPT's": {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "no idea"}]},
    "part of the prompt": {"input": "why"},
    "one word that is a name": {"role": "user", "developer": "ann", "schema": "chat"},
    "turned round by nobody": {"swapped": False, "is_flipped": "false"},
    "sides once more": {"preferred_response": "because", "chosen_messages": [USER, ANSWER], "rejected_2": "no idea"},
    "sides before they were turned": {"original_chosen": "no idea", "original_rejected": "because"},
    "responses once more": {"responses": ["no idea", "because"]},
    "a number": {"turns": 2, "response_tokens_used": 3.5, "prompt_rank_of_words": None},
    "no image": {"has_image": False, "num_images": 0},
}


@pytest.mark.parametrize("name", SAME)
def test_what_was_said_before_is_harmless(tmp_path, name):
    assert len(read(tmp_path, PAIR | SAME[name]).train) == 1


DIFFERENT = {
    "messages": [USER, {"role": "assistant", "content": "because of the moon"}],
    "question": "why not?",
    "response_c": "no",  # inside of another response, and not the same
    "preferred": 1,
    "chosen_index": 0,
    "swapped": True,
    "preferred_response": "no idea",
    "rejected_messages": [USER, ANSWER],
    "context": "because",  # the answer, and no part of what was asked
    "tool_names": ["why"],
    "table": [["a cell", "b"]],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_was_said_otherwise_is_not(tmp_path, name):
    message = refused(tmp_path, PAIR | {name: DIFFERENT[name]})
    assert f"has a column {name} that format preference does not read" in message


def test_numbers_that_are_equal_say_nothing_of_each_other(tmp_path):
    scored = PAIR | {"score_chosen": 1, "score_rejected": 0}
    assert "has a column preferred that format preference" in refused(tmp_path, scored | {"preferred": 1})


def test_the_turns_of_a_column_are_compared_as_they_are_read(tmp_path):
    """Calls are equal, whether their arguments are an object or its text."""
    call, written_call = ({"function": {"name": "f", "arguments": a}} for a in ({"x": "y z"}, '{"x": "y z"}'))
    chosen = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [written_call]}]
    assert len(read(tmp_path, PAIR | {"chosen": chosen, "messages": messages}).train) == 1


def test_bytes_are_media_whatever_their_column_is_called():
    for name in ("illustration", "question", "x"):
        with pytest.raises(ValueError, match=rf"row 1 has {name}, and only text is read"):
            reader_of(PAIR | {name: [IMAGE]})


def test_objects_in_columns_are_looked_at_too():
    row = json.loads(json.dumps(CASES["openai_preference"].rows[0]))
    row["input"] |= {"functions": [{"name": "rain"}]}
    with pytest.raises(ValueError, match=r"has a column input\.functions that .* data\.ignore=\[input\.functions\]"):
        reader_of(row)
    assert not reader_of(row, ignore=("input.functions",)).reading.notes
    answers = [{"answer": "a", "rank": 1, "votes": 3}, {"answer": "b", "rank": 2, "votes": 1}]
    assert reader_of({"prompt": "q", "answers": answers}).reading.notes == ("columns not read: answers.votes",)
    answers[1]["attachments"] = ["b.png"]
    with pytest.raises(ValueError, match=r"has answers\.attachments, and only text is read"):
        reader_of({"prompt": "q", "answers": answers})


@pytest.mark.parametrize(
    ("row", "name", "remedy"),
    [
        (PAIR, "sys_prompt", {"system": "sys_prompt"}),
        ({"prompt": "why?", "completion": "because"}, "functions", {"tools": "functions"}),
        ({"prompt": "why?", "completion": "because"}, "is_good", {"label": "is_good"}),
    ],
)
def test_a_new_name_is_advised_where_it_helps(tmp_path, row, name, remedy):
    value = {"functions": '[{"name": "f"}]', "is_good": True}.get(name, "Be somebody else.")
    message = refused(tmp_path, row | {name: value})
    assert (
        f"data.columns={{{', '.join(f'{ours}: {theirs}' for ours, theirs in remedy.items())}}} reads it as" in message
    )
    assert len(read(tmp_path, row | {name: value}, columns=remedy).train) == 1


@pytest.mark.parametrize(
    ("row", "name"), [(PAIR, "is_good"), (PAIR, "user_query"), ({"text": "a"}, "user_query"), (PAIR, "response_c")]
)
def test_no_new_name_is_advised_where_it_does_not(tmp_path, row, name):
    assert "data.columns" not in refused(tmp_path, row | {name: "Be somebody else."})


def test_a_second_system_prompt_is_not_passed_over(tmp_path):
    row = PAIR | {"system": "Be brief.", "system_prompt": "Be long."}
    assert "has a column system_prompt that" in refused(tmp_path, row)
    assert len(read(tmp_path, row | {"system_prompt": "Be brief."}).train) == 1


# --- notes


def test_notes_are_kept_printed_and_joined(tmp_path):
    rows = [PAIR | {"margin": 1, "id": 3}, PAIR | {"annotator": "ann", "margin": 2}]
    note = "columns not read: margin, annotator"
    for _ in range(2):  # the second reading is the one kept
        assert read(tmp_path, *rows).reading.notes == (note,)
    other = written(tmp_path / "other.jsonl", PAIR | {"rater": "bob"})
    entries = [{"path": str(tmp_path / "rows.jsonl")}, {"path": other}, {"path": other, "weight": 2}]
    data = sources.preferences(0, sources=entries)
    assert data.reading.notes == (note, "columns not read: rater")
    tokenizer = FAMILIES["qwen: byte-level, no BOS, ChatML"]().tokenizer
    report = short_report(inspect(data, tokenise(data.train, tokenizer), tokenise(data.eval, tokenizer)))
    assert f"  {note}" in report


def test_notes_on_files_that_are_not_read_stand_before_those_on_columns(tmp_path):
    (tmp_path / "rows").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        written(tmp_path / "rows" / name, PAIR | {"margin": 1})
    folder = str(tmp_path / "rows")
    about_files = open_source(Source(folder), "data.path").notes
    for _ in range(2):
        assert sources.preferences(0, path=folder).reading.notes == (*about_files, "columns not read: margin")
    assert "test.jsonl" in about_files[0]


def test_a_thousand_columns_are_not_all_listed(tmp_path):
    (note,) = read(tmp_path, PAIR | {f"note {letter}{i}": "x" for i in range(10) for letter in "pqrst"}).reading.notes
    assert note.endswith("and 30 more")
    assert note.count(",") == 20


# --- data.ignore and data.columns


TURN = ANSWER | {"reasoning_content": "hm", "weight": 0}


@pytest.mark.parametrize("as_text", [False, True])
def test_ignored_keys_leave_turns(tmp_path, as_text):
    chosen = json.dumps([USER, TURN]) if as_text else [USER, TURN]
    row = PAIR | {"chosen": chosen, "tools": [{"name": "f", "from": "here", "weight": 3}]}
    assert read(tmp_path, row).train[0].responses[0] == (TURN,)
    (group,) = read(tmp_path, row, ignore=["weight"]).train
    assert group.responses == (({**ANSWER, "reasoning_content": "hm"},), "no idea")
    assert group.tools == ({"name": "f", "from": "here", "weight": 3},)  # a schema is no turn
    assert read(tmp_path, row, ignore=["weight", "reasoning_content"]).train[0].responses == ("because", "no idea")


def test_names_that_no_row_has(tmp_path):
    message = "rows.jsonl: no row has the column imgs, which data.ignore names; the first has prompt, chosen, rejected"
    assert message in refused(tmp_path, PAIR, PAIR | {"images": ["a"]}, ignore=["images", "imgs"])
    assert "which data.ignore names" in refused(tmp_path, PAIR, ignore=["completions.critique"])
    message = refused(tmp_path, PAIR, columns={"system": "persona"})
    assert "no row has the column persona, which data.columns names; the first has prompt, chosen, rejected" in message
    message = refused(tmp_path, {"q": "why?", "a": "because"}, columns={"prompt": "q", "completion": "answer"})
    assert "row 1 fits no known format; its columns are a, prompt." in message
    assert "no row so far has the column answer, which data.columns names" in message
    assert read(tmp_path, PAIR, PAIR | {"images": ["a"]}, ignore=["images"]).reading.num_rows == 2


def test_columns_get_our_names(tmp_path):
    rows = [{"ask": "why?", "good": "because", "bad": "no idea", "persona": "Be brief."}]
    names = {"prompt": "ask", "chosen": "good", "rejected": "bad", "system": "persona"}
    (group,) = read(
        tmp_path, *rows, {k: v for k, v in rows[0].items() if k != "persona"}, columns=names, limit=1
    ).train
    assert group.prompt == ({"role": "system", "content": "Be brief."}, USER)
    assert group.responses == ("because", "no idea")
    swapped = read(tmp_path, PAIR, columns={"chosen": "rejected", "rejected": "chosen"})
    assert swapped.train[0].responses == ("no idea", "because")


def test_sources_have_names_of_their_own(tmp_path):
    first = written(tmp_path / "a.jsonl", {"ask": "a?", "chosen": "b", "rejected": "c", "images": ["x"]})
    second = written(tmp_path / "b.jsonl", PAIR)
    entry = {"path": first, "columns": {"prompt": "ask"}, "ignore": ["images"]}
    data = sources.preferences(0, sources=[entry, {"path": second}])
    assert [group.prompt[0]["content"] for group in data.train] == ["a?", "why?"]
    with pytest.raises(ValueError, match=r"data\.sources: ignore=images of .*a\.jsonl must be a list of names"):
        sources.preferences(0, sources=[{**entry, "ignore": "images"}])
    with pytest.raises(ValueError, match=r"data\.sources: columns=ask of .* must be \{our name: the column's name\}"):
        sources.preferences(0, sources=[{**entry, "columns": "ask"}])


TWICE = "data.columns and data.ignore say two things about the column ask"
NAMED = [
    (
        {"columns": {"prompt": "ask"}},
        "row 1 has prompt beside ask, which data.columns calls prompt; data.ignore=[prom",
    ),
    ({"columns": {"prompt": "ask", "query": "ask"}}, "data.columns gives the column ask two names; give it one"),
    ({"columns": {"query": "ask"}, "ignore": ["ask"]}, TWICE),
    (
        {"columns": {"sytem": "ask"}},
        "data.columns={sytem: ask} has no effect: format preference reads no sytem beside chosen, prompt, rejected",
    ),
]


@pytest.mark.parametrize(("options", "message"), NAMED)
def test_names_that_contradict_or_do_nothing(tmp_path, options, message):
    assert message in refused(tmp_path, PAIR | {"ask": "why?"}, **options)


def test_the_remedy_for_a_column_beside_it(tmp_path):
    row = PAIR | {"ask": "who?"}
    (group,) = read(tmp_path, row, columns={"prompt": "ask"}, ignore=["prompt"]).train
    assert group.prompt[0]["content"] == "who?"
    assert read(tmp_path, row, columns={"prompt": "ask"}, ignore=["prompt"]).reading.notes == ()


# --- whatever else a row holds


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0."), min_size=1, max_size=12)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map("⟦{}⟧".format)  # not said yet
VALUES = TEXTS | st.integers() | st.lists(TEXTS, min_size=1)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from(sorted(CASES)), name=NAMES | st.sampled_from(REFUSED + REPORTED), value=VALUES)
def test_no_column_is_passed_over_in_silence(case, name, value):
    """It changes the groups, or is listed, or the row is refused."""
    before, after = (Reader(Rules(), "rows") for _ in range(2))
    rows = CASES[case].rows
    groups = list(before.groups([("a row", row) for row in rows]))
    try:
        changed = list(after.groups([("a row", {name: value} | row) for row in rows]))
    except ValueError:
        return
    is_known = name in rows[0] or kind_of(name) == "harmless" or name in FORMATS[CASES[case].format].known
    is_listed = any(name in note.removeprefix("columns not read: ") for note in after.reading.notes)
    assert is_known or is_listed or [g.group_id for g in changed] != [g.group_id for g in groups]


# Keys of a turn that are never for the template.
BESIDE_TURNS = words("id index message_id timestamp created created_at model token_count num_tokens")
TURN_NAMES = NAMES.filter(lambda name: name not in ("role", "content", "from"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=TURN_NAMES | st.sampled_from(BESIDE_TURNS + REFUSED), value=VALUES)
def test_every_key_of_a_turn_is_kept(name, value):
    try:
        message = turn(ANSWER | {name: value}, "chosen")
    except BadRow as error:
        assert name in ("tool_calls", "function_call") or "surrogate" in str(error)  # noqa: PT017
    else:
        assert message.get(name, value) == value
        assert (name in message) != (name in BESIDE_TURNS)


def test_which_columns_were_read_and_which_said_nothing_more(tmp_path):
    rows = [PAIR | {"prompt_id": 7, "margin": 2.0}, PAIR | {"system": "be brief", "videos": []}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # read, and as it was kept
        reading = preferences(0, path=str(path)).reading
        assert reading.columns == (
            "columns read: prompt, chosen, rejected, system",
            "harmless, empty, or said before: prompt_id, videos",
        )
        assert reading.notes == ("columns not read: margin",)
