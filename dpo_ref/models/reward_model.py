"""A scalar head on a causal language model: put on before training, saved as transformers' sequence classifier.

The classifiers of transformers read a text's score from its last token that is not padding. Ours reads it from the
response's last token, so the saved folder's padding token must be none that ends a turn.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_ref.data.tokenise import end_of_turn_ids
from dpo_ref.distributed import ranks
from dpo_ref.files.digests import seal_folder
from dpo_ref.files.writing import remove_abandoned, replacing_folder
from dpo_ref.models.checkpoint import as_writing_fails
from dpo_ref.models.folders import CARD
from dpo_ref.models.loading import Policy, TrainedModel
from dpo_ref.models.logps import response_scores
from dpo_ref.models.shards import gathered, whole
from dpo_ref.types import PackedBatch, ResponseScores, Span


def check_reward_run(objective: str, parts: Mapping[str, Any]) -> None:
    """Raise ValueError for a part of the run, by its group's name, that does not go with a scalar head."""
    for key in ("adapter", "lora_rank"):
        if parts["model"].options.get(key) is not None:
            raise ValueError(f"objective={objective} trains all weights and a new head; leave model.{key} out")
    if parts["data"].name == "on_policy":
        raise ValueError(f"objective={objective} trains a model that writes no answers; data=on_policy needs one")
    if "evaluation" in parts and parts["evaluation"].options["every"] is not None:
        raise ValueError(
            f"objective={objective} trains a model that writes no answers to evaluate; leave evaluation.every out "
            "(trainer.eval_every measures held-out pairs)"
        )
    if "bandit" in parts:
        raise ValueError(f"objective={objective} has no meaning in a bandit, whose rewards are known")


def padding_id(tokenizer: Any) -> int:
    """A token to pad with that ends no turn: the tokenizer's padding token, else another special token.

    Raises ValueError where there is none.
    """
    ends = end_of_turn_ids(tokenizer)
    special = (token_id for token_id, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special)
    padding = next(
        (token_id for token_id in (tokenizer.pad_token_id, *special) if token_id not in (None, *ends)), None
    )
    if padding is None:
        raise ValueError(
            "a reward model needs a padding token that ends no turn, and this tokenizer has no special token besides "
            "its end of turn; add one to the tokenizer (tokenizer.add_special_tokens) and save it"
        )
    return padding


def classifier_of(model: Any) -> Any:
    """The architecture's sequence classifier with one label, its weights not yet there (on the meta device).

    Raises ValueError for an architecture of which transformers has none with a scalar `score` layer.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            classifier: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"transformers has no sequence classifier for {type(model).__name__}") from error
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.weight.shape[0] != 1 or head.bias is not None:
        raise ValueError(f"{type(classifier).__name__} has no linear layer `score` without bias; it is not known here")
    return classifier


@dataclass(frozen=True)
class RewardModel(TrainedModel):
    """A language model with a layer `score` from the hidden state to one number: asked for scores of responses."""

    writes: ClassVar[bool] = False

    def outputs(self, batch: PackedBatch) -> ResponseScores:
        """Scores of the pack's responses."""
        return response_scores(self.model, batch)

    def loss(
        self, batch: PackedBatch, loss_of: Callable[[ResponseScores, Span], Tensor]
    ) -> tuple[Float[Tensor, ""], ResponseScores]:
        """The whole pack at once: its head is one column."""
        scores = self.outputs(batch)
        (span,) = batch.spans(len(batch.target_ids))
        return loss_of(scores, span), scores

    def save(self, folder: Path) -> None:
        """Backbone and head, config and tokenizer, as transformers reads its sequence classifiers."""
        state, score = gathered(self.model.base_model.state_dict()), whole(self.model.score.weight.detach())
        if not ranks().is_first:
            return
        classifier, tokenizer = classifier_of(self.model), copy.deepcopy(self.tokenizer)
        classifier.base_model.load_state_dict(state, assign=True)
        classifier.score.weight = nn.Parameter(score)
        padding = padding_id(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
        classifier.config.pad_token_id = padding
        remove_abandoned(folder)
        with replacing_folder(folder) as partial, as_writing_fails():
            classifier.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            seal_folder(partial, besides=[CARD])


def with_score_head(policy: Policy, seed: int) -> RewardModel:
    """The model with a layer `score`, trained with the rest; the language model's own head is not trained where it is
    not the embedding.

    Weights are drawn from N(0, 1 / (H + 1)) (Stiennon et al. 2020, arXiv:2009.01325, B.1) by `seed` alone. Raises
    ValueError for an architecture or a tokenizer that a saved reward model could not be read with.
    """
    model = policy.model
    classifier_of(model)
    padding_id(policy.tokenizer)
    embedding = model.get_input_embeddings().weight
    head = nn.Linear(embedding.shape[1], 1, bias=False)
    with torch.no_grad():
        head.weight.normal_(0.0, math.sqrt(1 / (embedding.shape[1] + 1)), generator=_generator(seed))
    model.score = head.to(embedding.device)
    if model.get_output_embeddings().weight is not embedding:
        model.get_output_embeddings().requires_grad_(False)
    policy.holding.take_in(model.score)
    return RewardModel(
        lambda: model, policy.tokenizer, policy.compute_dtype, policy.path, policy.folder, compiled=policy.compiled,
        router_loss=policy.router_loss, holding=policy.holding,
    )  # fmt: skip


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
