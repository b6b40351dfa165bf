"""A KV cache with room ahead: a new token's keys and values are written beside those before them, where transformers'
own layer copies all of them for every token. Apart from `sampling.py` because it is the one part of decoding that
needs transformers before there is a model.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 32  # positions; how often a layer is copied, and what it holds too much


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, which are the filled part of tensors with more positions."""

    def __init__(self, filled: DynamicLayer) -> None:
        super().__init__()
        assert filled.keys is not None
        assert filled.values is not None
        self.lazy_initialization(filled.keys, filled.values)
        self.keys, self.values = filled.keys, filled.values
        self._room = self.keys, self.values

    def update(
        self, key_states: Float[Tensor, "S H N D"], value_states: Float[Tensor, "S H N E"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "S H T D"], Float[Tensor, "S H T E"]]:
        """Write the states of N more positions; those of all T. Values may be narrower than keys (DeepSeek's are)."""
        assert self.keys is not None
        assert self.values is not None
        begin, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._room[0].shape[2]:
            more = end - begin + ROOM
            self._room = _with_room(self.keys, more), _with_room(self.values, more)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, begin:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Int[Tensor, " M"]) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        assert self.keys is not None
        assert self.values is not None
        self._room = self.keys, self.values

    def reorder_cache(self, beam_idx: Int[Tensor, " M"]) -> None:
        """The same by the name that all layers have."""
        self.batch_select_indices(beam_idx)


def _with_room(states: Float[Tensor, "S H T D"], more: int) -> Float[Tensor, "S H U D"]:
    room = states.new_empty(*states.shape[:2], states.shape[2] + more, states.shape[3])
    room[:, :, : states.shape[2]] = states
    return room


def with_room(cache: Any) -> Any:
    """The cache that a model made, its plain layers with room ahead; layers of other kinds (sliding windows,
    recurrent states) stay as they are."""
    plain = (type(layer) is DynamicLayer and layer.keys is not None for layer in cache.layers)
    cache.layers = [
        RoomyLayer(layer) if is_plain else layer for layer, is_plain in zip(cache.layers, plain, strict=True)
    ]
    return cache


def keep_rows(cache: Any, rows: Int[Tensor, " M"]) -> None:
    """Keep these rows of the batch, of recurrent states too, which `batch_select_indices` leaves out."""
    cache.reorder_cache(rows)
    if type(cache).__name__ == MINIMAX:  # it has its states apart from its layers
        cache.linear_cache = [state[rows] if isinstance(state, Tensor) else state for state in cache.linear_cache]


def check_padding(cache: Any, mask: Int[Tensor, "S L"]) -> None:
    """Raise ValueError for padded prompts of an architecture that reads padding in transformers (5.23), too."""
    if type(cache).__name__ == MINIMAX and not mask.all():
        raise ValueError("MiniMax reads the padding before shorter prompts; use generation.batch_size=1")


MINIMAX = "MiniMaxCache"
