"""One step of decoding after another: the model's own `forward`, and a leaner way through a Transformer decoder."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from .fast_linear import PACKED_BYTES, side_by_side


# Shapes: B sources, g target rows per source (beams, candidates, samples), P tokens of the prompt, S source length, V
# vocabulary, D width of the decoder states, H query heads, G key and value heads, d head width.


def target_side(cache: Cache) -> Cache:
    """The part of a cache with a row per beam."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def select_sources(cache: Any, sources: torch.Tensor):
    """Leaves these in the part of a cache with a row per source."""
    if isinstance(cache, EncoderDecoderCache):
        cache.cross_attention_cache.batch_select_indices(sources)
    else:
        cache.select_sources(sources)


def rows_of(sources: torch.Tensor, g: int) -> torch.Tensor:
    """(B,) -> (B * g,): the rows of these sources, where each source has g of them, one after another."""
    return (sources[:, None] * g + torch.arange(g, device=sources.device)).flatten()


class ForwardSteps:
    """
    Steps by the model's own `forward`, for every family, with or without a cache.

    Args:
        prompt (B, P): what the target of each source begins with.
        model_kwargs: arguments of `forward` as `generate` prepares them; those of the target have a row per source.
        g: target rows per source after the prompt.
        with_states: keep the decoder's last hidden states.

    Attributes:
        states: after `begin` those of the prompt (B, P, D), after `next` those of the last tokens (B * g, 1, D).
    """

    states: torch.Tensor

    def __init__(self, model, prompt: torch.Tensor, model_kwargs: dict[str, Any], g: int, with_states: bool = False):
        self.model, self.ids, self.model_kwargs, self.g = model, prompt, model_kwargs, g
        self.with_states = with_states
        self.rows_per_source = 1

    def begin(self) -> torch.Tensor:
        """Logits (B, V) of the first new token."""
        return self._forward(first=True)

    def next(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """
        Tokens (B, g), and for each the number 0 to g - 1 of the row of its source that it continues (B, g) -> logits
        (B * g, V) of what follows them.
        """
        parents = parents.clamp(max=self.rows_per_source - 1)  # at first there is one row to continue
        first_rows = torch.arange(len(parents), device=parents.device) * self.rows_per_source
        rows = (first_rows[:, None] + parents).flatten()
        self.rows_per_source = self.g
        if len(rows) != len(self.ids) or not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            self._select(rows, of_source=False)
        self.ids = torch.cat((self.ids[rows], tokens.reshape(-1, 1)), dim=-1)
        return self._forward()

    def keep(self, sources: torch.Tensor):
        """Goes on with these sources (B',) alone."""
        rows = rows_of(sources, self.rows_per_source)
        self.ids = self.ids[rows]
        self._select(rows, of_source=False)
        for name, value in self.model_kwargs.items():
            if isinstance(value, ModelOutput):
                tensors = {part: tensor[sources] for part, tensor in value.items() if torch.is_tensor(tensor)}
                self.model_kwargs[name] = type(value)(**tensors)
        self._select(sources, of_source=True)
        if self.model_kwargs.get("past_key_values") is not None:
            select_sources(self.model_kwargs["past_key_values"], sources)

    def _select(self, rows: torch.Tensor, of_source: bool):
        for name, value in self.model_kwargs.items():
            if torch.is_tensor(value) and value.ndim and name.startswith("decoder_") != of_source:
                holds_for_all = of_source and len(value) == 1
                self.model_kwargs[name] = value if holds_for_all else value[rows]
        if not of_source and self.model_kwargs.get("past_key_values") is not None:
            target_side(self.model_kwargs["past_key_values"]).batch_select_indices(rows)

    def _forward(self, first: bool = False) -> torch.Tensor:
        inputs = self.model.prepare_inputs_for_generation(
            self.ids,
            next_sequence_length=1 if self.model_kwargs["use_cache"] and not first else None,
            is_first_iteration=first,
            **self.model_kwargs,
        )
        if self.with_states:
            inputs["output_hidden_states"] = True
        outputs = self.model(**{**inputs, "return_dict": True})
        self.model_kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.model_kwargs, is_encoder_decoder=True
        )
        if self.with_states:
            self.states = outputs.decoder_hidden_states[-1] if first else outputs.decoder_hidden_states[-1][:, -1:]
        return outputs.logits[:, -1]


class LeanLayer:
    """A decoder layer for one step after another: its products as few as can be, nothing of what training needs."""

    def __init__(self, layer: Any, pack: bool):
        self.layer = layer
        attention, cross = layer.self_attn, layer.cross_attn
        self.qkv = side_by_side([attention.q_proj, attention.k_proj, attention.v_proj], pack)
        self.self_out = side_by_side([attention.o_proj], pack)
        self.cross_query = side_by_side([cross.q_proj], pack)
        self.cross_out = side_by_side([cross.o_proj], pack)
        self.inner = side_by_side(layer.mlp.inner_projections(), pack)
        self.down = side_by_side([layer.mlp.down_proj], pack)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.inner(x).chunk(len(self.layer.mlp.inner_projections()), dim=-1)
        return self.down(self.layer.mlp.bend(*inner))


class TransformerSteps(ForwardSteps):
    """
    The same for a Transformer decoder with a cache, without what a step spends on everything but its products.

    The keys of a source's rows lie together as the nodes of one search tree: a token adds a node for each row, and
    `visible` says which nodes a row descends from. So nothing is copied when beams change places, and a past that they
    share is stored and read once. Nodes that no row descends from any more are dropped when room is needed.

    Rows that never change places (`tree=False`) keep a past of their own instead, and need no mask.
    """

    def __init__(self, model, prompt, model_kwargs, g: int, with_states: bool = False, tree: bool = True):
        super().__init__(model, prompt, model_kwargs, g, with_states)
        self.tree = tree and g > 1

    def begin(self) -> torch.Tensor:
        logits = super().begin()
        decoder = self.model.model.decoder
        cache, kwargs = self.model_kwargs.pop("past_key_values"), self.model_kwargs
        # Nodes first, then heads: a node is one run of memory, to write and to move.
        layers: Any = cache.self_attention_cache.layers
        self.keys = [layer.keys.transpose(1, 2) for layer in layers]  # (B, P, G, d)
        self.values = [layer.values.transpose(1, 2) for layer in layers]
        self.cross = [(layer.keys, layer.values) for layer in cache.cross_attention_cache.layers]  # (B, G, S, d)
        sources, self.nodes = self.ids.shape
        device, lowest = self.ids.device, torch.finfo(logits.dtype).min

        real: Any = kwargs.get("decoder_attention_mask")  # (B, P + 1)
        padded = real is not None and not real.all()
        self.visible = None if not (self.tree or padded) else self.ids.new_ones((sources, 1, self.nodes)).bool()
        self.position = self.ids.new_full((1, 1), self.nodes)
        if padded:
            self.visible = real[:, None, : self.nodes].bool()
            self.position = (real.long().sum(dim=1, keepdim=True) - 1).clamp(min=0)
        self.place = self.nodes  # counted with the padding, as relative positions are
        self.places = torch.arange(self.nodes, device=device).expand(sources, -1)
        mask = kwargs.get("attention_mask")
        self.source_mask = None
        if mask is not None and not mask.all():
            self.source_mask = torch.zeros(mask.shape, dtype=logits.dtype, device=device)
            self.source_mask = self.source_mask.masked_fill(~mask.bool(), lowest)[:, None, None]  # (B, 1, 1, S)
        if not self.tree and self.g > 1:
            self._select_histories(torch.arange(sources, device=device).repeat_interleave(self.g))
        pack = sum(weight.nbytes for weight in decoder.parameters()) <= PACKED_BYTES
        self.layers = [LeanLayer(layer, pack) for layer in decoder.layers]
        self.lm_head = side_by_side([self.model.lm_head], pack)
        return logits

    def next(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        if self.tree:
            parents = parents.clamp(max=self.rows_per_source - 1)
            histories, width = tokens.shape
            visible: Any = self.visible
            visible = visible.gather(1, parents[:, :, None].expand(-1, -1, self.nodes))
            own = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(histories, -1, -1)
            self.visible = torch.cat((visible, own), dim=-1)  # (B, g, nodes)
        else:
            histories, width = tokens.numel(), 1
            if self.visible is not None:
                self.visible = nn.functional.pad(self.visible, (0, 1), value=True)
        self.rows_per_source = self.g
        return self._step(tokens.view(histories, width))

    def keep(self, sources: torch.Tensor):
        self._select_histories(sources if self.tree else rows_of(sources, self.g))
        self.cross = [(key[sources], value[sources]) for key, value in self.cross]
        if self.source_mask is not None:
            self.source_mask = self.source_mask[sources]

    def _select_histories(self, rows: torch.Tensor):
        self.keys = [key.index_select(0, rows) for key in self.keys]
        self.values = [value.index_select(0, rows) for value in self.values]
        self.places = self.places[rows]
        if self.visible is not None:
            self.visible = self.visible[rows]
        if len(self.position) > 1:
            self.position = self.position[rows]

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (N, R) of N histories, each continued by R rows -> logits (N * R, V)"""
        decoder, R = self.model.model.decoder, tokens.shape[1]
        if self.nodes + R > self.keys[0].shape[1]:
            self._make_room(R)
        before, self.nodes = self.nodes, self.nodes + R
        self.places = nn.functional.pad(self.places, (0, R), value=self.place)
        embeds = decoder.embed_tokens(tokens)
        # Of one row alone: all R rows stand at the same place, one after the places so far.
        positions = decoder.positions(embeds[:, :1], self.position, None, None, self.place)
        x, angles = decoder.enter(embeds, positions)
        mask = self._self_mask(embeds.dtype)

        for lean, keys, values, cross in zip(self.layers, self.keys, self.values, self.cross, strict=True):
            layer = lean.layer

            def to_target(x, lean=lean, attention=layer.self_attn, keys=keys, values=values):
                heads = keys.shape[2]
                projected = split(lean.qkv(x), attention.head_dim)  # (N, R, H + 2G, d)
                query, key, value = projected.split([projected.shape[2] - 2 * heads, heads, heads], dim=2)
                values[:, before : self.nodes] = value
                query, key = attention.q_norm(query).transpose(1, 2), attention.k_norm(key).transpose(1, 2)
                query, key = attention.turn(query, key, angles)
                keys[:, before : self.nodes] = key.transpose(1, 2)
                key, value = (past[:, : self.nodes].transpose(1, 2) for past in (keys, values))
                return lean.self_out(attend(query, key, value, mask, attention.scaling).view(*x.shape[:2], -1))

            def to_source(x, lean=lean, attention=layer.cross_attn, cross=cross):
                folded = x.view(len(cross[0]), -1, x.shape[-1])  # (B, g, D)
                query = attention.q_norm(split(lean.cross_query(folded), attention.head_dim)).transpose(1, 2)
                output = attend(query, cross[0], cross[1], self.source_mask, attention.scaling)
                return lean.cross_out(output.view(*x.shape[:2], -1))

            x = layer.residual(x, layer.self_attn_norm, layer.dropout, to_target)
            x = layer.residual(x, layer.cross_attn_norm, layer.dropout, to_source)
            x = layer.residual(x, layer.mlp_norm, layer.dropout, lean.mlp)

        x = decoder.final_dropout(decoder.norm(x)).flatten(0, 1)
        self.position, self.place = self.position + 1, self.place + 1
        if self.with_states:
            self.states = x[:, None]
        return self.lm_head(self.model.head_inputs(x))

    def _self_mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Added to the scores of the step's rows: (N, 1 or H, R, nodes), or None where they see everything."""
        mask = None
        if self.visible is not None:
            mask = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            mask = mask.masked_fill_(~self.visible, torch.finfo(dtype).min)[:, None]
        relative = self.model.model.decoder.relative_bias
        if relative is not None:
            bias = relative.weight(relative.buckets(self.places - self.place)).transpose(1, 2)[:, :, None]
            mask = bias if mask is None else mask + bias
        return mask

    def _make_room(self, rows: int):
        """Larger buffers for the nodes; the dead ones are left behind if there are many."""
        if self.tree:
            visible: Any = self.visible[:, :, : self.nodes]  # type: ignore[index]
            alive = visible.any(dim=1)  # (N, nodes)
            needed = int(alive.sum(dim=1).max())
            if needed < 0.8 * self.nodes:
                chosen = alive.int().argsort(dim=1, descending=True, stable=True)[:, :needed]  # (N, needed)
                flat = rows_of(torch.arange(len(chosen), device=chosen.device), self.keys[0].shape[1])
                flat = flat.view(len(chosen), -1).gather(1, chosen).flatten()
                self.keys = [take_nodes(past, flat, needed) for past in self.keys]
                self.values = [take_nodes(past, flat, needed) for past in self.values]
                self.places = self.places.gather(1, chosen)
                new = self.visible[:, :, self.nodes :]  # type: ignore[index]
                old = visible.gather(2, chosen[:, None].expand(-1, visible.shape[1], -1))
                self.visible = torch.cat((old, new), dim=-1)
                self.nodes = needed
        capacity = self.nodes + self.nodes // 4 + 16 * rows

        def roomy(past: torch.Tensor) -> torch.Tensor:
            buffer = past.new_empty((past.shape[0], capacity, *past.shape[2:]))
            buffer[:, : self.nodes] = past[:, : self.nodes]
            return buffer

        self.keys = [roomy(past) for past in self.keys]
        self.values = [roomy(past) for past in self.values]


def split(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(N, R, heads * d) -> (N, R, heads, d)"""
    return x.view(*x.shape[:-1], -1, head_dim)


def take_nodes(past: torch.Tensor, flat: torch.Tensor, count: int) -> torch.Tensor:
    """(N, capacity, G, d), nodes numbered through all histories -> (N, count, G, d)"""
    return past.flatten(0, 1).index_select(0, flat).unflatten(0, (-1, count))


def attend(query, key, value, mask, scaling: float) -> torch.Tensor:
    """
    (N, H, R, d), two (N, G, K, d), mask (N, 1 or H, 1 or R, K) -> (N, R, H, d) in one piece. Heads that share keys are
    laid one after another as rows of one head, so that keys and values are not repeated.
    """
    N, H, R, _ = query.shape
    G = key.shape[1]
    if mask is not None and H > G:
        mask = mask.expand(-1, H, R, -1).reshape(N, G, -1, mask.shape[-1])
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(N, G, -1, query.shape[-1]), key, value, attn_mask=mask, scale=scaling
    )
    return output.reshape(N, H, R, -1).transpose(1, 2).contiguous()


def can_be_lean(model, model_kwargs: dict[str, Any]) -> bool:
    """
    Whether `TransformerSteps` does what `forward` would: the cache is the ordinary growing one, dropout is off, and
    nobody hangs on to the modules that it does not call.
    """
    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    return (
        model_kwargs["use_cache"]
        and isinstance(cache, EncoderDecoderCache)
        and (mask is None or mask.ndim == 2)
        and model.config._attn_implementation in ("eager", "sdpa", "varlen")
        and model.config.attention_direction == "bidirectional"
        and not any(module.training or is_watched(module) for module in model.modules())
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: hooks, or a `forward` put in place of its own."""
    # The host leaves hooks behind when it is asked for hidden states; they do nothing unless it is asked again.
    hooks = [hook for hook in module._forward_hooks.values() if hook.__module__ != capture_outputs.__module__]
    return bool(hooks or module._forward_pre_hooks or "forward" in vars(module) or module._compiled_call_impl)
