"""The model card and the push to the hub: what a run publishes, what it keeps to itself, what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from dpo_ref.cli.exports import chosen, publish, push
from dpo_ref.cli.schemas import HubOptions
from dpo_ref.files.digests import seal_folder
from dpo_ref.models import checkpoint
from dpo_ref.reports.model_card import is_ours, on_hub
from dpo_ref.tracking.redaction import PathRedactor
from tests.support.command import ROOT, train
from tests.support.evaluate_command import DATA, evaluate
from tests.support.hub_server import hub

PLAIN = ["tracking=none", "generation.max_new_tokens=12", "diagnostic=none"]
TOKEN = "hf_afaketokenforthetest0123456789"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run against another model of this machine, whose path holds a name that must not be published."""
    folder = tmp_path_factory.mktemp("secret user") / "my_run"
    overrides = ["model.path=lab:tiny", "trainer.batch_size=16", "tracking=none", "beta=0.1", f"output_dir={folder}"]
    assert train(*DATA, *overrides).returncode == 0
    reference = folder / "policy"
    run = folder.parent / "another run"
    overrides = [*overrides[:-1], "reference=other", f'reference.path="{reference}"', f'output_dir="{run}"']
    done = train(*DATA, *overrides)
    assert done.returncode == 0, done.stderr
    return run


def card_of(run: Path) -> ModelCard:
    return ModelCard.load(run / "policy" / "README.md")


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """A copy of the run, evaluated; its path may not be published either."""
    copy = shutil.copytree(run, tmp_path_factory.mktemp("secret user") / "another run")
    evaluate(f'policy="{copy}"', *PLAIN)
    return copy


def test_the_card_is_filled_in_by_an_evaluation_and_says_no_path(run, evaluated):
    before = card_of(run)
    assert before.data.eval_results is None
    assert "Not evaluated yet" in before.text
    run, card = evaluated, card_of(evaluated)
    metrics = json.loads((run / "evaluation" / "evaluation.json").read_text())["metrics"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    expected = ("gold/mean", "winrate/initial", "kl/initial", "lengths/response", "ended/share", "rewards/accuracies")
    assert results == {key: metrics[key] for key in expected}
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.base_model is None  # no name on the hub
    summary = json.loads((run / "summary.json").read_text())
    for phrase in (
        summary["identities"]["loss_reference"],
        summary["versions"]["torch"],
        "beta 0.1",
        "seed",
        "**Degen",
    ):
        assert phrase in card.content
    assert 'reference.path="policy"' in card.text
    assert "secret user" not in card.content
    assert not {str(ROOT), str(Path.home()), str(run.parent)} & set(card.content.split())
    assert "/" not in card.text.split("reference:\n")[1].split("cache:")[0]
    assert is_ours(card.content)


def test_a_card_edited_by_hand_is_kept_also_by_longer_training(evaluated, tmp_path, capsys):
    copy = shutil.copytree(evaluated, tmp_path / "run")
    path = copy / "policy" / "README.md"
    edited = path.read_text().replace("## Use", "## My words\n\n## Use")
    path.write_text(edited)
    evaluate(f"policy={copy}", *PLAIN[:-1], "stage=score")
    assert "README.md was edited by hand and stays as it is" in capsys.readouterr().out
    done = train(f"resume={copy}", "trainer.epochs=2", "tracking=none")
    assert done.returncode == 0, done.stderr
    assert "was edited by hand" in done.stdout
    assert path.read_text() == edited
    path.unlink()
    assert train(f"resume={copy}", "tracking=none").returncode == 0
    assert is_ours(path.read_text())
    assert "Not evaluated yet" in path.read_text()  # the results were those of another policy


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/home/me/models/llama", "llama"), ("~/models/llama/", "llama"), ("../runs/a run/policy", "policy"),
        ("org/name", "org/name"), ("lab:initial", "lab:initial"), ("step 1/2", "step 1/2"),
        ("other /home/me/models/llama", "other llama"), ("model.path=/home/me/my models/x", "model.path=x"),
        ("data.sources=[{path: /data/me/a.jsonl}, {path: b/c}]", "data.sources=[{path: a.jsonl}, {path: b/c}]"),
        ("reference.url=http://node17.cluster:8000/v1", "reference.url=http:..."), ("beta=0.02", "beta=0.02"),
        ("tests", "tests"), ("dpo_ref/reports/model_card.py", "model_card.py"),
    ],
    ids=lambda text: text.replace("/", "_").replace(" ", "_"),
)  # fmt: skip
def test_paths_are_reduced_to_names(text, published, monkeypatch):
    monkeypatch.chdir(ROOT)
    places = PathRedactor({"model": {"path": "/home/me/my models/x"}, "given": text})
    assert places.text(text) == published
    assert places.tree({"a": [text, 1, None]}) == {"a": [published, 1, None]}


def test_names_on_the_hub_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    assert on_hub("mistralai/Mistral-7B-v0.1") == ["mistralai/Mistral-7B-v0.1"]
    assert on_hub("outputs/run") == on_hub("/home/x") == on_hub("lab:initial") == on_hub("a/b/c") == []


@pytest.fixture
def asking(run, monkeypatch):
    """`evaluate.py stage=push` in this process, where the hub's client is imported already."""

    def push_to(address: str) -> str:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        with pytest.raises(ValueError) as error:
            evaluate(f'policy="{run}"', "stage=push", "hub.repo=me/my_policy")
        return str(error.value)

    return push_to


def test_a_push_uploads_the_model_and_its_card_and_nothing_else(run):
    (run / "policy" / "notes.txt").write_text("mine")
    with hub("me/my_policy") as server:
        env = os.environ | {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        command = [sys.executable, "evaluate.py", f'policy="{run}"', "stage=push", "hub.repo=me/my_policy"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert server.private
    assert "notes.txt" in done.stdout
    expected = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert expected <= set(server.files) <= {path.name for path in (run / "policy").iterdir()} - {"notes.txt"}
    for name, content in server.files.items():
        assert content == (run / "policy" / name).read_bytes()
        assert TOKEN.encode() not in content
    assert {token for _, token, _ in server.requests} == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr


def test_a_public_repository_is_left_alone_unless_that_is_said(asking):
    with hub("me/my_policy", existing="public") as server:
        assert "me/my_policy exists and is public; hub.private=false publishes" in asking(server.address)
        assert not server.files


@pytest.mark.parametrize(
    ("case", "message"), [("refused", "the hub refuses me/my_policy (403)"), ("nobody", "the hub cannot be reached")]
)
def test_a_hub_that_does_not_take_it_is_one_line_with_what_to_type(asking, case, message):
    with hub("me/my_policy", status=403) as server:
        line = asking(server.address if case == "refused" else "http://127.0.0.1:9")
    assert message in line
    assert line.endswith("stage=push hub.repo=me/my_policy")
    assert TOKEN not in line


def test_only_files_of_a_model_are_chosen(tmp_path):
    names = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
             "adapter/adapter_model.safetensors", "adapter/notes.safetensors.txt", "optimizer.pt", ".env",
             "deep/er/model.safetensors", "wandb/run.json"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert set(chosen(tmp_path)[0]) == {
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
        "adapter/adapter_model.safetensors",
    }  # fmt: skip
    assert set(chosen(tmp_path)[1]) == set(names) - set(chosen(tmp_path)[0])


BAD = {
    "no repository": (["stage=push"], "hub.repo=<organisation or user>/<name>"),
    "no owner": (["stage=push", "hub.repo=name"], "hub.repo=<organisation or user>/<name>"),
    "bad name": (["stage=push", "hub.repo=me/a b"], "hub.repo=me/a b"),
    "offline": (["stage=push", "hub.repo=me/name"], "HF_HUB_OFFLINE"),
    "other stage": (["hub.repo=me/name"], "hub has no effect on stage=all: it belongs to stage=push"),
    "other option": (["stage=push", "hub.repo=me/name", "baseline=x"], "baseline has no effect on stage=push"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(run, case):
    overrides, message = BAD[case]
    with pytest.raises(ValueError) as error:
        evaluate(f'policy="{run}"', *overrides)
    assert message in str(error.value)


def test_a_folder_that_is_no_run_is_not_pushed(tmp_path):
    with pytest.raises(ValueError, match="stage=push needs policy=<run folder>"):
        evaluate("policy=lab:tiny", "stage=push", "hub.repo=me/name")


def test_a_push_needs_a_token_and_a_card(run, tmp_path, monkeypatch):
    (tmp_path / "policy").mkdir()
    with pytest.raises(ValueError, match=r"README.md is missing"):
        push(tmp_path, HubOptions(repo="me/name"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with pytest.raises(ValueError, match="hf auth login"):
        push(run, HubOptions(repo="me/name"))


def test_a_damaged_policy_is_not_pushed(run, tmp_path):
    damaged = shutil.copytree(run, tmp_path / "run")
    with (damaged / "policy" / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\0")
    with pytest.raises(ValueError, match=r"policy: model.safetensors is not as it was written"):
        push(damaged, HubOptions(repo="me/name"))


def test_a_damaged_adapter_is_not_pushed(run, tmp_path):
    damaged = shutil.copytree(run, tmp_path / "run")
    adapter = damaged / "policy" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 2}')
    seal_folder(adapter)
    (adapter / "adapter_config.json").write_text('{"r": 3}')
    with pytest.raises(ValueError, match=r"adapter_config.json is not as it was written"):
        push(damaged, HubOptions(repo="me/name"))


def test_saving_a_policy_again_keeps_its_card(tmp_path):
    class Saved:
        def save_pretrained(self, folder):
            (folder / "config.json").write_text("{}")

    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    (folder / "old.json").write_text("{}")
    checkpoint.save_policy(folder, Saved(), Saved())
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "digests.json"]
    assert (folder / "README.md").read_text() == "mine"


def test_a_folder_gets_what_would_be_uploaded(run, tmp_path, capsys):
    (run / "policy" / "notes.txt").write_text("not part of a model")
    try:
        publish(str(run), HubOptions(folder=str(tmp_path / "out")))
    finally:
        (run / "policy" / "notes.txt").unlink()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "notes.txt" not in names
    assert "notes.txt" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size
    with pytest.raises(ValueError, match="is there already"):
        publish(str(run), HubOptions(folder=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="two places"):
        publish(str(run), HubOptions(folder=str(tmp_path / "other"), repo="me/policy"))
