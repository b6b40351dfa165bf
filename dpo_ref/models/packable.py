"""Whether an architecture can be packed exactly: asked of the model itself, on a few tokens, before it is used.

No flag of transformers says so. Some architectures keep their own attention, mix tokens outside of attention
(state-space layers, convolutions), or hide a window in the mask alone. Five conditions catch all of those that were
tried (docs/models.md); each failure is a sentence for the user. What depends on lengths, `logps.reach` knows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dpo_ref.data.packing import collate
from dpo_ref.models.attention import KERNEL_HEADS, PackedLayout, PackedMask, kernels_take, laid_out, register
from dpo_ref.models.logps import head_of, packed_hidden, separate_hidden
from dpo_ref.types import PackedBatch, TokenGroup

FAR = 2**20  # positions at which masks are asked what they hide
DISTANCES = (0, 1, 4096, 8192, 2**19)
# Of hidden states, relative to the largest; exact architectures stay below 3e-6 in float32. In half precision rounding
# alone comes to a few times 2^-8, and what is wrong (another mask, other positions) to more than a tenth.
TOLERANCE = {torch.float32: 3e-5}
TOLERANCE_HALF = 5e-2
LEAK = 1e-5


class _Probe(PackedLayout):
    """A layout that writes down what each attention layer was handed."""

    def __init__(self, layout: Any, device: torch.device) -> None:
        super().__init__(layout, device)
        self.layers: list[tuple[PackedMask, int | None]] = []
        self.head_sizes: set[tuple[int, int]] = set()

    def note(self, attention_mask: PackedMask, window: int | None, head_sizes: tuple[int, int]) -> None:
        self.layers.append((attention_mask, window))
        self.head_sizes.add(head_sizes)


def _groups(vocab: int) -> list[TokenGroup]:
    def ids(start: int, size: int) -> list[int]:
        return [(start + 7 * i) % vocab for i in range(size)]

    first = TokenGroup(0, "", ids(3, 4), (ids(11, 3), ids(5, 2)), (1, 1), ((0, 1),))
    second = TokenGroup(1, "", ids(8, 2), (ids(2, 1), ids(9, 3)), (1, 1), ((0, 1),))
    return [first, second]


def _mask_rule(probe: _Probe) -> str | None:
    """On a plain sequence the mask must say causal, plus the window that the layer is told about."""
    for mask, window in probe.layers:
        rule = mask.rule
        if rule is None:
            continue
        distances = (*DISTANCES, *((window - 1, window) if window else ()))
        for distance in distances:
            query, key = torch.tensor(FAR), torch.tensor(FAR - distance)
            if bool(rule(0, 0, query, key)) != (window is None or distance < window):
                return "its masks hide tokens that its attention layers are not told about"
        if bool(rule(0, 0, torch.tensor(FAR), torch.tensor(FAR + 1))):
            return "its attention is not causal"
    return None


def _chooses(config: Any) -> str | None:
    if any(name.startswith("index_topk") for name in vars(config)):
        return "its attention chooses the tokens that it looks at, by an index over the whole sequence"
    return None


def _run_probe(model: Any, device: torch.device) -> _Probe:
    size = 6
    probe = _Probe(((3, (3,)),), device)
    ids = torch.arange(1, size + 1, device=device)[None]
    with laid_out(probe):
        model.base_model(input_ids=ids, use_cache=False)
    return probe


def _layers(model: Any, device: torch.device) -> str | None:
    probe = _run_probe(model, device)
    expected = model.config.get_text_config().num_hidden_layers
    if len(probe.layers) != expected:
        return f"{len(probe.layers)} of its {expected} layers are attention"
    return _mask_rule(probe)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _leaks(model: Any, groups: list[TokenGroup], batch: PackedBatch, hidden: Tensor) -> bool:
    """Whether another token in the first response changes what any other response is predicted from."""
    response = [(token + 1) % model.config.get_text_config().vocab_size for token in groups[0].response_ids[0]]
    first = TokenGroup(0, "", groups[0].prompt_ids, (response, groups[0].response_ids[1]), (1, 1), ((0, 1),))
    hidden_after = packed_hidden(model, collate([first, groups[1]]).to(batch.input_ids.device))
    other_responses = batch.response_index != 0
    return _gap(hidden_after[other_responses], hidden[other_responses]) > LEAK


def _refusal(model: Any, native: str, name: str) -> str | None:
    device = next(model.parameters()).device
    if (reason := _chooses(model.config.get_text_config()) or _layers(model, device)) is not None:
        return reason
    groups = _groups(model.config.get_text_config().vocab_size)
    batch = collate(groups).to(device)
    hidden = packed_hidden(model, batch)
    if _leaks(model, groups, batch, hidden):
        return "responses see each other when packed"
    model.set_attn_implementation(native)
    separate = separate_hidden(model, batch)
    model.set_attn_implementation(name)
    if not (gap := _gap(hidden, separate)) <= tolerance(model):
        return f"packed and separate hidden states differ by {gap:.1g}"
    return None


def _same_logits(model: Any) -> bool:
    """Whether our head on the hidden states gives the model's own logits."""
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False)[0][0]
    return _gap(head_of(model).logits(hidden), model(input_ids=ids, use_cache=False).logits[0].float()) <= tolerance(
        model
    )


def tolerance(model: Any) -> float:
    """How far equal hidden states may differ, by the dtype that the model computes in."""
    return TOLERANCE.get(model.dtype, TOLERANCE_HALF)


@torch.no_grad()
def install(model: nn.Module, backend: str) -> str | None:
    """Install packed attention into a model in eval mode. Returns None, or why it cannot be packed; then the
    model keeps its own attention and runs one response at a time.

    Raises ValueError for a model whose logits are not its head's product with the last hidden states.
    """
    causal_lm: Any = model
    native, name = causal_lm.config._attn_implementation, register(backend)
    if not _same_logits(causal_lm):
        raise ValueError(f"{type(model).__name__} makes its logits in a way that is not known here")
    try:
        causal_lm.set_attn_implementation(name)
        switched = causal_lm.config._attn_implementation == name
        reason = _refusal(causal_lm, native, name) if switched else "it keeps its own attention"
    except AttributeError:
        reason = "it computes with the mask itself"
    except (TypeError, ValueError) as error:
        reason = str(error)
    if reason is not None:
        causal_lm.set_attn_implementation(native)
    return reason


@torch.no_grad()
def kernel_refuses(model: Any, backend: str) -> str | None:
    """None where the FlashAttention kernel of `backend` runs the packed model in half precision, else why it goes
    piece by piece. `install` compares in float32, which never reaches the kernel.

    Raises ValueError where the kernel's hidden states are not those of attention piece by piece.
    """
    device = next(model.parameters()).device
    unsupported = sorted(
        {size for pair in _run_probe(model, device).head_sizes if not kernels_take(pair) for size in pair}
    )
    if unsupported:
        sizes = " and ".join(map(str, unsupported))
        return f"its heads have {sizes} dimensions, and FlashAttention takes multiples of 8 up to {KERNEL_HEADS[-1]}"
    batch = collate(_groups(model.config.get_text_config().vocab_size)).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        ours = packed_hidden(model, batch)
        model.set_attn_implementation(register("sdpa"))
        by_piece = packed_hidden(model, batch)
        model.set_attn_implementation(register(backend))
    if not (gap := _gap(ours, by_piece)) <= TOLERANCE_HALF:
        raise ValueError(
            f"model.attention={backend}: its hidden states differ by {gap:.1g} from those of sdpa; use "
            "model.attention=sdpa, and please report it"
        )
    return None
