"""Folders of models as published: in shards, without architectures, with padded vocabularies, with pickles."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_ref.models.checkpoint import weights_digest
from dpo_ref.models.loading import load_model
from tests.support.command import train
from tests.support.model_folders import model_folder, pairs_file, words_for
from tests.support.tokenizers_here import byte_bpe

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("kinds") / "whole")


@pytest.fixture
def sharded(whole, tmp_path):
    """The same model as transformers writes large ones."""
    folder = shutil.copytree(whole, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def digest_of(folder):
    return weights_digest(load_model(str(folder), CPU, "auto").model)


def refusal(folder):
    with pytest.raises(ValueError) as error:
        load_model(str(folder), CPU, "auto")
    sentence = str(error.value)
    assert sentence.startswith(f"model.path={folder}: ")
    assert "\n" not in sentence
    return sentence


def test_shards_are_one_model_where_they_lie_in_a_folder_too(whole, sharded):
    assert digest_of(sharded) == digest_of(whole)
    index = json.loads((sharded / INDEX).read_text())
    (sharded / "shards").mkdir()
    for name in set(index["weight_map"].values()):
        shutil.move(sharded / name, sharded / "shards" / name)
    index["weight_map"] = {weight: f"shards/{name}" for weight, name in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    assert digest_of(sharded) == digest_of(whole)


def test_a_missing_shard_is_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"{gone.name} of {INDEX} is not in the folder" in refusal(sharded)


def test_pickled_weights_alone_are_not_read(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "its weights are no safetensors but pytorch_model.bin" in refusal(folder)


def test_a_config_without_architectures(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "bare")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert digest_of(folder) == digest_of(whole)


def test_a_padded_vocabulary_trains_and_is_said_once(tmp_path):
    tokenizer = byte_bpe()
    folder = model_folder(tmp_path / "padded", tokenizer, vocab_size=384)
    done = train(*words_for(folder, pairs_file(tmp_path / "pairs.jsonl"), tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    said = f"its embedding has 384 rows and its tokenizer {len(tokenizer)} tokens; the rest is padding"
    assert done.stdout.count(said) == 1
