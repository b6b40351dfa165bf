"""A revision of the hub is what is fetched, and the commit it stood for is in the run's record and its model card."""

import json
import shutil

import datasets
import pytest
from datasets import Dataset

from dpo_ref.files.hub import commit_of, note_commit
from dpo_ref.models.checkpoint import weights_digest
from tests.support.command import resolved, train
from tests.support.evaluate_command import measure
from tests.support.model_folders import model_folder, pairs_file, words_for
from tests.support.tiny import tiny_model

COMMITS = {"main": "1" * 40, "v1": "2" * 40}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The cache of the hub's client with a repository in two revisions, a tag and a branch."""
    hub = tmp_path_factory.mktemp("hub")
    repository = hub / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate(COMMITS.items()):
        folder = model_folder(repository / "snapshots" / commit)
        config = json.loads((folder / "config.json").read_text())
        tiny_model(seed=seed, vocab_size=config["vocab_size"]).save_pretrained(folder)
        (repository / "refs" / name).write_text(commit)
    pairs_file(hub / "pairs.jsonl")
    return hub


@pytest.fixture(autouse=True)
def from_cache(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))


def summary(run):
    return json.loads((run / "summary.json").read_text())


def test_the_revision_is_trained_recorded_and_evaluated_against(hub, tmp_path):
    run, path = tmp_path / "run", "somebody/model"
    other = ["reference=other", f"reference.path={path}"]
    done = train(*words_for(path, hub / "pairs.jsonl", run, "model.revision=v1", *other))
    assert done.returncode == 0, done.stderr
    about = summary(run)
    assert about["sources"] == {
        "model.path": {"path": path, "revision": "v1", "commit": COMMITS["v1"]},
        "reference.path": {"path": path, "revision": None, "commit": COMMITS["main"]},
    }
    identities = about["identities"]
    assert identities["initial_policy"] == weights_digest(tiny_model(seed=1, vocab_size=rows(hub)))
    assert identities["loss_reference_weights"] == weights_digest(tiny_model(seed=0, vocab_size=rows(hub)))
    card = (run / "policy" / "README.md").read_text()
    assert f"somebody/model at commit {COMMITS['v1']}" in card

    quick = ["generation.max_new_tokens=4", "generation.samples_per_prompt=1", "diagnostic=none", "tracking=none"]
    measure(f"policy={run}", *quick)
    metrics = json.loads((run / "evaluation" / "evaluation.json").read_text())["metrics"]
    assert abs(metrics["kl/initial"]) < 1  # nats: two steps from v1, where main is another model altogether


def rows(hub):
    folder = hub / "models--somebody--model" / "snapshots" / COMMITS["v1"]
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def test_a_revision_of_what_is_here_is_refused(hub, tmp_path):
    folder = shutil.copytree(hub / "models--somebody--model" / "snapshots" / COMMITS["v1"], tmp_path / "here")
    model = ["model=pretrained", f"model.path={folder}"]
    with pytest.raises(ValueError, match=r"model\.revision=v1 has no effect: .* is on this machine"):
        resolved(*model, "model.revision=v1")
    for reference in (["reference=other"], ["reference=interpolate", "reference.share=0.5"]):
        with pytest.raises(ValueError, match=r"reference\.revision=v1 has no effect"):
            resolved(*reference, f"reference.path={folder}", "reference.revision=v1")
    done = train(*words_for(folder, hub / "pairs.jsonl", tmp_path / "run"), "data.revision=v1")
    assert done.returncode == 1
    assert "data.revision=v1 has no effect" in done.stderr


def test_a_revision_of_data_is_fetched_and_recorded(hub, tmp_path, monkeypatch):
    asked = []

    def fetched(path, name, **options):
        asked.append((path, options["revision"]))
        rows = Dataset.from_list([json.loads(line) for line in (hub / "pairs.jsonl").read_text().splitlines()])
        rows.info.download_checksums = {f"hf://datasets/{path}@{'3' * 40}/train.jsonl": {}}
        return rows

    monkeypatch.setattr(datasets, "load_dataset", fetched)
    words = words_for("somebody/model", "somebody/pairs", tmp_path / "run", "data.revision=2026-11")
    done = train(*words)
    assert done.returncode == 0, done.stderr
    assert asked == [("somebody/pairs", "2026-11")]
    source = {"path": "somebody/pairs", "revision": "2026-11", "commit": "3" * 40}
    assert summary(tmp_path / "run")["sources"]["data.path"] == source


def test_what_names_no_commit_is_not_recorded():
    note_commit("somebody/else", None, "/cache/default/0.0.0/abc")
    assert commit_of("somebody/else", None) is None
