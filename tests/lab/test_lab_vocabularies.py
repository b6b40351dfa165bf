"""The two tokenizers: any text survives, templates are prefix-stable, the end of a turn is the EOS token."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from dpo_ref.lab import recipes
from dpo_ref.lab.preferences import lab_sft
from dpo_ref.lab.recipes import foreign_tokenizer, lab_tokenizer
from dpo_ref.types import Message, conversation

ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40).filter(lambda text: "<|" not in text)


@pytest.fixture(scope="module")
def lab():
    return lab_tokenizer()


@pytest.fixture(scope="module")
def foreign():
    return foreign_tokenizer()


@pytest.fixture(scope="module", params=["lab", "foreign"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def rendered(tokenizer, messages, generate: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    ids = tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=generate)["input_ids"]
    assert ids == encode(tokenizer, text)
    return ids


@given(text=ANY_TEXT)
@settings(deadline=None, max_examples=60)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


@given(question=ANY_TEXT, answer=ANY_TEXT, follow_up=ANY_TEXT, response=ANY_TEXT)
@settings(deadline=None, max_examples=60)
def test_prompt_is_a_token_prefix_and_the_response_ends_with_eos(tokenizer, question, answer, follow_up, response):
    contents = zip(("system", "user", "assistant", "user"), ("Be brief.", question, answer, follow_up), strict=True)
    prompt = [Message(role=role, content=content) for role, content in contents]
    before = rendered(tokenizer, prompt, generate=True)
    whole = rendered(tokenizer, conversation(prompt, response))
    assert whole == [*before, *encode(tokenizer, response), tokenizer.eos_token_id]


def test_specials(tokenizer, tmp_path):
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.unk_token is None
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    prompt = [Message(role="user", content="Sort 3 1 2 in ascending order.")]
    assert rendered(loaded, prompt, generate=True) == rendered(tokenizer, prompt, generate=True)
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == (
        tokenizer.eos_token,
        tokenizer.pad_token,
        tokenizer.bos_token,
    )
    odd = " a , b .  don 't\n\t字 <|pad"
    assert loaded.decode(encode(loaded, odd)) == odd
    assert len(loaded) == len(tokenizer)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_folder_of_each_recipe_loads_the_tokenizer_it_was_trained_with(name, request, tmp_path):
    """transformers chooses the class by the architecture, and some make it anew (Qwen2's splits digits)."""
    recipe = recipes.RECIPES[name]
    trained = request.getfixturevalue(recipe.tokenizer)
    AutoConfig.for_model(recipe.architecture).save_pretrained(tmp_path)
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for g in lab_sft(1, num_examples=90).train for text in (g.responses[0], g.prompt[0]["content"])]
    assert [encode(loaded, text) for text in texts] == [encode(trained, text) for text in texts]
    assert len(loaded) == len(trained)


def test_the_foreign_tokenizer_is_another_one(lab, foreign):
    prompt = [Message(role="user", content="Name two trees, but not oak.")]
    assert lab.bos_token_id is not None
    assert foreign.bos_token is None
    assert len(lab) == 882
    assert len(foreign) == 640
    assert not set(lab.all_special_tokens) & set(foreign.all_special_tokens)
    assert len(rendered(foreign, prompt)) != len(rendered(lab, prompt))
    assert rendered(lab, prompt)[0] == lab.bos_token_id
    assert rendered(lab, prompt).count(lab.bos_token_id) == 1


def test_a_token_is_about_a_word(lab):
    texts = [group.responses[0] for group in lab_sft(1, num_examples=500).train]
    tokens = sum(len(encode(lab, text)) for text in texts)
    assert tokens < 2.0 * sum(len(text.split()) for text in texts)


def test_another_process_trains_the_same_vocabulary(lab):
    code = "from dpo_ref.lab.recipes import lab_tokenizer as t; print(t()._tokenizer.to_str(), end='')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other == lab._tokenizer.to_str()
