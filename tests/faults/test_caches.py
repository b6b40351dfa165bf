"""What is kept between runs, with a flipped bit, cut short, emptied or of another form; half-made; and pruned."""

import json
import os
import shutil
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from dpo_ref.cli import cache as cache_command
from dpo_ref.evaluation.judging.answers import FILE, AnswerCache, JudgeAnswer, JudgeRequest, collect
from dpo_ref.files.cache import in_use
from dpo_ref.lab import models as lab_models
from dpo_ref.lab import recipes
from dpo_ref.types import Message, silent
from tests.support.cache import empty_cache
from tests.support.command import train, typed
from tests.support.quick import only

COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache that a run has filled, the run's options, and its weights."""
    folder = tmp_path_factory.mktemp("kept")
    rows = [{"prompt": f"Name {c}.", "chosen": f"It is {c}.", "rejected": f"Not {c}, no."} for c in COLOURS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["data=jsonl", f"data.path={folder / 'pairs.jsonl'}", "model.path=lab:tiny", "tracking=none"]
    options += ["trainer.batch_size=4", "trainer.save_every=1", "optim.lr=1e-3"]
    with pytest.MonkeyPatch.context() as patch:
        empty_cache(patch, folder / "cache")
        done = train(*options, f"output_dir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder, options


def copy_of(kept, tmp_path, monkeypatch):
    """The same cache for one test."""
    cache = shutil.copytree(kept[0] / "cache", tmp_path / "cache", symlinks=True)
    monkeypatch.setenv("DPO_REF_CACHE", str(cache))
    return cache


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-len(content) // 5] ^= 4
    path.write_bytes(content)


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def of_another_form(path):
    path.write_bytes(b'{"rows": []}')


def same_weights(one, other):
    weights, others = (load_file(run / "policy" / "model.safetensors") for run in (one, other))
    return all((weights[name] == others[name]).all() for name in weights)


TABLE, TOKENS, TEXTS = "reference/*/*.safetensors", "tokens/*/tokens.npy", "groups/*/groups.arrow"
DAMAGES = [(TABLE, flipped), (TABLE, halved), (TABLE, emptied), (TABLE, of_another_form)]
DAMAGES += [(TOKENS, flipped), (TOKENS, halved), ("tokens/*/counts.json", emptied)]
DAMAGES += [(TEXTS, flipped), (TEXTS, emptied), ("groups/*/reading.json", of_another_form)]
DAMAGES += [("tokens/*/digests.json", halved)]
OTHERWISE = [(TABLE, halved), (TABLE, emptied), (TABLE, of_another_form), (TOKENS, flipped), (TEXTS, emptied)]
EACH = only(DAMAGES, *(damage for damage in DAMAGES if damage not in OTHERWISE))  # one for each file at once
NAMES = {"reference": "the reference table", "tokens": "the cached tokens", "groups": "the cached rows"}


@pytest.mark.parametrize(("pattern", "damage"), EACH, ids=lambda value: getattr(value, "__name__", value))
def test_damage_is_told_and_made_good(kept, pattern, damage, tmp_path, monkeypatch, tell):
    cache = copy_of(kept, tmp_path, monkeypatch)
    path = max(cache.glob(pattern), key=lambda each: each.stat().st_size)
    damage(path)
    done = train(*kept[1], f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "is damaged" in line]
    assert str(path) in line or f"{path.parent} is damaged, or of an earlier version ({path.name})" in line
    assert same_weights(kept[0] / "run", tmp_path / "run")
    again = train(*kept[1], f"output_dir={tmp_path / 'again'}")
    assert "damaged" not in again.stdout
    kind = NAMES[pattern.partition("/")[0]]
    tell(
        "used silently",
        f"{kind}, {pattern.rpartition('/')[2]}: {damage.__name__.replace('_', ' ')}",
        seen=line,
        survived="made again by itself; equal final weights; the next run finds it whole",
    )


tokenizer = cache(recipes.lab_tokenizer)  # takes as long as all the rest


@pytest.mark.parametrize("damage", [flipped, halved])
def test_a_damaged_lab_model_is_built_again(damage, tmp_path, monkeypatch, capsys, tell):
    recipe = recipes.RECIPES["tiny"]
    short = replace(recipe, stages=(replace(recipe.stages[0], num_steps=1, batch_size=2),))
    monkeypatch.setitem(recipes.RECIPES, "large", short)
    monkeypatch.setitem(recipes.TOKENIZERS, "lab", tokenizer)
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))
    weights = Path(lab_models.locate("lab:large")) / "model.safetensors"
    before = weights.read_bytes()
    damage(weights)
    capsys.readouterr()
    lab_models.locate("lab:large")
    line, building, *_ = capsys.readouterr().out.splitlines()
    assert weights.name in line
    assert "it is built again" in line
    assert building.startswith("building lab:large")
    assert weights.read_bytes() == before
    lab_models.locate("lab:large")
    assert capsys.readouterr().out == ""
    tell(
        "used silently",
        f"a cached lab model: its weights {damage.__name__}",
        seen=line,
        survived="built again, byte for byte the same",
    )


# --- the judge's answers


def requests(count=400):
    return [JudgeRequest((Message(role="user", content=f"{i} " + "x" * 300),), {"model": "m"}) for i in range(count)]


def ask(missing, keep):
    for request in missing:
        keep(request, JudgeAnswer(request.messages[0]["content"][::-1], None, 1, 1, None))
        yield request


def answered(path):
    """All questions answered, from the file as far as they stand there."""
    with AnswerCache(path) as answers:
        return collect(requests(), answers, ask, silent)


def overwritten(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 9000] = b"\xa5" * 9000
    path.write_bytes(content)


def one_answer(path):
    content = path.read_bytes()
    at = content.index(b"xxx 7")
    path.write_bytes(content[:at] + b"y" + content[at + 1 :])


@pytest.mark.parametrize(
    ("damage", "most"), [(one_answer, 1), (overwritten, 100), (halved, 399), (of_another_form, 400)]
)
def test_a_damaged_cache_of_answers_keeps_what_is_whole(damage, most, tmp_path, capsys, tell):
    path = tmp_path / FILE
    whole = answered(path)
    assert whole.num_asked == len(requests())
    damage(path)
    outcome = answered(path)
    assert 1 <= outcome.num_asked <= most
    assert outcome.answers == whole.answers
    (line,) = capsys.readouterr().out.splitlines()
    assert str(path) in line
    assert "damaged" in line
    assert "asked again" in line
    assert answered(path).num_asked == 0
    tell(
        "used silently",
        f"the judge's answers: {damage.__name__.replace('_', ' ')} of the file",
        seen=line,
        survived=f"{len(requests()) - outcome.num_asked} of {len(requests())} answers kept, the others asked again",
    )


# --- the cache as a whole


def listed(cache):
    return {f"{entry.kind}/{entry.path.name}" for entry in cache_command.entries(cache)}


def aged(cache, days):
    for entry in cache_command.entries(cache):
        os.utime(entry.path, (time.time() - days * 86_400,) * 2)


def pruned(*words):
    done = typed("dpo_ref/cli/cache.py", "prune", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cache_is_listed_and_pruned(kept, tmp_path, monkeypatch):
    cache = copy_of(kept, tmp_path, monkeypatch)
    answered(cache / FILE)
    aged(cache, 40)
    before = listed(cache)
    assert {name.split("/")[0] for name in before} == {"groups", "tokens", "reference", "judge"}
    out = typed("dpo_ref/cli/cache.py").stdout
    assert f"{len(before)} entries" in out
    assert "40 days ago" in out
    assert kept[0].name in "".join(out.split())
    assert "0 entries" in pruned("older_than=41d", "yes=true")
    assert "nothing was deleted: add yes=true" in pruned("older_than=30d")
    assert listed(cache) == before
    assert "would delete" not in pruned("to=1TB")
    assert "reference/" in pruned("kind=reference")
    assert "3 entries" not in pruned("to=1kB", "kind=served")
    out = pruned("older_than=30d", "yes=true")
    assert out.count("deleted ") == len(before) - 1
    assert listed(cache) == {f"judge/{FILE}"}  # answers cost money
    pruned("kind=judge", "yes=true")
    assert listed(cache) == set()
    assert not list(cache.glob(f"{FILE}*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "prune needs one of"),
        (("older_than=30",), "older_than=30 must be a number with its unit, one of h, d"),
        (("kind=all",), "kind=all is none of"),
        (("size=3GB",), "size is unknown"),
    ],
)
def test_words_that_prune_does_not_know(words, message):
    done = typed("dpo_ref/cli/cache.py", "prune", *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_what_a_run_may_go_on_with_is_kept(kept, status, tmp_path, monkeypatch, tell):
    cache = copy_of(kept, tmp_path, monkeypatch)
    summary = kept[0] / "run" / "summary.json"
    content = summary.read_text()
    before = listed(cache)
    try:
        summary.write_text(json.dumps(json.loads(content) | {"status": status}))
        out = pruned("older_than=0d", "to=0kB", "yes=true")
    finally:
        summary.write_text(content)
    assert listed(cache) == before
    tell(
        "lost",
        f"the cache pruned of everything while a run is {status}",
        seen=out,
        survived="the table and the tokens it goes on with",
    )


def test_what_a_process_works_with_is_kept(kept, tmp_path, monkeypatch, tell):
    cache = copy_of(kept, tmp_path, monkeypatch)
    (table,) = (cache / "reference").iterdir()
    in_use(table)
    out = pruned("kind=reference", "yes=true")
    assert table.is_dir()
    tell("lost", "the cache pruned while a process works with a table", seen=out, survived="the table")


def test_a_large_cache_says_so(kept, tmp_path, monkeypatch):
    copy_of(kept, tmp_path, monkeypatch)
    assert "DPO_REF_CACHE_LIMIT" not in train(*kept[1], f"output_dir={tmp_path / 'a'}", "trainer.max_steps=1").stdout
    monkeypatch.setenv("DPO_REF_CACHE_LIMIT", "1kB")
    done = train(*kept[1], f"output_dir={tmp_path / 'b'}", "trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "more than DPO_REF_CACHE_LIMIT=1.0 kB" in line]
    assert "python -m dpo_ref.cli.cache" in line


def test_what_killed_processes_left_is_swept(kept, tmp_path, monkeypatch, tell):
    cache = copy_of(kept, tmp_path, monkeypatch)
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    (table,) = (cache / "reference").iterdir()
    half_made = {owner: (cache / "tokens" / f".a.{owner}", table / f".x.st.{owner}") for owner in (child, 1)}
    for folder, file in half_made.values():
        (folder / "new").mkdir(parents=True)
        file.write_bytes(b"half")
    recent = cache / "tokens" / f".def.{child}"
    recent.mkdir()
    for folder, file in half_made.values():
        for path in (folder / "new", folder, file):
            os.utime(path, (time.time() - 3600,) * 2)
    assert train(*kept[1], f"output_dir={tmp_path / 'run'}", "trainer.max_steps=1").returncode == 0
    assert not any(path.exists() for path in half_made[child])
    assert all(path.exists() for path in (*half_made[1], recent))
    tell(
        "killed",
        "kill -9 while the cache is written",
        seen="–",
        survived="half-made files go with the next run, those of living processes stay",
    )
