"""TRL's own losses on given log-probs or logits: its trainers' methods, on objects that hold only what they read."""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from dpo_ref.types import PairLogps

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
DEFAULTS = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
DEFAULTS |= {"ld_alpha": None, "use_weighting": False}
PROMPT = 3


def completion_mask(lengths):
    """[2B, prompt + longest]: the response tokens, behind a prompt and before padding."""
    positions = torch.arange(PROMPT + int(lengths.max()))
    return ((positions >= PROMPT) & (positions < PROMPT + lengths[:, None])).long()


def dpo_trainer(loss_type, discopop_tau=0.05, loss_weights=(1.0,), **options):
    trainer = object.__new__(DPOTrainer)
    loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
    state = DEFAULTS | options | {"loss_types": loss_types, "loss_weights": list(loss_weights)}
    state |= {"precompute_ref_logps": True, "aux_loss_enabled": False}
    state |= {"args": SimpleNamespace(discopop_tau=discopop_tau), "model": SimpleNamespace(training=True)}
    state |= {"accelerator": ACCELERATOR, "_total_train_tokens": 0, "_tp_size": 1}
    vars(trainer).update(state, _metrics={"train": defaultdict(list)})
    return trainer


def behind_prompt(values):
    """What a model returns: token values shifted by one, with something for the prompt."""
    return torch.nn.functional.pad(values, (PROMPT - 1, 0))


def dpo_loss(token_logps, lengths, ref_chosen, ref_rejected, loss_type, collisions=None, **options):
    """DPOTrainer's mean loss for policy token log-probs [2B, longest], chosen first, zero on padding, and those of
    log sum_v p_v^2, which only some options read."""
    mask = completion_mask(lengths)
    shifted = behind_prompt(token_logps)
    unread = torch.zeros_like(shifted)
    outputs = SimpleNamespace(log_probs=shifted, entropy=unread, mean_logits=unread, is_top1=unread.bool())
    outputs.log_sum_sq_probs = None if collisions is None else behind_prompt(collisions)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    return dpo_trainer(loss_type, **options)._compute_loss(lambda **_: outputs, inputs, return_outputs=False)


def dpo_loss_with_reference_tokens(token_logps, ref_token_logps, lengths, loss_type, **options):
    """The same, DPOTrainer summing the reference's token log-probs itself."""
    mask = completion_mask(lengths)
    outputs = SimpleNamespace(log_probs=behind_prompt(ref_token_logps))
    trainer = dpo_trainer(loss_type, **options)
    trainer.ref_model = trainer.model  # asked instead of the adapter's base
    trainer.args.gradient_checkpointing_kwargs = None
    trainer.model.is_gradient_checkpointing = False
    trainer.accelerator = SimpleNamespace(**vars(ACCELERATOR), autocast=nullcontext, unwrap_model=lambda x: x)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    sums = trainer.compute_ref_log_probs(lambda **_: outputs, inputs)
    return dpo_loss(token_logps, lengths, *sums, loss_type, **options)


def kto_loss(sums, ref_sums, labels, kl_sums, ref_kl_sums, **options):
    """KTOTrainer's mean loss for policy and reference log-probs [N] of responses and of mismatched responses."""
    trainer = object.__new__(KTOTrainer)
    state = {"loss_type": "kto", "calculate_KL": True, "precompute_ref_logps": True, "aux_loss_enabled": False}
    state |= {"accelerator": ACCELERATOR, "model": SimpleNamespace(training=True), "_tp_size": 1}
    state |= {"_total_train_tokens": 0, "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    vars(trainer).update(state | options, _metrics={"train": defaultdict(list)})
    ids = torch.ones(len(sums), 2, dtype=torch.long)  # a prompt of one token, a response of one
    batch = {"input_ids": ids, "attention_mask": ids, "completion_mask": torch.tensor([[0, 1]]).expand_as(ids)}
    batch |= {f"KL_{name}": value for name, value in batch.items()} | {"KL_input_ids": 2 * ids}
    batch |= {"label": labels, "ref_logps": ref_sums, "ref_KL_logps": ref_kl_sums}

    def model(input_ids, **_):
        values = (sums if input_ids[0, 0] == 1 else kl_sums)[:, None]
        unread = torch.zeros_like(values)
        return SimpleNamespace(log_probs=values, entropy=unread, mean_logits=unread)

    return trainer._compute_loss(model, batch, return_outputs=False)


def reference_free_loss(trainer_class, logits, tokens, lengths, **options):
    """CPOTrainer's or ORPOTrainer's mean loss for logits [2B, prompt + longest, V] of `tokens`, chosen first."""
    trainer = object.__new__(trainer_class)
    state = {"is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0, "aux_loss_enabled": False}
    state |= {"accelerator": ACCELERATOR, "label_smoothing": 0.0, "alpha": 0.0, "beta": 0.1, "cpo_alpha": 1.0}
    vars(trainer).update(state | options)
    responses = completion_mask(lengths)
    attention = (torch.arange(tokens.shape[1]) < PROMPT + lengths[:, None]).long()
    values = {"input_ids": tokens, "attention_mask": attention, "labels": tokens.masked_fill(responses == 0, -100)}
    batch = {}
    for name, value in values.items():
        batch[f"chosen_{name}"], batch[f"rejected_{name}"] = value.chunk(2)
    return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]


def cpo_loss(logits, tokens, lengths, **options):
    """CPOTrainer's mean loss: contrastive term and likelihood."""
    return reference_free_loss(CPOTrainer, logits, tokens, lengths, **options)


def orpo_loss(logits, tokens, lengths, **options):
    """ORPOTrainer's mean loss: likelihood of prompt and response, and odds ratio."""
    return reference_free_loss(ORPOTrainer, logits, tokens, lengths, **options)


NUM_PAIRS, VOCABULARY = 6, 11
LENGTHS = torch.tensor([3, 9, 4, 1, 7, 5, 6, 2, 9, 8, 3, 5])  # six chosen, six rejected


def pairs(chosen, rejected):
    chosen_lengths, rejected_lengths = LENGTHS.chunk(2)
    unused = torch.ones(NUM_PAIRS, dtype=torch.long)
    return PairLogps(chosen, rejected, chosen_lengths, rejected_lengths, unused, unused)


def token_logps(dtype, spread=1.0):
    """[2B, longest] token log-probs with gradient, zero on padding, and the reference's sums."""
    generator = torch.Generator().manual_seed(3)
    mask = completion_mask(LENGTHS)[:, PROMPT:]
    drawn = -torch.rand(2, *mask.shape, generator=generator, dtype=dtype) * spread * mask
    return drawn[0].requires_grad_(), *drawn[1].sum(1).chunk(2)


def value_and_gradient(loss, leaf):
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    return loss.detach(), gradient
