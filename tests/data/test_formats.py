"""Every layout of rows becomes the groups derived by hand, whatever holds the rows; options do what they say."""

import bz2
import csv
import gzip
import json
import lzma
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from dpo_ref.data.formats.recognise import FORMATS
from dpo_ref.data.sources import preferences
from tests.support.command import file_composes, files_of
from tests.support.format_rows import CASES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def json_lines(path, rows, opened=open):
    with opened(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def json_list(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def table(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def read(path, seed=0, **options):
    return preferences(seed, path=str(path), **options)


def plain(groups):
    """The groups without where they came from."""
    return [replace(group, origin="") for group in groups]


def answers(groups):
    return [group.responses for group in groups]


@pytest.mark.parametrize("choice", files_of("data"))
def test_every_file_composes(choice):
    file_composes(choice)


def test_every_format_has_rows():
    assert {case.format for case in CASES.values()} == set(FORMATS)


@pytest.mark.parametrize("name", CASES)
def test_layout_is_recognised_and_converted(tmp_path, name):
    case = CASES[name]
    path = json_lines(tmp_path / "rows.jsonl", case.rows)
    data = read(path)
    assert plain(data.train) == case.groups
    assert data.train[0].origin == "rows.jsonl row 1"
    assert (data.reading.formats, data.reading.num_rows) == ((case.format,), len(case.rows))
    assert (data.reading.dropped, len(data.eval)) == ({}, 0)
    assert list(read(path, format=case.format).train) == list(data.train)


CONTAINERS = {
    "rows.jsonl.gz": partial(json_lines, opened=gzip.open),
    "rows.jsonl.bz2": partial(json_lines, opened=bz2.open),
    "rows.jsonl.xz": partial(json_lines, opened=lzma.open),
    "rows.json": json_list,
    "rows.parquet": lambda path, rows: pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path),
    "rows": lambda path, rows: Dataset.from_list(rows).save_to_disk(path),
}


@pytest.mark.parametrize("file", CONTAINERS)
def test_container_does_not_matter(tmp_path, file):
    for name, case in CASES.items():
        (tmp_path / name).mkdir()
        CONTAINERS[file](tmp_path / name / file, case.rows)
        groups = read(tmp_path / name / file).train
        assert plain(groups) == case.groups, name
        assert groups[0].origin == f"{file} row 1"


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables_of_text(tmp_path, suffix, delimiter):
    texts = "hh trl_explicit trl_implicit sft_completion sft_text alpaca alpaca_farm alpaca_eval llmbar helpsteer2"
    for name in texts.split():
        table(tmp_path / f"{name}{suffix}", CASES[name].rows, delimiter)
        assert plain(read(tmp_path / f"{name}{suffix}").train) == CASES[name].groups, name


def test_folders_with_splits_and_with_files(tmp_path):
    first, second = CASES["trl_explicit"], CASES["ultrafeedback_cleaned"]
    splits = {"train_prefs": first.rows, "test_prefs": second.rows}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(tmp_path / "saved")
    data = read(tmp_path / "saved", split="train_prefs", eval_split="test_prefs")
    assert (plain(data.train), plain(data.eval)) == (first.groups, second.groups)
    assert list(data.test_prompts) == [group.prompt for group in second.groups]
    assert plain(read(tmp_path / "saved", split="test_prefs").train) == second.groups
    with pytest.raises(ValueError, match=r"data\.split=train: .* has train_prefs, test_prefs"):
        read(tmp_path / "saved")
    Dataset.from_list(first.rows).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"data\.split=test has no effect: .*one has no splits"):
        read(tmp_path / "one", split="test")
    (tmp_path / "files").mkdir()
    json_lines(tmp_path / "files" / "b.jsonl", second.rows)
    json_list(tmp_path / "files" / "a.json", first.rows)
    (tmp_path / "files" / "readme.md").write_text("no rows")
    assert plain(read(tmp_path / "files").train) == first.groups + second.groups


def pairs(count, name="q"):
    return [{"prompt": f"{name} {i}", "chosen": f"{name} yes {i}", "rejected": f"{name} no {i}"} for i in range(count)]


def test_weighted_sources(tmp_path):
    half = {"path": str(json_lines(tmp_path / "a.jsonl", pairs(10, "a"))), "weight": 0.5}
    twice = {"path": str(json_lines(tmp_path / "b.jsonl", pairs(3, "b"))), "weight": 2, "format": "preference"}
    draws = [answers(preferences(seed, sources=[half, twice]).train) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for drawn in draws:
        assert [better for better, _ in drawn[5:]] == [f"b yes {i}" for i in (0, 1, 2, 0, 1, 2)]
        assert len(set(drawn[:5])) == 5
        assert all(better.startswith("a yes") for better, _ in drawn[:5])
    kto = {"path": str(json_lines(tmp_path / "kto.jsonl", CASES["kto"].rows)), "weight": 1.5}
    both = preferences(0, sources=[half, kto])
    assert both.reading.formats == ("preference", "unpaired")
    assert (both.reading.num_rows, len(both.train)) == (12, 5 + 3)


UNTIED = ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))
DOWNWARDS = ("five", "three", "trois", "one")
SCORED = {"prompt": "Pick.", "responses": ["one", "five", "three", "trois"], "scores": [1, 5, 3, 3]}


@pytest.mark.parametrize(
    ("options", "responses", "expected_pairs"),
    [
        ({}, ("five", "one"), ((0, 1),)),
        ({"pairing": "best_vs_worst", "min_margin": 4.0}, ("five", "one"), ((0, 1),)),
        ({"pairing": "all"}, DOWNWARDS, UNTIED),
        ({"pairing": "all", "min_margin": 2.0}, DOWNWARDS, UNTIED),
        ({"pairing": "all", "min_margin": 2.5}, DOWNWARDS, ((0, 3),)),
    ],
)
def test_pairing(tmp_path, options, responses, expected_pairs):
    tied = {"prompt": "Equal.", "responses": ["a", "b"], "scores": [2, 2]}
    alone = {"prompt": "Alone.", "responses": ["a"], "scores": [2]}
    data = read(json_lines(tmp_path / "rows.jsonl", [SCORED, tied, alone]), **options)
    (group,) = data.train
    assert (group.responses, group.pairs) == (responses, expected_pairs)
    assert group.rewards == tuple({"one": 1, "five": 5, "three": 3, "trois": 3}[text] for text in responses)
    assert data.reading.dropped == {"scores tied": 1, "one response alone": 1}


def test_best_against_random_is_drawn_from_content(tmp_path, monkeypatch):
    rows = [{**SCORED, "prompt": f"Pick {i}."} for i in range(40)]
    rows += [{"prompt": f"Tie {i}.", "responses": ["high", "haut", "low"], "scores": [2, 2, 1]} for i in range(9)]
    path = json_lines(tmp_path / "rows.jsonl", rows)
    drawn = answers(read(path, pairing="best_vs_random").train)
    assert {better for better, _ in drawn[:40]} == {"five"}
    assert {worse for _, worse in drawn[:40]} == {"one", "three", "trois"}
    assert drawn[40:] == [("high", "low")] * 9  # never against an equal one
    far = read(path, pairing="best_vs_random", min_margin=2.5)
    assert answers(far.train) == [pair for pair in drawn if pair == ("five", "one")]
    assert far.reading.dropped == {"score margin too small": 49 - len(far.train)}
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "another"))
    assert answers(read(path, seed=1, pairing="best_vs_random").train) == drawn


def test_ratings_other_than_the_usual(tmp_path):
    steer = json_lines(tmp_path / "steer.jsonl", CASES["helpsteer2"].rows)
    assert answers(read(steer, rating="verbosity").train) == [("Burn it.", "Eight minutes."), ("Oil.", "Ice.")]
    feedback = json_lines(tmp_path / "feedback.jsonl", CASES["ultrafeedback"].rows)
    assert read(feedback, rating="overall_score").train[0].rewards == (10.0, 9.0)
    assert read(feedback, rating="instruction_following").train[0].rewards == (4.0, 1.0)
    with pytest.raises(ValueError, match=r"row 1 has no rating wit; a completion has annotations, .*honesty"):
        read(feedback, rating="wit")


@pytest.mark.parametrize(
    ("options", "left", "reason"),
    [
        ({"min_score_ratio": 2.0}, ["aaaa", "天空很蓝"], "score ratio too small"),
        ({"min_margin": 3.0}, ["aaaa", "cc"], "score margin too small"),
        ({"min_chars": 3}, ["aaaa", "天空很蓝"], "a response under data.min_chars"),
        ({"max_chars": 4}, ["aaaa", "cc", "天空很蓝"], "a response over data.max_chars"),
    ],
)
def test_filters(tmp_path, options, left, reason):
    names = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    pairs = [("q", "aaaa", "bbb", 6, 3), ("q", "cc", "dddd", 9, 5), ("q", "天空很蓝", "天空绿", 2, 1)]
    rows = [dict(zip(names, values, strict=True)) for values in (*pairs, ("q", "eeeee", "f", 7, 5))]
    data = read(json_lines(tmp_path / "rows.jsonl", rows), **options)
    assert [better for better, _ in answers(data.train)] == left
    assert data.reading.dropped == {reason: 4 - len(left)}


def test_duplicates(tmp_path):
    same = [("Café au lait", "天空　很蓝，真的"), ("Cafe\u0301 au lait", "天空 很蓝，真的")]
    same += [("café AU\t lait", "天空 很蓝,真的")]
    rows = [{"prompt": "STRASSE ｶﾞ", "chosen": same[0][0], "rejected": same[0][1]}]
    rows += [{"prompt": "straße ガ", "chosen": chosen, "rejected": rejected} for chosen, rejected in same]
    rows += [rows[0], {**rows[0], "rejected": "天空很蓝，真的"}, {**rows[0], "chosen": "Cafe au lait"}]
    path = json_lines(tmp_path / "rows.jsonl", rows)
    for how, left in {"off": [1, 2, 3, 4, 5, 6, 7], "exact": [1, 2, 3, 4, 6, 7], "normalised": [1, 6, 7]}.items():
        data = read(path, deduplicate=how)
        assert [group.origin for group in data.train] == [f"rows.jsonl row {row}" for row in left], how
        assert data.reading.dropped.get("a duplicate", 0) == 7 - len(left)


def test_limit_and_subset(tmp_path):
    path = json_lines(tmp_path / "rows.jsonl", [*pairs(1), *pairs(30)])
    assert answers(read(path, limit=4, deduplicate="exact").train) == answers(read(path).train)[1:5]
    drawn = [answers(read(path, seed, subset=8).train) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(part) for part in drawn] == [8, 8, 8]
    assert len(read(path, subset=1000).train) == 31


NO_EFFECT = [
    ("trl_explicit", {"pairing": "all"}, "data.pairing=all has no effect: rows.jsonl row 1 has its pairs already"),
    ("kto", {"pairing": "best_vs_worst"}, "rows.jsonl row 1 has no scored responses to pair"),
    ("helpsteer3", {"rating": "verbosity"}, "data.rating=verbosity has no effect: format helpsteer3 has one score"),
    ("trl_explicit", {"min_margin": 1.0}, "data.min_margin has no effect: rows.jsonl row 1 has no scores"),
    ("sft_text", {"min_score_ratio": 2.0}, "data.min_score_ratio has no effect: rows.jsonl row 1 has no scores"),
    ("hh", {"split": "test"}, "data.split=test has no effect: data.path="),
    ("hh", {"name": "default"}, "data.name=default has no effect: data.path="),
    ("hh", {"streaming": True}, "data.streaming=True has no effect: data.path="),
    ("hh", {"sources": [{"path": "x.jsonl"}]}, "data.path and data.sources both say where the rows are"),
    ("hh", {"subset": 0}, "data.subset=0 must be at least 1"),
    ("hh", {"limit": 0}, "data.limit=0 must be at least 1"),
    ("hh", {"format": "preferences"}, "data.format=preferences is not a format; did you mean preference?"),
    ("hh", {"max_bad_share": 1.5}, "data.max_bad_share=1.5 is a share"),
]


@pytest.mark.parametrize(("name", "options", "message"), NO_EFFECT)
def test_options_without_effect_are_refused(tmp_path, name, options, message):
    path = json_lines(tmp_path / "rows.jsonl", CASES[name].rows)
    with pytest.raises(ValueError) as error:
        read(path, **options)
    assert message in str(error.value)


SOURCES = [
    ([{"path": "a.jsonl"}], {"split": "test"}, r"data\.split=test has no effect: write it into data\.sources"),
    ([{"path": "a.jsonl", "weight": 0}], {}, r"data\.sources: weight=0 of a\.jsonl must be a positive"),
    ([{"path": "a.jsonl", "wieght": 1}], {}, r"data\.sources: wieght is unknown; an entry is {path: \.\.\., "),
    ([{"path": "a.jsonl", "logps_columns": "a"}], {}, r"logps_columns=a of a\.jsonl must be a list of names"),
    ([{"weight": 1}], {}, r"data\.sources: path is missing"),
    (None, {}, r"data needs data\.path="),
]


@pytest.mark.parametrize(("entries", "options", "message"), SOURCES)
def test_source_lists_are_checked(entries, options, message):
    with pytest.raises(ValueError, match=message):
        preferences(0, sources=entries, **options)


def test_rows_are_read_once(tmp_path, cache):
    def kept():
        return {path: path.stat().st_mtime_ns for path in cache.rglob("groups.arrow")}

    path = json_lines(tmp_path / "rows.jsonl", pairs(5))
    before, first = answers(read(path).train), kept()
    assert answers(read(path, seed=3, eval_fraction=0.0, subset=5).train) == before
    assert kept() == first
    read(path, min_chars=2)
    second = kept()
    assert len(second) == 2
    assert first.items() <= second.items()
    json_lines(path, [*pairs(4), *pairs(1, "z")])
    assert answers(read(path).train) == [*before[:4], ("z yes 0", "z no 0")]
    assert len(kept()) == 3
    for index, name in enumerate(("u", "u", "v")):
        Dataset.from_list(pairs(2, name)).save_to_disk(tmp_path / "saved")
        assert answers(read(tmp_path / "saved").train)[0] == (f"{name} yes 0", f"{name} no 0")
        assert len(kept()) == (4, 4, 5)[index]
