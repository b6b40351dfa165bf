"""The world's tokenizers: byte-level BPE trained on its own text, small enough for a model of 0.3 M parameters.

Both encode any text (every byte is a token) and decode it unchanged. Each turn opens with special tokens and closes
with the end-of-turn token, which is `eos_token`: so a prompt with the generation prompt is a token prefix of the whole
conversation, and a response is followed directly by the end-of-turn token.
"""

import random
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from dpo_ref.lab.demonstrations import draw_demonstrations
from dpo_ref.lab.writers import MIXED, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LAB_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FOREIGN_TEMPLATE = (
    "{% for message in messages %}"
    "<|start|>{{ message['role'] }}<|message|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)


def lab_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer of the lab's own models: most of the world's words are one token."""
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    return _wrapped(LAB_TEMPLATE, vocabulary=800, bos="<|bos|>", end_of_turn="<|eot|>", pad="<|pad|>", others=roles)


def foreign_tokenizer() -> "PreTrainedTokenizerFast":
    """Another tokenizer: a smaller vocabulary, so longer sequences, other special tokens, another template, no BOS."""
    headers = ["<|start|>", "<|message|>"]
    return _wrapped(FOREIGN_TEMPLATE, vocabulary=480, bos=None, end_of_turn="<|end|>", pad="<|blank|>", others=headers)


def _wrapped(
    template: str, *, vocabulary: int, bos: str | None, end_of_turn: str, pad: str, others: list[str]
) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[token for token in (pad, bos, end_of_turn, *others) if token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(8000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=end_of_turn,
        pad_token=pad,
        additional_special_tokens=others,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def _texts(num_conversations: int) -> Iterator[str]:
    demonstrations = draw_demonstrations(Writer(0.75, MIXED), "train", random.Random("tokenizer text"))
    for group in islice(demonstrations, num_conversations):
        yield from (text for message in group.prompt for text in (message["role"], message["content"]))
        yield group.responses[0]
