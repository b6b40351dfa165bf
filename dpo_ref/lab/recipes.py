"""How the lab's checkpoints are made: tokenizers trained on the world's own text, models fitted to what its writers
write by the project's own SFT.

A recipe fixes everything that weights depend on. The shipped checkpoints (`models.py`) are what these recipes gave
once; `make lab-models` trains them again and compares.

The tokenizers are byte-level BPE, small enough for a model of half a million parameters. Both encode any text (every
byte is a token) and decode it unchanged. Each turn opens with special tokens and closes with the end-of-turn token,
which is `eos_token`: so a prompt with the generation prompt is a token prefix of the whole conversation, and a
response is followed directly by the end-of-turn token.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import tokenise
from dpo_ref.distributed import best_device
from dpo_ref.lab.preferences import MIXED, Writer, draw_demonstrations, lab_sft
from dpo_ref.models.attention import register
from dpo_ref.models.checkpoint import save_policy
from dpo_ref.models.loading import Policy
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.unpaired import sft
from dpo_ref.references.policies import NoReference
from dpo_ref.tracking.terminal import TrainingProgress
from dpo_ref.training.optim import adamw, optimisation
from dpo_ref.training.rounds import OfflineRounds, TrainerConfig
from dpo_ref.training.trainer import train
from dpo_ref.types import digest, words_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# --- tokenizers


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
    return _train_tokenizer(
        LAB_TEMPLATE, vocabulary=1000, bos="<|bos|>", end_of_turn="<|eot|>", pad="<|pad|>", extra_tokens=roles
    )


def foreign_tokenizer() -> "PreTrainedTokenizerFast":
    """Another tokenizer: a smaller vocabulary, so longer sequences, other special tokens, another template, no BOS."""
    headers = ["<|start|>", "<|message|>"]
    return _train_tokenizer(
        FOREIGN_TEMPLATE, vocabulary=640, bos=None, end_of_turn="<|end|>", pad="<|blank|>", extra_tokens=headers
    )


def _train_tokenizer(
    template: str, *, vocabulary: int, bos: str | None, end_of_turn: str, pad: str, extra_tokens: list[str]
) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[token for token in (pad, bos, end_of_turn, *extra_tokens) if token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(8000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=end_of_turn,
        pad_token=pad,
        additional_special_tokens=extra_tokens,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def _texts(num_conversations: int) -> Iterator[str]:
    demonstrations = draw_demonstrations(Writer(0.75, MIXED), "train", random.Random("tokenizer text"))
    for group in islice(demonstrations, num_conversations):
        yield from (text for message in group.prompt for text in (message["role"], message["content"]))
        yield words_of(group.responses[0])


TOKENIZERS: dict[str, Callable[[], "PreTrainedTokenizerFast"]] = {"lab": lab_tokenizer, "foreign": foreign_tokenizer}


# --- recipes


WORLD_SAMPLES = 200  # conversations whose text stands for the world in a recipe's digest


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass of SFT over fresh demonstrations of one writer."""

    competence: float
    styles: str
    num_steps: int
    lr: float
    batch_size: int = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything the weights depend on: an architecture with random weights, or the model `parent`, and what it is
    fitted to, stage by stage."""

    architecture: str
    tokenizer: str
    shape: dict[str, int | float]
    stages: tuple[Stage, ...]
    seed: int = 0
    parent: str | None = None

    @property
    def key(self) -> str:
        """Digest of the recipe and of what the world says: another wording or fact makes another model."""
        above = RECIPES[self.parent].key if self.parent else None
        return digest([asdict(self), above, _world(self.seed)])[:16]


@cache
def _world(seed: int) -> list[str]:
    """Digests of some conversations."""
    demonstrations = lab_sft(seed, num_examples=WORLD_SAMPLES, num_eval_examples=0, num_test_prompts=0).train
    return [group.group_id for group in demonstrations]


SHAPE: dict[str, int | float] = {
    "hidden_size": 128,
    "intermediate_size": 336,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,  # at the usual 0.02 a model this narrow learns several times more slowly
}
LARGE = SHAPE | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "initializer_range": 0.02}
# First the skill, then how often the writers show it: a model that is fitted to the mixture alone has not learnt what
# its pairs ask it to prefer. In all styles: one that knew the skill in one style only would have to be told in each.
SKILL = Stage(competence=1.0, styles="mixed", num_steps=5000, lr=3e-3)
HABIT = Stage(competence=0.45, styles="mixed", num_steps=800, lr=1e-3)
RECIPES = {
    "initial": Recipe("llama", "lab", SHAPE, (SKILL, HABIT)),
    "initial_2": Recipe("llama", "lab", SHAPE, (SKILL, HABIT), seed=1),
    "strong": Recipe("llama", "lab", SHAPE, (replace(HABIT, competence=0.95),), parent="initial"),
    "strong_terse": Recipe(
        "llama", "lab", SHAPE, (replace(HABIT, competence=0.95, styles="terse"),), parent="initial"
    ),
    # Of an architecture whose tokenizers transformers loads as they were saved; Qwen2's it makes anew.
    "foreign": Recipe("qwen3", "foreign", SHAPE | {"head_dim": 32}, (SKILL, replace(HABIT, competence=0.95))),
    "tiny": Recipe(
        "llama",
        "lab",
        SHAPE | {"hidden_size": 48, "intermediate_size": 96},
        (Stage(competence=0.45, styles="mixed", num_steps=60, lr=1e-2, batch_size=32),),
    ),
    "large": Recipe(
        "llama",
        "lab",
        LARGE | {"num_attention_heads": 8, "num_key_value_heads": 8},
        (Stage(competence=1.0, styles="mixed", num_steps=3000, lr=1e-3, batch_size=256), HABIT),
    ),
}


# --- building


@torch.enable_grad()  # the first to ask for a model may be an evaluation
def build(recipe: Recipe, folder: Path, parent: Path | None = None) -> None:
    """Train a model by its recipe and write its folder, in bfloat16; `parent` is the folder of the model it starts
    from. The weights depend on the recipe, the machine's arithmetic and the number of threads."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        tokenizer = TOKENIZERS[recipe.tokenizer]()
        model = (_from_parent(parent) if parent else _at_random(recipe, tokenizer)).to(best_device())
        for index, stage in enumerate(recipe.stages):
            title = f"{folder.name} {index + 1}/{len(recipe.stages)}"
            _fit(model, tokenizer, stage, seed=recipe.seed + 1000 * index + (500 if parent else 0), title=title)
    save_policy(folder, model.to(torch.bfloat16), tokenizer)


def _from_parent(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.set_attn_implementation(register("sdpa"))
    return model


def _at_random(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar at a time, ours
    config = AutoConfig.for_model(
        recipe.architecture,
        **recipe.shape,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    model.set_attn_implementation(register("sdpa"))
    return model


def _fit(model: Any, tokenizer: Any, stage: Stage, seed: int, title: str) -> None:
    num_examples = stage.num_steps * stage.batch_size
    data = lab_sft(
        seed,
        num_examples=num_examples,
        num_eval_examples=0,
        num_test_prompts=0,
        competence=stage.competence,
        styles=stage.styles,  # pyright: ignore[reportArgumentType]
    )
    groups = tokenise(data.train, tokenizer).groups
    optimiser = partial(adamw, weight_decay=0.01)
    optim = optimisation(optimiser, model, stage.num_steps, lr=stage.lr, schedule="cosine", warmup_ratio=0.03)
    config = TrainerConfig(batch_size=stage.batch_size, epochs=1.0)
    rounds = OfflineRounds(groups, config, partial(pack, tokens_per_batch=16384), seed)
    policy, bar = Policy(lambda: model, tokenizer), TrainingProgress(title)
    with bar.shown(stage.num_steps):
        bar.advance(0)
        for step in train(policy, NoReference(), bind(sft), optim, rounds):
            if step.step % 20 == 0:
                bar.update({name: float(value) for name, value in step.metrics.items()})
            bar.advance()
        bar.complete()
