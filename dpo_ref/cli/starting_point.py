"""What an option that is left open (null) means for this model: the learning rate and the length of answers that a
practitioner would start with, by the number of weights, what of them is trained, and the objective.

They are written into the configuration before a run begins, so that its record says what it was made with and a run
that goes on has what it had. A preset cannot hold them: the same folder is tuned whole or through an adapter, on
demonstrations or on pairs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dpo_ref.cli.resolve import RunConfig
from dpo_ref.models.folders import opened, stored_shapes
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
ANSWER_TOKENS = {True: 128, False: 512}  # by whether the model is a toy


def num_weights(path: str, key: str) -> int:
    """Weights in the folder or hub name at `path`, by the headers of its files. Raises ValueError naming `key`."""
    check_folder(path, key)
    with opened(locate(path), key, None, ("config.json", "model*.safetensors*"), "no model could be loaded") as folder:
        return sum(math.prod(shape) for shape in stored_shapes(folder).values())


def fitted(objective: Objective) -> str:
    """What an objective fits a model to: preferences, demonstrations or scores."""
    if objective.of_scores:
        return "scores"
    of_preferences = objective.pairwise or {"labels", "advantages"} & set(objective.inputs)
    return "preferences" if of_preferences else "demonstrations"


def rate_of(objective: Objective, weights: int, adapter: bool) -> Rate:
    """The learning rate to start with, and whose it is."""
    return TOY_RATE if weights < TOY else RATES[fitted(objective), adapter, weights > LARGE]


def complete_run(cfg: DictConfig, run: RunConfig) -> DictConfig:
    """The tree of a training run with what its null options mean; says which learning rate, and why."""
    open_options = _open_options(cfg, ("data", "evaluation"))
    lr_is_open = cfg.optim.lr is None
    if not open_options and not lr_is_open:
        return cfg
    options = run.model.options
    weights, adapter = num_weights(options["path"], "model.path"), trains_adapter(options)
    cfg = cfg.copy()
    if lr_is_open:
        rate = rate_of(run.objective, weights, adapter)
        cfg.optim.lr = rate.lr
        if rate is not TOY_RATE:
            trained = "an adapter on" if adapter else "all of"
            say(f"optim.lr={rate.lr:g}, to start with, for {trained} {_in_words(weights)} weights: {rate.of}")
    return _with_answer_lengths(cfg, open_options, weights)


def complete_evaluation(cfg: DictConfig, path: str) -> DictConfig:
    """The tree of an evaluation of the model at `path` with what its null options mean."""
    open_options = _open_options(cfg, ("generation",))
    if not open_options:
        return cfg
    return _with_answer_lengths(cfg.copy(), open_options, num_weights(path, "policy"))


def trains_adapter(options: Mapping[str, Any]) -> bool:
    """Whether these options of a model train an adapter instead of its weights."""
    return options["adapter"] is not None or options["lora_rank"] is not None


def _open_options(cfg: DictConfig, groups: Sequence[str]) -> list[str]:
    """Lengths of answers that are left open, in these groups."""
    keys = [f"{group}.max_new_tokens" for group in groups if cfg.get(group) is not None]
    missing = object()
    return [key for key in keys if OmegaConf.select(cfg, key, default=missing) is None]


def _with_answer_lengths(cfg: DictConfig, keys: Sequence[str], weights: int) -> DictConfig:
    for key in keys:
        OmegaConf.update(cfg, key, ANSWER_TOKENS[weights < TOY])
    return cfg


def _in_words(weights: int) -> str:
    return f"{weights / 1e9:.1f} B" if weights >= 1e9 else f"{weights / 1e6:.3g} M"
