"""Where answers end: what a policy's folder tells transformers, beside our own sampling."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ref.data.tokenise import encode_prompts, end_of_turn_ids
from dpo_ref.generation.sampling import generate
from tests.support.command import train
from tests.support.model_folders import model_folder, pairs_file, words_for
from tests.support.quick import only
from tests.support.tokenizers_here import CHATML, byte_bpe

LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
FAMILIES = {  # template, EOS, what else is special, the token that ends a turn
    "chatml": (CHATML, "<|endoftext|>", [], "<|im_end|>"),
    "llama3": (LLAMA3, "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "gemma": (GEMMA, "<eos>", ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
}
LEARNT = ["objective=sft", "trainer.max_steps=60", "trainer.epochs=60", "optim.lr=1e-2", "optim.warmup_ratio=0"]


@pytest.mark.parametrize(
    ("family", "adapter"),
    only([("chatml", True), ("llama3", False), ("gemma", False)], ("chatml", True)),
)
def test_transformers_ends_answers_where_ours_end(tmp_path, family, adapter):
    template, eos, special, ending = FAMILIES[family]
    tokenizer = byte_bpe(template, eos)
    tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    base, pairs = model_folder(tmp_path / "base", tokenizer), pairs_file(tmp_path / "pairs.jsonl", number=5)
    more = ["model.lora_rank=8"] if adapter else []
    done = train(*words_for(base, pairs, tmp_path / "run", *LEARNT, *more))
    assert done.returncode == 0, done.stderr

    folder = tmp_path / "run" / "policy"
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ending)]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == ends
    model, saved = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert set(ends) == end_of_turn_ids(saved)
    prompts = [[{"role": "user", "content": json.loads(row)["prompt"]}] for row in pairs.read_text().splitlines()[:3]]
    ours = generate(model, saved, prompts, seed=0, temperature=0.0, max_new_tokens=24)
    assert any(answer.finish_reason == "stop" for answer in ours)
    for prompt, answer in zip(encode_prompts(saved, prompts), ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0, len(prompt) :]
        assert theirs.tolist() == list(answer.token_ids)
