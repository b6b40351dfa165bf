"""A file appears whole or not at all."""

import errno
import json
import os
from contextlib import suppress

import pytest

from dpo_ref.files.writing import remove_abandoned, replacing, replacing_folder, write_json, write_lines


def full():
    yield "first\n"
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failure_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    path = tmp_path / "numbers.txt"
    write_lines(path, ["old\n"])
    with pytest.raises(OSError, match="No space left"):
        write_lines(path, full())
    with suppress(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_seen_before_it_is_whole(tmp_path):
    path = tmp_path / "numbers.txt"
    with replacing(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"


def test_json_is_strict_and_keeps_every_letter(tmp_path):
    path = tmp_path / "numbers.json"
    write_json(path, {"β": 0.1, "text": "naïve 🙂"})
    assert "β" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"β": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"β": 0.1, "text": "naïve 🙂"}


def fill(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "content.txt").write_text(content)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_whole_and_replaces_what_stood_there(tmp_path):
    path = tmp_path / "runs" / "policy"
    for content in ("first", "second"):
        before = contents(tmp_path)
        with replacing_folder(path) as partial:
            fill(partial, content)
            (partial / f"{content}.txt").write_text("")
            assert contents(path) == {name.removeprefix("runs/policy/"): text for name, text in before.items()}
        assert contents(path) == {"content.txt": content, f"{content}.txt": ""}
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("there", [{}, {"policy/content.txt": "old"}])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_what_was_there_and_nothing_beside_it(there, failure, tmp_path):
    path = tmp_path / "policy"
    for content in there.values():
        fill(path, content)

    def fail():
        with replacing_folder(path) as partial:
            fill(partial, "half")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert contents(tmp_path) == there
    assert [*tmp_path.iterdir()] == [path] * len(there)


@pytest.mark.parametrize("move", [1, 2])
def test_a_move_that_fails_leaves_the_old_folder(move, tmp_path, monkeypatch):
    path, moves = tmp_path / "policy", []

    def failing(source, target, replace=os.replace):
        moves.append(target)
        if len(moves) == move:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    fill(path, "old")
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"), replacing_folder(path) as partial:
        fill(partial, "new")
    assert contents(tmp_path) == {"policy/content.txt": "old"}


def test_a_folder_that_another_process_wrote_first_stays(tmp_path):
    path = tmp_path / "cache"
    with replacing_folder(path) as partial:
        fill(partial, "ours")
        fill(path, "theirs")
    assert contents(tmp_path) == {"cache/content.txt": "theirs"}
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_removed(tmp_path):
    path = tmp_path / "step-1"
    for name in (".step-1.77", f".step-1.{os.getpid()}", ".step-12.77"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name / "new", "half")
    with replacing_folder(path) as partial:
        assert list(partial.iterdir()) == []
        fill(partial, "whole")
    remove_abandoned(path)
    assert contents(tmp_path) == {"step-1/content.txt": "whole", ".step-12.77/new/content.txt": "half"}
