"""Folders of models, tokenizers and adapters that strangers made or that are broken: told, and nothing of them is run,
guessed or put in by chance."""

import json
import os
import shutil
import struct
from functools import partial
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_ref.models.adapters import load_adapter
from dpo_ref.models.asked import ModelLoader, ModelPath
from dpo_ref.models.checkpoint import save_policy, weights_digest
from dpo_ref.models.folders import check_finite, opened
from dpo_ref.models.loading import load_model, load_tokenizer
from tests.support.command import resolved, train
from tests.support.quick import only
from tests.support.tiny import tiny_model
from tests.support.tokenizers_here import byte_bpe

CPU = torch.device("cpu")
TOKENIZER = byte_bpe(bos="<s>")
ROWS = len(TOKENIZER)
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil: pass\n"
DATA = ["data.num_pairs=4", "data.num_eval_pairs=2", "data.num_test_prompts=1", "trainer.batch_size=4"]
RUN = [*DATA, "trainer.max_steps=1", "tracking=none", "data.max_length=512"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model folder that is as it should be."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model(vocab_size=ROWS, pad_token_id=0, max_position_embeddings=512).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(whole, tmp_path / "model")


def settings(folder, name="config.json", /, **changes):
    content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps(content | changes))


def weights(folder, change):
    """Write the weights anew as `change` leaves them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def entry(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return change


def shortened(size):
    def change(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return change


def refused(tmp_path, *overrides):
    """The one line with which a run ends."""
    done = train(*RUN, *overrides, f"output_dir={tmp_path}/run")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run" / "policy").exists()
    return done.stderr.removeprefix("error: ").strip()


def test_the_folder_itself_trains(whole, tmp_path):
    done = train(*RUN, f"model.path={whole}", f"output_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr


# --- code and pickles


CODED = {
    "config.json": {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    },
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"},
    "generation_config.json": {"auto_map": {"GenerationConfig": "evil.Evil"}},
    "processor_config.json": {"auto_map": {"AutoProcessor": "evil.Evil"}},
}


def asked(monkeypatch):
    """Whoever asks a question gets a yes, and it is noted."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda *words: questions.append(words) or "y")
    return questions


@pytest.mark.parametrize("option", ["model.path", "reference.path"])
@pytest.mark.parametrize("name", CODED)
def test_code_of_a_folder_is_not_run(name, option, folder, whole, tmp_path, monkeypatch, tell):
    questions = asked(monkeypatch)
    settings(folder, name, **CODED[name])
    (folder / "evil.py").write_text(CODE)
    paths = {"model.path": whole} | {option: folder}
    reference = ["reference=other"] if option == "reference.path" else []
    line = refused(tmp_path, *reference, *(f"{key}={path}" for key, path in paths.items()))
    assert line.startswith(f"{option}={folder}")
    assert f"{name} names code of its own (auto_map: " in line
    assert "evil.Evil" in line
    assert not questions
    assert not (folder / "ran").exists()
    tell("let in", f"{option}: `auto_map` with code in {name}", seen=line, survived="nobody was asked, no code ran")


def test_code_in_a_folder_of_a_known_architecture_is_told_too(folder, tmp_path):
    settings(folder, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    assert "take auto_map out of config.json" in refused(tmp_path, f"model.path={folder}")


def test_attention_from_the_hub_is_not_fetched(folder, tmp_path, tell):
    settings(folder, attn_implementation="evil/kernel")
    line = refused(tmp_path, f"model.path={folder}")
    assert "code on the hub that computes attention (evil/kernel)" in line
    tell("let in", "config.json names an attention kernel on the hub", seen=line, survived="nothing was fetched")


def test_code_in_a_snapshot_of_the_hub(folder, tmp_path, monkeypatch, tell):
    """What was downloaded is checked as any folder is."""
    questions = asked(monkeypatch)
    settings(folder, **CODED["config.json"])
    (folder / "evil.py").write_text(CODE)
    repository, revision = tmp_path / "hub" / "models--stranger--model", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    line = refused(tmp_path, "model.path=stranger/model")
    assert line.startswith("model.path=stranger/model: ")
    assert "config.json names code of its own (auto_map: evil.Evil" in line
    assert not questions
    tell("let in", "a model on the hub with `auto_map` code", seen=line, survived="nobody was asked, no code ran")


def scorer_of(folder):
    """The folder as a reward model."""
    settings(folder, architectures=["LlamaForSequenceClassification"], num_labels=1, id2label={"0": "LABEL_0"})

    def with_score(tensors):
        tensors.pop("lm_head.weight")
        tensors["score.weight"] = torch.ones(1, 32)

    weights(folder, with_score)


def scored(tmp_path, whole, folder):
    """The line with which a run ends that asks the folder for rewards."""
    data = [word.replace("data.num", "data.prompts.num") for word in RUN if not word.startswith("data.max_length")]
    rounds = ["data=on_policy", "data.rounds=1", "data.prompts_per_round=2", "data.max_new_tokens=4"]
    scorer = ["scorer@data.scorer=reward_model", f"data.scorer.path={folder}"]
    done = train(*data, *rounds, *scorer, f"model.path={whole}", f"output_dir={tmp_path}/run")
    assert done.returncode == 1
    return done.stderr.removeprefix("error: ").strip()


SCORERS = {
    "without its head": (
        lambda folder: weights(folder, without("score.weight")),
        "lacks weights, such as score.weight",
    ),
    "with an infinite head": (lambda folder: weights(folder, entry("score.weight", torch.inf)), "score.weight is not"),
    "with `auto_map` code": (partial(settings, auto_map={"AutoModel": "evil.Evil"}), "auto_map: evil.Evil"),
    "without its end": (shortened(-100), "model.safetensors is damaged or cut short"),
}


@pytest.mark.parametrize("case", SCORERS)
def test_a_broken_scorer(case, folder, whole, tmp_path, monkeypatch, tell):
    questions = asked(monkeypatch)
    scorer_of(folder)
    broken, words = SCORERS[case]
    broken(folder)
    line = scored(tmp_path, whole, folder)
    assert line.startswith(f"scorer.path={folder}: ")
    assert "\n" not in line
    assert words in line
    assert not questions
    tell("used silently", f"a reward model {case}", seen=line, survived="no answer was scored by chance")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("content", ["harmless", "malicious"])
def test_pickled_weights_of_a_model_are_not_read(content, folder, tmp_path, tell):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors if content == "harmless" else Malicious(str(tmp_path / "ran")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    line = refused(tmp_path, f"model.path={folder}")
    assert "no safetensors but pytorch_model.bin" in line
    assert "use_safetensors=False" in line
    settings(folder, transformers_weights="pytorch_model.bin")
    assert not (tmp_path / "run").exists()  # refused before there is a folder
    assert "config.json names other weights" in refused(tmp_path, f"model.path={folder}")
    assert not (tmp_path / "ran").exists()
    tell("let in", f"a model whose weights are a {content} pickle", seen=line, survived="the pickle was not read")


# --- adapters


@pytest.fixture
def adapter(whole, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(whole), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("content", ["harmless", "malicious"])
def test_pickled_weights_of_an_adapter_are_not_read(content, adapter, whole, tmp_path, tell):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors if content == "harmless" else Malicious(str(tmp_path / "ran")), adapter / "adapter_model.bin")
    line = refused(tmp_path, f"model.path={whole}", f"model.adapter={adapter}")
    assert line.startswith(f"model.adapter={adapter}")
    assert "no safetensors but adapter_model.bin" in line
    assert not (tmp_path / "ran").exists()
    tell("let in", f"an adapter whose weights are a {content} pickle", seen=line, survived="the pickle was not read")


def test_an_adapter_loads_no_base_of_its_own(adapter, whole, tmp_path, tell):
    elsewhere = {"base_model_name_or_path": "https://stranger.example/model"}
    parent = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}
    settings(adapter, "adapter_config.json", **elsewhere, **parent)
    (tmp_path / "evil.py").write_text(CODE)
    done = train(*RUN, f"model.path={whole}", f"model.adapter={adapter}", f"output_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    settings(adapter, "adapter_config.json", peft_type="XLORA", adapters={"0": "stranger/adapter"})
    shutil.rmtree(tmp_path / "run")
    line = refused(tmp_path, f"model.path={whole}", f"model.adapter={adapter}")
    assert "peft_type: XLORA" in line
    tell("let in", "an adapter that names other models to load", seen=line, survived="nothing else was loaded")


def test_an_adapter_beside_a_model_is_not_put_on_it(folder, adapter, tmp_path, tell):
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    line = refused(tmp_path, f"model.path={folder}")
    assert "a model with an adapter beside it" in line
    tell("used silently", "an adapter left in a model's folder", seen=line, survived="it changed no answer")


def surplus_of(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    more = {name.replace("layers.1", "layers.7"): value.clone() for name, value in tensors.items()}
    save_file(tensors | more, adapter / "adapter_model.safetensors")


def infinite(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0] = torch.inf
    save_file(tensors, adapter / "adapter_model.safetensors")


def cut(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def other_shape(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    wider = {name: torch.cat([value, value], dim=1) for name, value in tensors.items() if "lora_A" in name}
    save_file(tensors | wider, adapter / "adapter_model.safetensors")


def fewer(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, adapter / "adapter_model.safetensors")


BROKEN_ADAPTERS = {
    "weights for layers that the model has not": (surplus_of, "layers.7.self_attn.q_proj.lora_A"),
    "an infinite weight": (infinite, "lora_A.default.weight is not finite"),
    "weights that are cut short": (cut, "adapter_model.safetensors is damaged or cut short"),
    "weights of another width": (other_shape, "torch.Size([2, 64])"),
    "missing weights": (fewer, "missing adapter keys"),
    "no settings": (
        lambda adapter: (adapter / "adapter_config.json").write_text("{"),
        "adapter_config.json is no JSON",
    ),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_a_broken_adapter(case, adapter, whole, tmp_path, tell):
    broken, words = BROKEN_ADAPTERS[case]
    broken(adapter)
    line = refused(tmp_path, f"model.path={whole}", f"model.adapter={adapter}")
    assert line.startswith(f"model.adapter={adapter}: ")
    assert words in line
    tell("used silently", f"an adapter with {case}", seen=line, survived="the model was not trained with it")


# --- weights that are not those of the model


NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"
CHANGED = {
    "without a layer's norm": (without(NORM), f"lacks weights, such as {NORM}"),
    "without its head": (without("lm_head.weight"), "lacks weights, such as lm_head.weight"),
    "with a value head": (put("v_head.weight", torch.ones(1, 32)), "hold v_head.weight, for which the model"),
    "with a bias it has no place for": (put("model.layers.0.self_attn.q_proj.bias", torch.ones(32)), "q_proj.bias"),
    "with an adapter not merged": (put("model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(2, 32)), "lora_A"),
    "with a layer more": (put("model.layers.2.mlp.down_proj.weight", torch.ones(32, 48)), "model.layers.2.mlp"),
    "of another shape": (put(DOWN, torch.ones(32, 40)), f"{DOWN} is [32, 40] in the weights and [32, 48] by"),
    "with nan": (entry(DOWN, torch.nan), f"{DOWN} is not finite"),
    "with inf in an embedding's row": (entry("model.embed_tokens.weight", -torch.inf), "embed_tokens.weight is not"),
}
ASKED = ("model.path", "reference.path")
OF_EITHER = only(list(product(CHANGED, ASKED)), *zip(CHANGED, cycle(ASKED)))


@pytest.mark.parametrize(("case", "option"), OF_EITHER)
def test_weights_that_are_not_the_models(case, option, folder, whole, tmp_path, tell):
    change, words = CHANGED[case]
    weights(folder, change)
    reference = ["reference=other", f"reference.path={folder}", f"model.path={whole}"]
    line = refused(tmp_path, *([f"model.path={folder}"] if option == "model.path" else reference))
    assert line.startswith(f"{option}={folder}: ")
    assert words in line
    tell(
        "used silently", f"{option}: weights {case}", seen=line, survived="nothing was drawn in their place or trained"
    )


def test_buffers_and_tied_heads_are_no_fault(folder, whole, tmp_path):
    """What old folders hold beside their weights; a head that is the embedding."""
    weights(folder, put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)))
    loaded = load_model(str(folder), CPU, "auto").model
    assert weights_digest(loaded) == weights_digest(load_model(str(whole), CPU, "auto").model)
    tied = tmp_path / "tied"
    tiny_model(vocab_size=ROWS, tie_word_embeddings=True).save_pretrained(tied)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load_model(str(tied), CPU, "auto")


def test_large_weights_are_finite():
    """Their sum is not."""
    layer = torch.nn.Linear(64, 64)
    torch.nn.init.constant_(layer.weight, 3e38)
    check_finite(layer, "model")


def test_a_file_written_over_does_not_change_the_model(folder, tell):
    model = load_model(str(folder), CPU, "auto").model
    before, file = weights_digest(model), folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(1000))
    assert weights_digest(model) == before
    file.write_bytes(b"")
    assert weights_digest(model) == before
    tell(
        "used silently",
        "weights written over after they were loaded",
        seen="-",
        survived="the model keeps its weights",
    )


def test_a_folder_that_changes_while_it_is_read(folder, tell):
    def replace():
        with opened(str(folder), "model.path", None, (), "no model could be loaded"):
            shutil.copy(folder / "model.safetensors", folder / "other")
            os.replace(folder / "other", folder / "model.safetensors")

    with pytest.raises(ValueError, match="its files changed while they were read") as refusal:
        replace()
    tell(
        "used silently", "a model replaced while it is loaded", seen=str(refusal.value), survived="no mixture of both"
    )


# --- what a run of ours wrote


def decay(file):
    """Another digit where a text has one, else another last byte: what is left can be read as before."""
    content = bytearray(file.read_bytes())
    place = next((index for index, byte in enumerate(content) if chr(byte).isdigit()), len(content) - 1)
    content[len(content) - 1 if file.suffix == ".safetensors" else place] ^= 1
    file.write_bytes(content)


WRITTEN = ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja")


@pytest.mark.parametrize("change", [decay, Path.unlink], ids=["decayed", "lost"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_policy_that_is_not_what_a_run_wrote(name, change, trained, tmp_path, tell):
    policy = shutil.copytree(trained / "policy", tmp_path / "policy")
    ModelLoader(CPU).policy(ModelPath(str(policy))).model.eval()
    (policy / "README.md").write_text("my own words")
    change(policy / name)
    line = refused(tmp_path, f"model.path={policy}")
    told = f"{name} is not as it was written (digests.json has another digest): save, copy or download it again; if"
    assert (told if (policy / "config.json").is_file() else "it has no config.json") in line
    assert line.startswith(f"model.path={policy}")
    tell(
        "used silently",
        f"`policy/{name}` of a run, {'lost' if change == Path.unlink else 'one bit of it changed'}",
        seen=line,
        survived="it was not used",
    )


def test_a_policy_that_was_changed_on_purpose(trained, tmp_path):
    policy = shutil.copytree(trained / "policy", tmp_path / "policy")
    decay(policy / "chat_template.jinja")
    (policy / "digests.json").unlink()
    assert load_tokenizer(str(policy)).chat_template == (policy / "chat_template.jinja").read_text()


def test_an_adapter_that_is_not_what_a_run_wrote(whole, adapter, tmp_path):
    model = load_model(str(whole), CPU, "auto").model
    layers = load_adapter(model, str(adapter), "model.adapter", trainable=True)
    save_policy(tmp_path / "policy", model, TOKENIZER, layers)
    saved = tmp_path / "policy" / "adapter"
    load_adapter(load_model(str(whole), CPU, "auto").model, str(saved), "model.adapter", trainable=False)
    decay(saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"model.adapter=.* adapter_model.safetensors is not as it was written"):
        load_adapter(load_model(str(whole), CPU, "auto").model, str(saved), "model.adapter", trainable=False)


# --- the tokenizer


def test_more_tokens_than_rows(folder, tmp_path, tell):
    tiny_model(vocab_size=ROWS - 20, pad_token_id=0).save_pretrained(folder)
    line = refused(tmp_path, f"model.path={folder}")
    assert f"its tokenizer has {ROWS} tokens and the model's embedding {ROWS - 20} rows" in line
    tell("untidy", "more tokens than rows of the embedding", seen=line, survived="told before any token met it")


def test_a_padding_token_without_a_row_cannot_occur(folder):
    tokenizer = load_tokenizer(str(folder), "policy")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(str(folder), "policy")) == ROWS + 1
    assert ModelLoader(CPU).policy(ModelPath(str(folder))).model is not None


def no_specials(folder):
    tokenizer = byte_bpe(eos=None)
    tokenizer.save_pretrained(folder)


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


TOKENIZERS = {
    "garbage": (written("tokenizer.json", "}{"), "no tokenizer could be loaded"),
    "JSON that is no tokenizer": (written("tokenizer.json", '{"model": 3}'), "no tokenizer could be loaded"),
    "an empty file": (written("tokenizer.json", ""), "no tokenizer could be loaded"),
    "settings that are no JSON": (written("tokenizer_config.json", "["), "tokenizer_config.json is no JSON"),
    "settings that are a list": (written("tokenizer_config.json", "[]"), "tokenizer_config.json is no JSON object"),
    "no end of turn": (no_specials, "set eos_token in tokenizer_config.json"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_broken_tokenizer(case, folder, tmp_path, tell):
    broken, words = TOKENIZERS[case]
    broken(folder)
    line = refused(tmp_path, f"model.path={folder}")
    assert words in line
    tell("untidy", f"a tokenizer of {case}", seen=line, survived="told in one line")


# --- files that are not whole


def sharded(folder):
    """The weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    places = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def missing_shard(folder):
    sharded(folder)
    (folder / "model-2.safetensors").unlink()


def climbing(folder):
    places = sharded(folder)
    shutil.move(folder / "model-2.safetensors", folder.parent / "x.safetensors")
    places = {name: "../x.safetensors" if file == "model-2.safetensors" else file for name, file in places.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def huge_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")


DAMAGED = {
    "the last bytes cut off": (shortened(-100), "model.safetensors is damaged or cut short"),
    "the header cut off": (shortened(40), "model.safetensors is damaged or cut short"),
    "no byte in it": (shortened(0), "model.safetensors is damaged or cut short: its 0 bytes"),
    "a header of a terabyte": (huge_header, "model.safetensors is damaged or cut short"),
    "a missing shard": (missing_shard, "model-2.safetensors of model.safetensors.index.json is not in the folder"),
    "an index that climbs out": (climbing, "names ../x.safetensors, which is no safetensors file of this folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is not there"),
    "a config.json that is no JSON": (written("config.json", "{"), "config.json is no JSON"),
    "a config.json that is a number": (written("config.json", "3"), "config.json is no JSON object"),
    "text for a size": (partial(settings, hidden_size="many"), "hidden_size"),
    "a negative size": (partial(settings, hidden_size=-32), "config.json describes no model that can be built"),
    "another width": (partial(settings, intermediate_size=64), "[32, 48] in the weights and [32, 64] by config.json"),
    "a layer more": (partial(settings, num_hidden_layers=3), "lacks weights, such as model.layers.2"),
    "a billion layers": (partial(settings, num_hidden_layers=10**9), "says num_hidden_layers=1,000,000,000"),
    "a huge width": (partial(settings, hidden_size=2**24, intermediate_size=2**24), "weights, and the folder holds"),
    "no architecture": (partial(settings, model_type="unheard"), "unheard"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model(case, folder, tmp_path, tell):
    damage, words = DAMAGED[case]
    damage(folder)
    line = refused(tmp_path, f"model.path={folder}")
    assert line.startswith(f"model.path={folder}")
    assert words in line
    tell("untidy", f"a model with {case}", seen=line, survived="told in one line, before it took memory")


def test_shards_are_read(folder, whole):
    sharded(folder)
    digests = [weights_digest(load_model(str(path), CPU, "auto").model) for path in (folder, whole)]
    assert digests[0] == digests[1]


def test_a_loop_of_links(tmp_path, tell):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    line = refused(tmp_path, f"model.path={tmp_path}/loop")
    tell("untidy", "a model path that is a loop of links", seen=line, survived="told in one line")


def test_a_file_that_is_a_loop_of_links(folder, tmp_path, tell):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")
    line = refused(tmp_path, f"model.path={folder}")
    assert "model.safetensors is not there" in line
    tell("untidy", "weights that are a loop of links", seen=line, survived="told in one line")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_without_permission(folder, tmp_path, tell):
    folder.chmod(0)
    try:
        line = refused(tmp_path, f"model.path={folder}")
    finally:
        folder.chmod(0o755)
    tell("untidy", "a model folder without permission to read", seen=line, survived="told in one line")


def test_a_policy_to_evaluate_is_named_by_its_option(folder):
    weights(folder, without(NORM))
    with pytest.raises(ValueError, match=f"^judge.model={folder}: .*lacks weights"):
        _ = ModelLoader(CPU).policy(ModelPath(str(folder), key="judge.model")).model


# --- options that are not finite


INFINITE = ["optim.lr", "optim.eps", "optim.beta1", "optim.weight_decay", "optim.warmup_ratio", "optim.max_grad_norm"]
INFINITE += ["trainer.epochs", "beta", "degeneration.max_seq_rep_4", "model.lora_alpha"]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
@pytest.mark.parametrize("key", INFINITE)
def test_options_that_are_not_finite(key, value, tmp_path):
    rank = ["model.lora_rank=2"] if key == "model.lora_alpha" else []
    line = refused(tmp_path, "model.path=lab:tiny", *rank, f"{key}={value}")
    assert line.startswith(key)


@pytest.mark.parametrize("option", ["lr=0", "eps=-1", "beta1=1", "beta2=1.5", "warmup_ratio=2", "max_grad_norm=0"])
@pytest.mark.parametrize("optimiser", ["adamw", "adamw_bf16"])
def test_options_out_of_range_are_refused_before_anything_is_loaded(optimiser, option):
    with pytest.raises(ValueError, match=rf"^optim\.{option}.* is out of range: it must be"):
        resolved(f"optim={optimiser}", f"optim.{option}")


def test_an_infinite_learning_rate(tmp_path, tell):
    line = refused(tmp_path, "model.path=lab:tiny", "optim.lr=inf")
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "metrics.jsonl").exists()
    tell("untidy", "`optim.lr=inf`", seen=line, survived="refused before anything was loaded")
