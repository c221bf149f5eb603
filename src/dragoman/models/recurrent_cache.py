"""What a recurrent decoder remembers between two steps of generation."""

import torch
from transformers.cache_utils import Cache


# Shapes: B sources, g target rows per source, L decoder layers, S source length, D hidden size.


class DragomanRecurrentCache(Cache):
    """
    The state after the last step, and the source as attention wants it.

    Attributes:
        states: tensors (L, B * g, D): the hidden state, an LSTM's cell state, and (1, B * g, D) what is fed to the next
            input where the model has input feeding. Empty before the first step.
        keys: the projected source, (B, S, D), or None without attention. It belongs to the sources, so beams are
            neither copied into it nor reordered in it.
        length: number of steps taken.
    """

    is_compileable = False

    def __init__(self):
        super().__init__(layers=[])
        self.reset()

    def reset(self):
        self.states: tuple[torch.Tensor, ...] = ()
        self.keys: torch.Tensor | None = None
        self.length = 0

    def advance(self, states: tuple[torch.Tensor, ...], keys: torch.Tensor | None, steps: int):
        """Takes over the state after `steps` more steps."""
        self.states, self.keys, self.length = states, keys, self.length + steps

    def update(self, *args, **kwargs):
        raise NotImplementedError("A recurrent cache holds states, not keys and values of every step: use advance().")

    def crop(self, tokens_to_remove: int):
        raise ValueError("A recurrent cache cannot go back: earlier states are not kept.")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    @property
    def is_croppable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: torch.Tensor):
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        self.states = tuple(state.index_select(1, indices.to(state.device)) for state in self.states)

    def select_sources(self, sources: torch.Tensor):
        """Leaves the keys of these sources, (B',)."""
        if self.keys is not None:
            self.keys = self.keys[sources]

    def batch_repeat_interleave(self, repeats: int):
        self.states = tuple(state.repeat_interleave(repeats, dim=1) for state in self.states)
