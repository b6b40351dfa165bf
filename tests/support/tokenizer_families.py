"""Tokenizers of the families in use, built with the `tokenizers` library as the real ones are."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_ref.data.chat_templates import install_template
from tests.support.tokenizers_here import CHATML, CORPUS

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role)"
    " + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class Family(NamedTuple):
    """A tokenizer, and what its template writes around an answer; `words` is what it can write, None: anything."""

    tokenizer: Any
    before: str
    end: str
    trims: bool = False
    words: tuple[str, ...] | None = None


def finished(core: Tokenizer, template: str, bos: str | None, eos: str, specials: list[str]) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = template
    return tokenizer


def byte_level(specials: list[str], digits: bool) -> Tokenizer:
    """GPT-2's kind; with `digits` split as Qwen and Llama 3 do."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not digits)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if digits else level
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [*CORPUS, *["a\n\nb"] * 20],
        trainers.BpeTrainer(vocab_size=340, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    return core


def sentence_piece(specials: list[str], prefix: str) -> Tokenizer:
    """BPE with byte fallback; `prefix`: where the blank before the first word comes from (legacy, first, none)."""
    core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    blanks = normalizers.Replace(" ", "▁")
    strip: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
        strip.append(decoders.Strip(" ", 1, 0))
    elif prefix == "first":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip.append(decoders.Strip(" ", 1, 0))
    else:
        core.normalizer = blanks
    core.decoder = decoders.Sequence(strip)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [" ".join(CORPUS)]
    core.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=360, special_tokens=["<unk>", *bytes_, *specials], show_progress=False)
    )
    # Bytes are ordinary pieces; the trainer could only be given them as special tokens.
    return without_added(core, bytes_)


def without_added(core: Tokenizer, names: list[str]) -> Tokenizer:
    content = json.loads(core.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(content))


def word_piece(specials: list[str]) -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", *specials], show_progress=False)
    )
    return core


def unigram(specials: list[str]) -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=80, special_tokens=["<unk>", *specials], unk_token="<unk>", show_progress=False
        ),
    )
    return core


IM = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
TURNS = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
WORDS = ("the cat", "a dog", "yes", "no", "what is it", "sat", "mat", "1 2 3")


def templated(core: Tokenizer, name: str, bos: str | None, eos: str, specials: list[str]) -> Any:
    """A tokenizer with one of our templates."""
    tokenizer = finished(core, "", bos, eos, specials)
    install_template(tokenizer, name)
    return tokenizer


FAMILIES: dict[str, Callable[[], Family]] = {
    "qwen: byte-level, no BOS, ChatML": lambda: Family(
        finished(byte_level([*IM, "<|endoftext|>"], True), CHATML, None, "<|endoftext|>", IM), "", "<|im_end|>"
    ),
    "llama 3: byte-level, BOS": lambda: Family(
        templated(byte_level(LLAMA3, True), "llama3", LLAMA3[0], LLAMA3[4], LLAMA3[1:4]), "", "<|eot_id|>", trims=True
    ),
    "olmo: byte-level, tulu": lambda: Family(
        templated(byte_level(["<|endoftext|>"], False), "tulu", "<|endoftext|>", "<|endoftext|>", []),
        "",
        "<|endoftext|>",
    ),
    "pythia: byte-level, plain": lambda: Family(
        templated(byte_level(["<|endoftext|>"], False), "plain", None, "<|endoftext|>", []), " ", "<|endoftext|>"
    ),
    "llama 2: SentencePiece with a prefix on every piece": lambda: Family(
        finished(sentence_piece(["<s>", "</s>"], "legacy"), LLAMA2, "<s>", "</s>", []), " ", " </s>", trims=True
    ),
    "mistral: SentencePiece with a prefix on the first": lambda: Family(
        finished(sentence_piece(["<s>", "</s>"], "first"), MISTRAL, "<s>", "</s>", []), "", "</s>"
    ),
    "zephyr: SentencePiece, zephyr": lambda: Family(
        templated(sentence_piece(["<s>", "</s>"], "first"), "zephyr", "<s>", "</s>", []), "", "</s>"
    ),
    "gemma: SentencePiece without a prefix": lambda: Family(
        finished(sentence_piece(TURNS, "none"), GEMMA, "<bos>", "<eos>", TURNS[2:]), "", "<end_of_turn>", trims=True
    ),
    "unigram": lambda: Family(finished(unigram(IM), CHATML, None, "<|im_end|>", IM), "", "<|im_end|>", words=WORDS),
    "word pieces": lambda: Family(
        finished(word_piece(IM), CHATML, None, "<|im_end|>", IM), " ", " <|im_end|>", words=WORDS
    ),
}
