"""What an option that is left open (null) means for this model: the learning rate, the length of answers and the size
of packs that a practitioner would start with, by the number of weights, what of them is trained, and the objective.

They are written into the configuration before a run begins, so that its record says what it was made with and a run
that goes on has what it had. A preset cannot hold them: the same folder is tuned whole or through an adapter, on
demonstrations or on pairs.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from dpo_ref.cli.resolve import RunConfig
from dpo_ref.models.folders import opened, stored_positions, stored_shapes
from dpo_ref.models.loading import check_folder, locate
from dpo_ref.objectives.interface import Objective
from dpo_ref.tracking.terminal import say

TOY = 50e6  # weights: below is the lab, or somebody's own toy
LARGE = 3.5e9


class Rate(NamedTuple):
    """A learning rate and whose it is."""

    lr: float
    of: str


TOY_RATE = Rate(3e-4, "the lab's, as for any model below 50 M weights (docs/lab.md)")
RATES = {  # by (what is fitted, whether an adapter is trained, whether the model is large)
    ("preferences", False, False): Rate(1e-6, "SmolLM2's and SmolLM3's DPO, 0.1 to 3 B weights"),
    ("preferences", False, True): Rate(5e-7, "Zephyr's and Tulu 2's DPO, 7 B weights and more"),
    ("preferences", True, False): Rate(1e-5, "ten times that of the whole model, as usual for LoRA"),
    ("preferences", True, True): Rate(5e-6, "Zephyr's DPO with LoRA, 7 B weights"),
    ("demonstrations", False, False): Rate(2e-5, "Zephyr's SFT"),
    ("demonstrations", False, True): Rate(2e-5, "Zephyr's SFT, 7 B weights"),
    ("demonstrations", True, False): Rate(2e-4, "Zephyr's SFT with LoRA"),
    ("demonstrations", True, True): Rate(2e-4, "Zephyr's SFT with LoRA, 7 B weights"),
    ("scores", False, False): Rate(1e-5, "InstructGPT's reward model, rounded"),
    ("scores", False, True): Rate(1e-5, "InstructGPT's reward model, rounded"),
    ("scores", True, False): Rate(1e-4, "ten times that of the whole model, as usual for LoRA"),
    ("scores", True, True): Rate(1e-4, "ten times that of the whole model, as usual for LoRA"),
}
LENGTHS = {  # by option: for a toy, for another model on a CPU, and on an accelerator
    "generation.max_new_tokens": (128, 1024, 1024),  # the three of answers: at most half of the model's positions
    "evaluation.max_new_tokens": (128, 512, 512),
    "data.max_new_tokens": (128, 512, 512),
    "objective.max_new_tokens": (128, 512, 512),
    "data.tokens_per_batch": (8192, 1024, 8192),  # a token of SmolLM2 keeps 1.4 MiB of activations in float32
    "data.prompts.tokens_per_batch": (8192, 1024, 8192),
}


class Size(NamedTuple):
    """Weights of a model, and the tokens that it has positions for, where its config says."""

    weights: int
    positions: int | None

    @property
    def is_toy(self) -> bool:
        """Whether it is no language model that anybody would use."""
        return self.weights < TOY

    @property
    def room(self) -> int | float:
        """The longest answer that is asked for unless it is said how long: half of the positions."""
        return math.inf if self.positions is None else max(1, self.positions // 2)

    def __str__(self) -> str:
        return f"{self.weights / 1e9:.1f} B" if self.weights >= 1e9 else f"{self.weights / 1e6:.3g} M"


def size_of(path: str, key: str, revision: str | None = None) -> Size:
    """The size of the model in the folder or hub name at `path`, by its config and the headers of its weights. Raises
    ValueError naming `key`."""
    check_folder(path, key)
    files = ("config.json", "model*.safetensors*")
    with opened(locate(path), key, revision, files, "no model could be loaded") as folder:
        weights = sum(math.prod(shape) for shape in stored_shapes(folder).values())
    return Size(weights, stored_positions(locate(path), key, revision))


def fitted(objective: Objective) -> str:
    """What an objective fits a model to: preferences, demonstrations or scores."""
    if objective.of_scores:
        return "scores"
    compares = objective.pairwise or objective.listwise
    of_preferences = compares or {"labels", "advantages", "quantiles"} & set(objective.inputs)
    return "preferences" if of_preferences else "demonstrations"


def rate_of(objective: Objective, size: Size, adapter: bool) -> Rate:
    """The learning rate to start with, and whose it is."""
    return TOY_RATE if size.is_toy else RATES[fitted(objective), adapter, size.weights > LARGE]


def complete_run(cfg: DictConfig, run: RunConfig, device: torch.device) -> DictConfig:
    """The tree of a training run with what its null options mean; says which learning rate, and why."""
    options, lr_is_open = run.model.options, cfg.optim.lr is None
    if certificate := run.reference.options.get("certificate"):  # auto is the one beside the data's rows
        OmegaConf.update(cfg, "reference.certificate", certificate)
    if not lr_is_open and not _left_open(cfg):
        return cfg
    size, adapter = size_of(options["path"], "model.path", options["revision"]), trains_adapter(options)
    cfg = _with_lengths(cfg, size, device)
    if lr_is_open:
        rate = rate_of(run.objective, size, adapter)
        cfg.optim.lr = rate.lr
        if not size.is_toy:
            trained = "an adapter on" if adapter else "all of"
            say(f"optim.lr={rate.lr:g}, to start with, for {trained} {size} weights: {rate.of}")
    return cfg


def complete_evaluation(cfg: DictConfig, path: str, device: torch.device) -> DictConfig:
    """The tree of an evaluation of the model at `path` with what its null options mean."""
    return _with_lengths(cfg, size_of(path, "policy"), device) if _left_open(cfg) else cfg


def trains_adapter(options: Mapping[str, Any]) -> bool:
    """Whether these options of a model train an adapter instead of its weights."""
    return options["adapter"] is not None or options["lora_rank"] is not None


def _left_open(cfg: DictConfig) -> list[str]:
    """Lengths that are there and left open."""
    missing = object()
    return [key for key in LENGTHS if OmegaConf.select(cfg, key, default=missing) is None]


def _with_lengths(cfg: DictConfig, size: Size, device: torch.device) -> DictConfig:
    cfg, column = cfg.copy(), 0 if size.is_toy else 1 if device.type == "cpu" else 2
    for key in _left_open(cfg):
        room = size.room if key.endswith("max_new_tokens") else math.inf
        OmegaConf.update(cfg, key, min(LENGTHS[key][column], room))
    return cfg
