"""A model with another tokenizer and template than the policy's, as a fixture."""

import pytest

from dpo_ref.lab.recipes import foreign_tokenizer


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model of another vocabulary, tokenizer and template, with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("foreign"), foreign_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **shape)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
