"""Rows become groups; bad rows get one message that names file, row and remedy."""

import gzip
import hashlib
import json

import pyarrow as pa
import pyarrow.ipc
import pytest
from datasets import Dataset, DatasetDict

from dpo_ref.data import sources
from dpo_ref.data.formats.published import hh
from dpo_ref.data.formats.standard import preference
from dpo_ref.data.rows import Source, files, open_source
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
    (tmp_path / "rows").mkdir()
    path = write(tmp_path / "rows" / "pairs.jsonl.gz", rows)
    data = sources.preferences(3, path=path, eval_fraction=0.3)
    train, held_out = ({group.prompt_id for group in side} for side in (data.train, data.eval))
    assert (len(train), len(held_out), len(data.test_prompts)) == (7, 3, 3)
    assert not train & held_out
    assert len(data.train) + len(data.eval) == 40
    assert list(sources.preferences(3, path=path, eval_fraction=0.3).eval) == list(data.eval)
    assert len(sources.preferences(3, path=path).eval) == 0
    assert len(sources.preferences(3, path=str(tmp_path / "rows"), limit=6).train) == 6


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

    def local(path, name, *, data_dir, split, streaming, revision):
        asked.append((path, name, data_dir, split, streaming, revision))
        return real(
            "json", data_files={split: files[split]}, split=split, streaming=streaming, cache_dir=str(tmp_path)
        )

    monkeypatch.setattr(datasets, "load_dataset", local)
    hub = {"path": "someone/pairs", "split": "train_prefs", "eval_split": "test_prefs"}
    data = sources.preferences(0, hub=hub, folder="harmless", streaming=streaming, limit=4, revision="v2")
    splits = ("train_prefs", "test_prefs")
    assert asked == [("someone/pairs", None, "harmless", split, streaming, "v2") for split in splits]
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


# --- folders


KINDS = ".jsonl, .json, .csv, .tsv, .parquet, .arrow, .feather (each also .gz, .bz2, .xz, .zst)"


def fill(folder, *names, contents=None):
    """A folder of files that hold what `contents` says, or one row, their name."""
    for name in names:
        content = json.dumps({"prompt": name}).encode() + b"\n"
        content = gzip.compress(content, mtime=0) if name.endswith(".gz") else content
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((contents or {}).get(name, content))
    return folder


def opened(folder, **source):
    return open_source(Source(str(folder), **source), "data.path")


def prompts(folder, **source):
    return [row["prompt"] for _, row in opened(folder, **source).rows]


def refusal(folder, **source):
    """The message with which a folder is refused, without the folder in front of it."""
    with pytest.raises(ValueError) as error:
        opened(folder, **source)
    return str(error.value).removeprefix(f"data.path={folder}")


HARMLESS = (
    "README README.md readme.txt LICENSE Licence.txt CITATION.cff .gitattributes .hidden.jsonl .rows.txt load.py "
    "_SUCCESS dataset_info.json dataset_infos.json a.jsonl.lock a.jsonl.md5 SHA256SUMS checksums.txt "
    ".git/objects/pack docs/more/page.md __pycache__/a.pyc"
)


def test_what_may_lie_in_a_folder(tmp_path):
    fill(tmp_path, *HARMLESS.split(), "b.jsonl", "a.json", "README.jsonl.gz")
    (tmp_path / "none").mkdir()
    assert prompts(tmp_path) == ["README.jsonl.gz", "a.json", "b.jsonl"]


@pytest.mark.parametrize("other", ["a.jsonl.zst2", "a.txt", "a.sqlite", "a.jsonl.bak", "a.parquet.incomplete", "rows"])
def test_what_else_lies_in_a_folder_is_named(tmp_path, other):
    fill(tmp_path, "a.jsonl", "README.md", other)
    assert refusal(tmp_path) == (
        f": {other} cannot be read; data files are {KINDS}; move what is none out of the folder, or convert it"
    )
    with pytest.raises(ValueError, match=rf"^diagnostic\.pairs=.*: {other} cannot be read; "):
        files(str(tmp_path), "diagnostic.pairs")


def test_a_folder_in_a_folder_is_named(tmp_path):
    message = refusal(fill(tmp_path, "a.jsonl", "more/b.jsonl"))
    assert message.startswith(": more/ cannot be read; data files are ")
    assert message.endswith(f"; a folder in it is read as data.path={tmp_path}/more")
    assert prompts(tmp_path / "more") == ["more/b.jsonl"]
    message = refusal(fill(tmp_path / "splits", "train/a.jsonl", "train/a.txt", "test/more/a.jsonl"))
    assert message.startswith(": test/more/, train/a.txt cannot be read; ")


def test_many_names_are_counted(tmp_path):
    fill(tmp_path, *(f"{letter}.txt" for letter in "abcdefghi"))
    assert refusal(tmp_path).startswith(": a.txt, b.txt, c.txt, d.txt, e.txt, f.txt and 3 more cannot be read; ")


def test_files_of_a_folder_that_are_not_what_they_say(tmp_path):
    others = {"b.jsonl.zst": b"\x28\xb5\x2f\xfd\x00", "c.arrow": b"ARROW1", "d.parquet": b"PAR1", "e.json": b""}
    message = refusal(fill(tmp_path, "a.jsonl", *others, contents=others))
    assert message.startswith(": 4 files cannot be read: b.jsonl.zst: the file cannot be read, or is damaged or cut s")
    assert "; c.arrow is not Arrow: it is cut short; d.parquet is not Parquet: " in message
    assert message.endswith("; e.json is empty; remove it, or fetch it again")


def test_links_out_of_folders_of_splits(tmp_path):
    fill(tmp_path, "rows/train.jsonl", "elsewhere/b.jsonl")
    (tmp_path / "rows" / "test").symlink_to(tmp_path / "elsewhere")
    assert refusal(tmp_path / "rows").startswith(": test/ cannot be read; ")
    (tmp_path / "rows" / "test").unlink()
    (tmp_path / "rows" / "test").mkdir()
    (tmp_path / "rows" / "test" / "b.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")
    assert refusal(tmp_path / "rows").startswith(": b.jsonl is a link to ")


# --- splits


SPLITS = {  # files to train on, to test, to validate
    "by files": ("train.jsonl", "test.jsonl", "val.jsonl"),
    "by shards": (
        "train-00000-of-00002.jsonl train-00001-of-00002.jsonl.gz",
        "test_1.jsonl",
        "validation-00000-of-00001-0123456789abcdef.jsonl",
    ),
    "by folders": ("train/0.jsonl train/1.jsonl", "test/0.jsonl", "dev/0.jsonl"),
    "in data": ("data/train-0.jsonl", "data/test-0.jsonl", "data/valid-0.jsonl"),
    "in folders in data": ("data/train/0.jsonl", "data/test/x.jsonl", "data/val/y.jsonl"),
    "at the end": ("hh-train.jsonl shp-train.jsonl", "hh_test-00.jsonl", "hh.dev.jsonl"),
    "with more behind": ("train.v2.jsonl", "Test_prefs.jsonl", "dev3.jsonl"),
}


@pytest.mark.parametrize("layout", SPLITS)
def test_only_the_split_that_is_asked_for_is_read(tmp_path, layout):
    train, test, validation = (names.split() for names in SPLITS[layout])
    fill(tmp_path, *train, *test, *validation, "README.md")
    assert prompts(tmp_path) == prompts(tmp_path, split="train") == train
    assert prompts(tmp_path, split="test", split_key="data.eval_split") == test
    for synonym in ("validation", "valid", "val", "dev"):
        assert prompts(tmp_path, split=synonym) == validation
    assert " and no holdout; data.split=" in refusal(tmp_path, split="holdout")
    assert len(files(str(tmp_path), "diagnostic.pairs")) == len(train + test + validation)


def test_splits_of_the_hub_by_their_own_names(tmp_path):
    names = [f"data/{name}-00000-of-00001.jsonl" for name in ("test_sft", "train_prefs", "train_sft")]
    fill(tmp_path, *names)
    assert prompts(tmp_path, split="train_prefs") == names[1:2]
    assert prompts(tmp_path, split="test_sft") == names[:1]
    message = (
        ": data/train_prefs-00000-of-00001.jsonl, data/train_sft-00000-of-00001.jsonl are sets of different kinds"
    )
    assert refusal(tmp_path).startswith(f"{message} by their names; read one by data.split=train_prefs, data.path=")
    assert refusal(tmp_path, split="data").startswith(" has the splits test, train and no data; ")


def test_what_is_held_back_is_noted(tmp_path):
    folder = fill(tmp_path / "rows", "train.jsonl", "test.jsonl")
    assert opened(folder).notes == (
        "rows: train.jsonl is read; test.jsonl is held back (data.eval_split=test evaluates on it)",
    )
    assert opened(folder, split="test", split_key="data.eval_split").notes == (
        "rows: test.jsonl is read, as data.eval_split=test says; train.jsonl is not",
    )
    fill(folder, "dev/0.jsonl", "dev/1.jsonl", "train2.jsonl")
    assert opened(folder).notes == (
        "rows: train.jsonl, train2.jsonl are read; dev/0.jsonl, dev/1.jsonl are held back (data.eval_split=validation "
        "evaluates on them); test.jsonl is held back (data.eval_split=test evaluates on it)",
    )
    assert open_source(Source(str(folder), split="dev"), "data.sources").notes == (
        "rows: dev/0.jsonl, dev/1.jsonl are read, as data.split=dev says; test.jsonl is not; "
        "train.jsonl, train2.jsonl are not",
    )
    assert opened(fill(tmp_path / "alone", "train.jsonl")).notes == ()
    assert opened(fill(tmp_path / "plain", "a.jsonl", "b.jsonl")).notes == ()
    assert opened(folder / "test.jsonl").notes == ()


def test_names_that_say_too_little(tmp_path):
    assert refusal(fill(tmp_path / "mixed", "train.jsonl", "test.jsonl", "more.jsonl", "hh-test.jsonl")) == (
        ": a split is in the name of hh-test.jsonl, test.jsonl, train.jsonl, and none in that of more.jsonl; rename "
        "those, or move them out"
    )
    assert refusal(fill(tmp_path / "no train", "test.jsonl", "dev.jsonl")) == (
        " has the splits validation, test and no train; data.split=validation reads that"
    )
    both = fill(tmp_path / "both", "train.jsonl", "test.jsonl")
    assert refusal(both, split_key="data.eval_split") == " has the splits test, train; data.eval_split=test reads that"
    assert refusal(fill(tmp_path / "some", "data/a.jsonl", "data/test.jsonl")).startswith(": data/ cannot be read; ")


def test_folders_and_files_without_splits(tmp_path):
    names = ["a.jsonl", "contest.jsonl", "trainer.jsonl"]
    assert prompts(fill(tmp_path, *names)) == names
    for path in (tmp_path, tmp_path / "a.jsonl"):
        assert refusal(path, split="test").startswith(f"data.split=test has no effect: data.path={path} is a f")


def test_a_folder_of_datasets_inside_of_a_folder(tmp_path):
    """Which of its files count only `datasets` knows."""
    folder, rows = tmp_path / "rows", {"train": [{"prompt": "a"}] * 3, "test": [{"prompt": "b"}]}
    DatasetDict({split: Dataset.from_list(rows[split]) for split in rows}).save_to_disk(folder)
    assert prompts(folder, split="test") == ["b"]
    (folder / "dataset_dict.json").unlink()
    assert refusal(folder).startswith(": test/, train/ cannot be read; ")
    assert prompts(folder / "train") == ["a"] * 3


def test_packed_buffers_in_a_folder_of_datasets(tmp_path):
    Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "rows")
    (shard,) = (tmp_path / "rows").glob("*.arrow")
    table = pa.table({"prompt": ["a"]})
    with pa.ipc.new_stream(str(shard), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    message = f": the buffers in {shard.name} are compressed, which datasets never writes; save its rows as JSON lines"
    assert refusal(tmp_path / "rows") == f"{message} or Parquet"


def digest_of(folder, *names):
    """As it has been since the first version: caches are named by it."""
    parts = [f"{name}\0".encode() + hashlib.sha256((folder / name).read_bytes()).digest() for name in names]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_digest_is_of_what_is_read(tmp_path):
    plain = fill(tmp_path / "plain", "b.jsonl", "a.json", "README.md")
    assert opened(plain).content == digest_of(plain, "a.json", "b.jsonl")
    assert opened(plain / "b.jsonl").content == digest_of(plain, "b.jsonl")
    split = fill(tmp_path / "split", "train/0.jsonl", "test/0.jsonl")
    assert opened(split).content == digest_of(split, "train/0.jsonl")
    assert opened(split, split="test").content == digest_of(split, "test/0.jsonl")


def test_one_split_is_trained_on_and_another_held_out(tmp_path):
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", [row(prompt=f"train {i}") for i in range(5)])
    write(tmp_path / "rows" / "test.jsonl", [row(prompt="test")])
    assert len(sources.preferences(0, path=str(tmp_path / "rows")).train) == 5
    data = sources.preferences(0, path=str(tmp_path / "rows"), eval_split="test")
    assert len(data.train) == 5
    assert [group.prompt[0]["content"] for group in data.eval] == ["test"]
