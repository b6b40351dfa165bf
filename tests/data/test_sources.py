"""Rows become groups; bad rows get one message that names file, row and remedy."""

import gzip
import json

import pytest

from dpo_ref.data import sources
from dpo_ref.data.formats.published import hh
from dpo_ref.data.formats.standard import preference
from dpo_ref.types import Message

USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as stream:
        stream.write(b"\n".join(lines) + b"\n")
    return str(path)


def row(prompt="why?", chosen="because", rejected="no idea"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    "given",
    [
        row(),
        row(prompt=[USER], chosen=[{"role": "assistant", "content": "because"}]),
        row(prompt=[USER], chosen=[USER, {"role": "assistant", "content": "because"}]),
        {
            "chosen": [USER, {"role": "assistant", "content": "because"}],
            "rejected": [USER, {"role": "assistant", "content": "no idea"}],
        },
    ],
)
def test_explicit_and_implicit_prompts_are_the_same_group(given):
    group = preference(given, "here")
    assert group.prompt == (Message(role="user", content="why?"),)
    assert group.responses == ("because", "no idea")
    assert group.pairs == ((0, 1),)
    assert group.group_id == preference(row(), "elsewhere").group_id


def test_hh_dialogue():
    history = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what is\n\nthis?\n\nAssistant:"
    group = hh({"chosen": history + " a cat", "rejected": history + " I will not say"}, "here")
    assert [turn["role"] for turn in group.prompt] == ["user", "assistant", "user"]
    assert group.prompt[2]["content"] == "what is\n\nthis?"
    assert group.responses == ("a cat", "I will not say")


BAD = {
    "no chosen": ({"prompt": "a", "rejected": "b"}, "has no chosen; its columns are prompt, rejected"),
    "equal": (row(chosen="x", rejected="x"), "chosen equal to rejected"),
    "empty response": (row(rejected="  "), "empty rejected"),
    "empty prompt": (row(prompt=" "), "has an empty prompt"),
    "number": (row(chosen=3), "neither text nor a list of messages"),
    "role": (row(prompt=[{"role": "wizard", "content": "x"}]), "unknown role 'wizard'"),
    "assistant last": (row(prompt=[USER, ANSWER]), "ends with a turn of assistant"),
    "json": (b'{"prompt": ', "is not JSON"),
    "utf-8": (b'{"prompt": "\xff"}', "is not UTF-8"),
    "list": (b"[1, 2]", "is a JSON list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_name_file_and_row(tmp_path, case):
    bad, message = BAD[case]
    path = write(tmp_path / "pairs.jsonl", [row(), bad, row(prompt="who?")])
    with pytest.raises(ValueError) as error:
        sources.preferences(0, path=path)
    assert "pairs.jsonl row 2" in str(error.value)
    assert message in str(error.value)
    assert "data.on_bad_row=skip" in str(error.value)
    kept = sources.preferences(0, path=path, on_bad_row="skip", max_bad_share=0.4)
    assert [group.origin for group in kept.train] == ["pairs.jsonl row 1", "pairs.jsonl row 3"]


def test_held_out_prompts_are_on_one_side_only(tmp_path):
    rows = [row(prompt=f"question {i % 10}", chosen=f"answer {i}") for i in range(40)]
    path = write(tmp_path / "pairs.jsonl.gz", rows)
    data = sources.preferences(3, path=path, eval_fraction=0.3)
    train, held_out = ({group.prompt_id for group in side} for side in (data.train, data.eval))
    assert (len(train), len(held_out), len(data.test_prompts)) == (7, 3, 3)
    assert not train & held_out
    assert len(data.train) + len(data.eval) == 40
    assert list(sources.preferences(3, path=path, eval_fraction=0.3).eval) == list(data.eval)
    assert len(sources.preferences(3, path=path).eval) == 0
    assert len(sources.preferences(3, path=str(tmp_path), limit=6).train) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "no usable row"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 500, mtime=0)[:60], "damaged or cut short"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sources.preferences(0, path=str(path), on_bad_row="skip")


def test_options_that_would_have_no_effect(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [row()])
    with pytest.raises(ValueError, match="hold rows out; give one of them"):
        sources.preferences(0, path=path, eval_path=path, eval_fraction=0.1)
    with pytest.raises(ValueError, match=r"eval_fraction=1.0 must lie in \[0, 1\)"):
        sources.preferences(0, path=path, eval_fraction=1.0)
    with pytest.raises(ValueError, match=r"data\.folder=harmless-base has no effect"):
        sources.preferences(0, path=path, folder="harmless-base")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_through_a_local_folder(tmp_path, monkeypatch, streaming):
    """`datasets` is asked for what the preset says, and its rows become groups; here its files lie on this machine."""
    import datasets

    asked = []
    files = {
        split: write(tmp_path / f"{split}.jsonl", [row(prompt=f"{split} {i}") for i in range(count)])
        for split, count in (("train_prefs", 5), ("test_prefs", 2))
    }
    real = datasets.load_dataset

    def local(path, name, *, data_dir, split, streaming):
        asked.append((path, name, data_dir, split, streaming))
        return real(
            "json", data_files={split: files[split]}, split=split, streaming=streaming, cache_dir=str(tmp_path)
        )

    monkeypatch.setattr(datasets, "load_dataset", local)
    hub = {"path": "someone/pairs", "split": "train_prefs", "eval_split": "test_prefs"}
    data = sources.preferences(0, hub=hub, folder="harmless", streaming=streaming, limit=4)
    assert asked == [("someone/pairs", None, "harmless", split, streaming) for split in ("train_prefs", "test_prefs")]
    assert [group.prompt[0]["content"] for group in data.train] == [f"train_prefs {i}" for i in range(4)]
    assert [group.origin for group in data.eval] == [f"someone/pairs test_prefs row {i}" for i in (1, 2)]
    fewer = sources.preferences(0, hub=hub, eval_fraction=0.5, streaming=streaming)
    assert len(asked) == 3  # a share held out goes before the preset's split
    assert len(fewer.train) + len(fewer.eval) == 5


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"data\.path=someone/pairs is neither a local file or folder nor .* no route"
    ):
        sources.preferences(0, path="someone/pairs")
