"""Sampling: the right distribution, the same answers whatever the batch, and records that survive the disk."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from dpo_ref.data.encoding import Encoder
from dpo_ref.generation.engine import gumbel, random_bits, stream_name
from dpo_ref.generation.kv_cache import ROOM, RoomyLayer, with_room
from dpo_ref.generation.records import read_generations, write_generations
from dpo_ref.generation.sampling import Rule, choose, generate, never_sampled
from dpo_ref.models.attention import register
from dpo_ref.types import PromptGroup
from tests.support.tiny import tiny_model
from tests.support.tokenizers_here import PLAIN, byte_bpe

TOKENIZER = byte_bpe()
EXTRA = 3  # rows of the embedding beyond the tokenizer


def model_for(tokenizer, model_type="llama", **options):
    return tiny_model(model_type, vocab_size=len(tokenizer) + EXTRA, **options)


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


PROMPTS = ask("a cat", "the dog ran and the cat sat on the mat", "1 2 3", "what is it?", "yes no maybe, of course!")


def rule(**changes):
    none = torch.tensor([], dtype=torch.int64)
    return replace(Rule(temperature=1.0, top_p=1.0, max_new_tokens=4, end_ids=none, never=none), **changes)


def step_by_step(model, tokenizer, generation):
    """An answer decoded again without cache, padding or batch: the whole text through the model for every token."""
    stream = torch.tensor([stream_name(generation.seed, generation.prompt, 0, generation.sample_index)])
    never = never_sampled(tokenizer, len(tokenizer) + EXTRA)
    ids = list(generation.prompt_ids)
    for step in range(generation.num_tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1:]
        logits[:, never] = -torch.inf
        noise = gumbel(stream, step, logits.shape[-1]) if generation.temperature else 0
        ids.append(int((logits / (generation.temperature or 1.0) + noise).argmax()))
    return tuple(ids[len(generation.prompt_ids) :])


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma2", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_cached_padded_decoding_equals_one_token_at_a_time(model_type, temperature):
    model = model_for(TOKENIZER, model_type)
    answers = generate(model, TOKENIZER, PROMPTS, 5, temperature=temperature, max_new_tokens=20, batch_size=3)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for answer in answers:
            assert answer.token_ids == step_by_step(model, TOKENIZER, answer)
    assert len({answer.token_ids for answer in answers}) > 2


def test_batch_size_order_and_company_change_no_sample():
    model = model_for(TOKENIZER)
    options = {"samples_per_prompt": 3, "max_new_tokens": 25}
    once = generate(model, TOKENIZER, PROMPTS, 1, batch_size=15, **options)
    assert once == generate(model, TOKENIZER, PROMPTS, 1, batch_size=2, **options)
    shuffled = [PROMPTS[i] for i in (3, 0, 4)]
    by_text = {(str(g.prompt), g.sample_index): g.token_ids for g in once}
    for answer in generate(model, TOKENIZER, shuffled, 1, batch_size=4, **options):
        assert answer.token_ids == by_text[str(answer.prompt), answer.sample_index]
    assert [(g.prompt_index, g.sample_index) for g in once] == [(p, s) for p in range(5) for s in range(3)]
    assert len({g.token_ids for g in once}) == 15
    assert once != generate(model, TOKENIZER, PROMPTS, 2, batch_size=15, **options)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_prompts_read_once_and_a_cache_with_room_change_no_answer(model_type):
    """Three samples of each prompt share its reading; a cache is longer than the room it gets at a time."""
    model = model_for(TOKENIZER, model_type)
    options = {"samples_per_prompt": 3, "max_new_tokens": 2 * ROOM + 5}
    answers = generate(model, TOKENIZER, PROMPTS, 3, batch_size=15, **options)
    assert answers == generate(model, TOKENIZER, PROMPTS, 3, batch_size=1, **options)
    assert max(answer.num_tokens for answer in answers) > ROOM


MAMBA2 = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
RECURRENT = {
    "falcon_h1": {"mamba_d_state": 8, **MAMBA2},  # attention and states in one layer
    "qwen3_5_text": {**DELTA, "layer_types": ["linear_attention", "full_attention"]},
    "mamba": {"state_size": 8},  # a cache by another name
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model_type", RECURRENT)
def test_recurrent_states_are_those_of_their_rows(model_type):
    """Prompts that are alike are read once, and answers that have ended leave the batch."""
    model = model_for(TOKENIZER, model_type, backend="eager", head_dim=8, **RECURRENT[model_type])
    model.set_attn_implementation("eager")
    options = {"samples_per_prompt": 3, "max_new_tokens": 24, "temperature": 1.5}
    answers = generate(model, TOKENIZER, PROMPTS[:3], 3, batch_size=9, **options)
    assert len({answer.num_tokens for answer in answers}) > 1  # some leave before others
    with torch.no_grad():
        for answer in answers:
            assert answer.token_ids == step_by_step(model, TOKENIZER, answer)


def test_a_layer_with_room_holds_what_one_that_is_copied_holds():
    plain, roomy = DynamicCache(), DynamicCache()
    states = torch.randn(2 * ROOM + 10, 2, 4, 3, 8)  # positions, keys and values, rows, heads, dimensions
    for cache in (plain, roomy):
        cache.update(*states[:5].movedim(0, 3), 0)
    with_room(roomy)
    assert isinstance(roomy.layers[0], RoomyLayer)
    for position in range(5, len(states)):
        new = states[position, :, :, :, None]
        if position == ROOM:
            plain.batch_select_indices(torch.tensor([2, 0]))
            roomy.batch_select_indices(torch.tensor([2, 0]))
        new = new[:, [2, 0]] if position >= ROOM else new
        for ours, theirs in zip(roomy.update(*new, 0), plain.update(*new, 0), strict=True):
            assert torch.equal(ours, theirs)
    assert roomy.get_seq_length() == len(states)


def test_a_prompt_that_occurs_twice_gets_different_samples():
    answers = generate(model_for(TOKENIZER), TOKENIZER, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], 0, max_new_tokens=9)
    assert answers[0].token_ids != answers[2].token_ids


def test_answers_end_at_either_end_token_and_are_cut_otherwise():
    model = model_for(TOKENIZER)
    ends = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    answers = generate(model, TOKENIZER, PROMPTS, 0, samples_per_prompt=40, max_new_tokens=30, batch_size=64)
    stopped = [g for g in answers if g.finish_reason == "stop"]
    assert {g.token_ids[-1] for g in stopped} == set(ends)
    assert 0 < len(stopped) < len(answers)
    for answer in answers:
        assert not set(answer.content_ids) & set(ends)
        assert answer.finished or answer.num_tokens == 30
        assert answer.output == TOKENIZER.decode(answer.content_ids)
        assert (answer.num_tokens, answer.num_chars) == (len(answer.token_ids), len(answer.output))
    assert any("<|im_start|>" in g.output for g in answers), "special tokens in mid-answer must be seen"


def test_padding_and_entries_without_text_are_never_sampled():
    tokenizer = byte_bpe(PLAIN, bos="<s>")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = model_for(tokenizer)
    banned = never_sampled(tokenizer, len(tokenizer) + EXTRA).tolist()
    assert banned == [tokenizer.pad_token_id, *range(len(tokenizer), len(tokenizer) + EXTRA)]
    with torch.no_grad():
        model.get_output_embeddings().weight[banned] *= 40  # a drifted policy that would write nothing else
    for temperature in (0.0, 1.0):
        for answer in generate(model, tokenizer, PROMPTS, 0, temperature=temperature, max_new_tokens=12):
            assert not set(answer.token_ids) & set(banned)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.eos_token_id not in never_sampled(tokenizer, len(tokenizer)).tolist()


def test_draws_follow_the_softmax():
    """Chi-square against the exact probabilities, over streams at one step and over steps of one stream."""
    logits = torch.tensor([0.3, -1.2, 1.1, 0.0, -3.0])
    draws = 40_000
    streams = torch.tensor([stream_name(3, ask("x")[0], 0, i) for i in range(draws)])
    over_streams = choose(logits.expand(draws, 5), streams, 7, rule())
    stream = streams[:1]
    over_steps = torch.cat([choose(logits[None], stream, step, rule()) for step in range(4000)])
    for drawn in (over_streams, over_steps):
        expected = logits.double().softmax(0) * len(drawn)
        observed = drawn.bincount(minlength=5)
        assert ((observed - expected) ** 2 / expected).sum() < 23.5  # 4 degrees of freedom: p = 1e-4


def test_noise_has_the_moments_and_tails_of_a_gumbel_and_no_correlation():
    streams = torch.tensor([stream_name(0, ask("y")[0], 0, i) for i in range(300)])
    noise = torch.stack([gumbel(streams, step, 50) for step in range(40)]).double()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.008)  # Euler's constant; se 0.0017
    assert noise.var().item() == pytest.approx(1.64493, abs=0.03)  # pi^2 / 6; se 0.0045
    assert (noise > 9.21034).double().mean().item() == pytest.approx(1e-4, abs=5e-5)
    centred = noise - noise.mean()
    for dim in range(3):
        pairs = centred.narrow(dim, 0, noise.shape[dim] - 1) * centred.narrow(dim, 1, noise.shape[dim] - 1)
        assert abs(pairs.mean().item()) < 0.01  # neighbours: steps, streams, entries; se 0.002


def test_bits_are_those_of_splitmix64():
    """Against the published generator in exact integers."""

    def splitmix(state):
        z = state & (2**64 - 1)
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        return z ^ (z >> 31)

    streams = torch.tensor([-(2**63), -12345, 0, 2**63 - 1])
    bits = random_bits(streams, 3, 4)
    for row, stream in enumerate(streams.tolist()):
        for entry in range(4):
            state = stream + (3 * 4 + entry + 1) * 0x9E3779B97F4A7C15
            assert bits[row, entry].item() % 2**64 == splitmix(state)
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # its first output for seed 0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()  # likeliest: 0, 2
    streams = torch.arange(2000)
    for top_p, kept in ((0.4, {0}), (0.7, {0, 2}), (0.79, {0, 2}), (1.0, {0, 1, 2, 3})):
        drawn = choose(logits.expand(2000, 4), streams, 0, rule(top_p=top_p))
        assert set(drawn.tolist()) == kept
    drawn = choose(logits.expand(2000, 4), streams, 0, rule(top_p=0.7))
    assert (drawn == 0).double().mean().item() == pytest.approx(0.5 / 0.8, abs=0.04)


def test_mode_and_attention_are_restored_even_after_an_error():
    model = model_for(TOKENIZER, backend="eager").train()
    generate(model, TOKENIZER, PROMPTS, 0, max_new_tokens=3)
    assert model.training
    assert model.config._attn_implementation == register("eager")

    def broken(items, description, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, TOKENIZER, PROMPTS, 0, broken, max_new_tokens=3)
    assert model.training
    assert model.config._attn_implementation == register("eager")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "generation.temperature=-1.0"),
        ({"top_p": 0.0}, "generation.top_p=0.0"),
        ({"max_new_tokens": 0}, "generation.max_new_tokens=0"),
        ({"batch_size": 0}, "generation.batch_size=0"),
        ({"temperature": 0.0, "samples_per_prompt": 2}, "samples_per_prompt=1"),
        ({"max_new_tokens": 250}, "prompt 1 has 28 tokens .* 228 and less fit"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(model_for(TOKENIZER), TOKENIZER, PROMPTS, 0, **options)


def test_tokenizers_without_an_end_or_a_template_are_refused():
    with pytest.raises(ValueError, match="chat template"):
        generate(model_for(TOKENIZER), byte_bpe(template=None), PROMPTS, 0)
    with pytest.raises(ValueError, match="EOS"):
        generate(model_for(TOKENIZER), byte_bpe(eos=None), PROMPTS, 0)


def test_generations_survive_the_disk(tmp_path):
    path = tmp_path / "generations.jsonl"
    answers = generate(model_for(TOKENIZER), TOKENIZER, PROMPTS, 0, samples_per_prompt=2, max_new_tokens=7)
    odd = replace(answers[0], output='line\u2028 \n\t\u00fc \ud7ff "quoted" \x00')
    write_generations(path, [odd, *answers[1:]])
    assert read_generations(path) == [odd, *answers[1:]]
    assert [p.name for p in tmp_path.iterdir()] == ["generations.jsonl"]


def test_broken_files_of_generations_are_refused(tmp_path):
    path = tmp_path / "generations.jsonl"
    with pytest.raises(ValueError, match="does not exist"):
        read_generations(path)
    answers = generate(model_for(TOKENIZER), TOKENIZER, PROMPTS[:1], 0, max_new_tokens=3)
    write_generations(path, answers)
    good = path.read_text()
    path.write_text(good + good[:40] + "\n")
    with pytest.raises(ValueError, match="row 2 is damaged: it is not JSON"):
        read_generations(path)
    path.write_text(good + '{"output": "x"}\n')
    with pytest.raises(ValueError, match="row 2 is not a generation: it lacks 'prompt'"):
        read_generations(path)


def test_no_prompts_give_no_answers():
    assert generate(model_for(TOKENIZER), TOKENIZER, [], 0) == []


def test_many_random_prompt_lengths():
    """Padding of every width in one batch."""
    random.seed(0)
    prompts = ask(*("cat " * random.randint(1, 20) + str(i) for i in range(30)))
    model = model_for(TOKENIZER)
    together = generate(model, TOKENIZER, prompts, 0, max_new_tokens=6)
    assert together == generate(model, TOKENIZER, prompts, 0, max_new_tokens=6, batch_size=1)


def test_what_a_prompt_offers_is_asked_and_kept(tmp_path):
    """Tools and template options of a row reach the template when its prompt is answered, and the record of it."""
    template = (
        "{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>{% endfor %}{{ 'loud ' if loud else '' }}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer, tools = byte_bpe(template), ({"type": "function", "function": {"name": "tide"}},)
    (question,) = ask("a cat")
    offered = PromptGroup(tuple(question), ("so",), tools=tools, template_options={"loud": True}).asked
    first, second = generate(model_for(tokenizer), tokenizer, [offered, question], 0, max_new_tokens=3)
    start = '<tool>{"type": "function", "function": {"name": "tide"}}</tool>loud <|im_start|>user'
    assert tokenizer.decode(first.prompt_ids).startswith(start)
    assert tokenizer.decode(second.prompt_ids).startswith("<|im_start|>user")
    write_generations(tmp_path / "generations.jsonl", [first, second])
    assert read_generations(tmp_path / "generations.jsonl") == [first, second]
    assert "template_options" not in (tmp_path / "generations.jsonl").read_text().splitlines()[1]
    written = Encoder(tokenizer).last_turns([first.texts, second.texts])
    assert [ids.prompt for ids in written] == [list(first.prompt_ids), list(second.prompt_ids)]
