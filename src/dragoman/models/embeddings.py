"""The token tables of the source and of the target: scaled, shared or separate, and resized."""

from typing import Any

import torch
from torch import nn


# Shapes: B batch, T tokens, D width.


class DragomanScaledEmbedding(nn.Embedding):
    """An embedding times sqrt(D) (Vaswani 2017, section 3.4)."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, D)"""
        return super().forward(input_ids) * self.embedding_dim**0.5


class TokenTables:
    """
    Access to the tables of a model with an `encoder.embed_tokens` and a `decoder.embed_tokens`, which are one where
    `share_embeddings` says so. To Transformers the source's table is "the input embeddings".
    """

    config: Any
    get_encoder: Any
    get_decoder: Any
    _get_resized_embeddings: Any
    _fsdp_plan: Any
    _tied_weights_keys: Any

    def init_parallel_plans(self):
        """As the host's, but under FSDP2 the ends of a tied table belong to the group of the whole model, because
        `fully_shard` knows all names of a parameter within one group only."""
        host: Any = super()
        host.init_parallel_plans()
        ends = {name.rpartition(".")[0] for tie in self._tied_weights_keys.items() for name in tie}
        for rule in ends | self.config.base_model_fsdp_plan.keys():  # the latter are those of a stack
            self._fsdp_plan.pop(rule, None)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """As the host's, which ties after it has shared out: under FSDP2 the ends would be tables of their own."""
        host: Any = super()
        if distributed_config is not None and distributed_config.dp_size > 1:
            if distributed_config.tp_size > 1 and model.all_tied_weights_keys:
                raise ValueError(
                    "FSDP and tensor parallelism at once cannot keep a tied table whole: train a model with "
                    "share_embeddings=False and tie_lm_head=False, or leave out fsdp_size or tp_size."
                )
            model.tie_weights(recompute_mapping=False)
        return host.maybe_distribute_model(model, distributed_config, mesh_manager)

    def get_input_embeddings(self) -> nn.Module:
        return self.get_encoder().embed_tokens

    def set_input_embeddings(self, value: Any):
        self.get_encoder().embed_tokens = value
        if self._tables_are_one():
            self.get_decoder().embed_tokens = value

    def save_pretrained(self, *args, **kwargs):
        """
        As the host's, which saves a table once that two names share: the configuration has to say that they do. PEFT
        takes it back when it merges an adapter into a model whose output layer is not tied.

        The code saved beside the weights is that of the model, also where FSDP2 has given it a class of torch's.
        """
        if (
            self.config.share_embeddings
            and self.get_input_embeddings().weight is self.get_decoder().embed_tokens.weight
        ):
            self.config.tie_word_embeddings = True
        host: Any = super()
        present = type(self)
        self.__class__ = next(kind for kind in present.__mro__ if not kind.__module__.startswith("torch."))
        try:
            host.save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = present

    def _tables_are_one(self) -> bool:
        return self.config.share_embeddings and self.config.tie_word_embeddings

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        """`vocab_size` is the target's, so `resize_token_embeddings` resizes the target's table and the output layer,
        and the source's with them where both sides have one vocabulary."""
        resize: Any = super()
        if self._tables_are_one():
            table = resize._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            if self.config.source_vocab_size is not None:
                self.config.source_vocab_size = table.num_embeddings
            return table
        source = self.get_input_embeddings()
        self.set_input_embeddings(self.get_decoder().embed_tokens)  # what the host resizes together with the head
        table = resize._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.get_decoder().embed_tokens = table
        if self.config.source_vocab_size is None:
            source = self._get_resized_embeddings(source, table.num_embeddings, None, mean_resizing)
        self.set_input_embeddings(source)
        return table

    def resize_source_token_embeddings(self, new_num_tokens: int, mean_resizing: bool = True) -> nn.Module:
        """
        Resizes the source's table where source and target have vocabularies of their own.

        Raises:
            ValueError: they have one; `resize_token_embeddings` is the method then.
        """
        if self.config.source_vocab_size is None or self.config.share_embeddings:
            raise ValueError("Source and target share one vocabulary: use resize_token_embeddings, which resizes both.")
        table = self._get_resized_embeddings(self.get_input_embeddings(), new_num_tokens, None, mean_resizing)
        self.set_input_embeddings(table)
        self.config.source_vocab_size = new_num_tokens
        return table
