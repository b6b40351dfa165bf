"""Averages of policies in weight space: by hand, at their ends, in any order, of any dtype; and what is refused."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_ref.lab.models import locate
from dpo_ref.models.averages import PolicyFiles, open_policies, weighted_sum, write_average
from dpo_ref.models.checkpoint import state_digest
from dpo_ref.models.folders import WEIGHTS
from dpo_ref.models.loading import load_tokenizer


def saved(folder, seed, dtype=torch.float32, change=lambda model, tokenizer: None, **shape):
    """The lab's smallest policy, its weights moved at random, as a folder."""
    model = AutoModelForCausalLM.from_pretrained(locate("lab:tiny"), dtype=dtype)
    if shape:
        model.config.update(shape)
        model = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    tokenizer = load_tokenizer(locate("lab:tiny"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator).to(dtype))
    change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return [saved(root / name, seed) for seed, name in enumerate("abc")]


def files_of(*folders):
    return [PolicyFiles(folder.name, str(folder), str(folder)) for folder in folders]


def averaged(target, folders, weights):
    """The average as a dictionary of tensors, and the digest that was returned for it."""
    target.mkdir()
    digest = write_average(target, open_policies(files_of(*folders)), weights)
    return load_file(target / WEIGHTS), digest


def tensors(folder):
    return load_file(folder / WEIGHTS)


def test_two_numbers_by_hand():
    first, second = torch.tensor([1.0, -2.0]), torch.tensor([5.0, 2.0], dtype=torch.bfloat16)
    assert weighted_sum([first, second], [0.25, 0.75]).tolist() == [4.0, 1.0]
    assert weighted_sum([first, second], [1.5, -0.5]).tolist() == [-1.0, -4.0]  # beyond the first
    assert weighted_sum([first, torch.tensor([torch.inf, torch.nan])], [1.0, 0.0]).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("weights", [(0.3, 0.7), (-0.5, 1.5)])
def test_every_weight_is_the_sum_that_numpy_gives(folders, tmp_path, weights):
    average, digest = averaged(tmp_path / "out", folders[:2], weights)
    first, second = map(tensors, folders[:2])
    assert average.keys() == first.keys()
    for name, value in average.items():
        terms = [w * t[name].numpy().astype(np.float64) for w, t in zip(weights, (first, second), strict=True)]
        rounded = (terms[0] + terms[1]).astype(np.float32)
        np.testing.assert_allclose(
            value.numpy(), rounded, rtol=2e-7, atol=0, strict=True
        )  # one unit in the last place
    assert digest == state_digest(average)


def test_one_policy_is_itself_and_so_are_the_ends_of_a_path(folders, tmp_path):
    whole = [(folder / WEIGHTS).read_bytes() for folder in folders]
    averaged(tmp_path / "alone", folders[:1], [1.0])
    averaged(tmp_path / "first", folders[:2], [1.0, 0.0])
    averaged(tmp_path / "second", folders[:2], [0.0, 1.0])
    assert (tmp_path / "alone" / WEIGHTS).read_bytes() == whole[0]
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == whole[0]
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == whole[1]


def test_the_order_does_not_matter(folders, tmp_path):
    pairs = list(zip(folders, (0.1, 0.2, 0.7), strict=True))
    digests = set()
    for index, order in enumerate(itertools.permutations(pairs)):
        digests.add(averaged(tmp_path / str(index), *zip(*order, strict=True))[1])
    assert len(digests) == 1


def test_plain_transformers_load_what_is_written(folders, tmp_path):
    averaged(tmp_path / "out", folders[:2], [0.5, 0.5])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ends = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders[:2]]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, (ends[0][name] + ends[1][name]) / 2)
    assert model.dtype == torch.float32
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.chat_template == load_tokenizer(locate("lab:tiny")).chat_template


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
    ],
)
def test_it_is_stored_in_the_widest_dtype_and_rounded_once(tmp_path, dtypes, expected):
    folders = [saved(tmp_path / str(seed), seed, dtype) for seed, dtype in enumerate(dtypes)]
    average, _ = averaged(tmp_path / "out", folders, [0.75, 0.25])
    first, second = map(tensors, folders)
    for name, value in average.items():
        assert torch.equal(value, (0.75 * first[name].double() + 0.25 * second[name].double()).to(expected))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == expected


def test_a_head_that_an_older_folder_stores_beside_its_embedding_is_left_out(folders, tmp_path):
    older = saved(tmp_path / "older", 0)
    weights = tensors(older)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, older / WEIGHTS)
    average, _ = averaged(tmp_path / "out", [older, folders[1]], [0.5, 0.5])
    assert average.keys() == weights.keys()


# --- what is refused


def template(model, tokenizer):
    tokenizer.chat_template = "{{ messages }}"


def token(model, tokenizer):
    tokenizer.add_tokens(["<new>"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 64, "head_dim": 16}, "head_dim is 12 in the one's config.json and 16 in the other's"),
        ({"vocab_size": 900}, "vocab_size is 882 in the one's config.json and 900 in the other's"),
        ({"rms_norm_eps": 0.5}, "rms_norm_eps is 1e-06 in the one's config.json and 0.5 in the other's"),
        ({"change": template}, "their chat templates differ"),
        ({"change": token}, "their tokenizers have different vocabularies"),
    ],
)
def test_policies_that_are_not_alike_are_refused_with_the_first_difference(folders, tmp_path, options, words):
    other = saved(tmp_path / "other", 1, **options)
    with pytest.raises(ValueError, match=f"^policies: a and other cannot be averaged: {words}"):
        averaged(tmp_path / "out", [folders[0], other], [0.5, 0.5])


def test_another_set_of_weights_is_refused(folders, tmp_path):
    other = saved(tmp_path / "other", 1)
    weights = tensors(other)
    del weights["model.norm.weight"]
    save_file(weights, other / WEIGHTS)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is among the weights of a alone"):
        averaged(tmp_path / "out", [folders[0], other], [0.5, 0.5])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([0.5, 0.7], r"weights=\[0\.5, 0\.7\] sum to 1\.2 and must sum to 1: \[0\.416667, 0\.583333\] do"),
        ([1.0, -1.0], "sum to 0 and must sum to 1$"),
        ([1.0], "weights are 1 and policies 2"),
        ([float("nan"), 1.0], "must be finite"),
    ],
)
def test_weights_that_do_not_sum_to_1_are_refused(folders, tmp_path, weights, words):
    with pytest.raises(ValueError, match=words):
        averaged(tmp_path / "out", folders[:2], weights)


def test_what_is_not_finite_is_refused(folders, tmp_path):
    def spoil(model, tokenizer):
        with torch.no_grad():
            model.model.norm.weight[3] = torch.inf

    other = saved(tmp_path / "other", 1, change=spoil)
    with pytest.raises(ValueError, match=r"the average of model\.norm\.weight is not finite .* in F32"):
        averaged(tmp_path / "out", [folders[0], other], [0.5, 0.5])


def test_quantised_weights_are_refused(folders, tmp_path):
    other = saved(tmp_path / "other", 1)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"other: no model could be read: its weights are quantised"):
        averaged(tmp_path / "out", [folders[0], other], [0.5, 0.5])
