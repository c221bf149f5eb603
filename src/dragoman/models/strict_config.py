"""Configurations that refuse impossible values with one sentence, and name the pipeline that travels with them."""

import functools
import math
from collections.abc import Iterable
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .pipeline_dragoman import custom_pipelines


def strict_config(config_class: type) -> type:
    """
    `@strict`, which checks types and calls the `validate_` methods, but what it refuses at construction is a
    `ValueError` that says no more than what is wrong. Saved configurations get an attribute `custom_pipelines`, by
    which `transformers.pipeline` finds ours in the folder of the model.
    """
    checked: Any = strict(config_class)
    build, save = checked.__init__, checked.save_pretrained

    @functools.wraps(build)
    def init(self, *args, **kwargs):
        try:
            build(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__)) from None

    @functools.wraps(save)
    def save_pretrained(self, *args, **kwargs):
        # Not before: a folder of an older version has no pipeline beside its weights, and must not say that it has.
        self.custom_pipelines = custom_pipelines()
        save(self, *args, **kwargs)

    checked.__init__, checked.save_pretrained = init, save_pretrained
    return checked


def check_numbers(config, sizes: Iterable[str], chances: Iterable[str]):
    """Refuses infinite numbers, sizes below 1, and chances (all smaller than 1) out of range."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number.")
    for name in sizes:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    for name in chances:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 0 and less than 1.")
    if config.init_std is not None and config.init_std <= 0:
        raise ValueError(f"init_std={config.init_std} must be positive, or None for fan_in ** -0.5.")


def check_vocabularies(config, starts_by_itself: bool = False):
    """
    Refuses ids that no token has, the lack of those without which nothing can be padded or begun, and one table for
    vocabularies of two sizes.

    Args:
        starts_by_itself: the decoder's first token is not `decoder_start_token_id`.
    """
    if config.source_vocab_size is not None and config.source_vocab_size < 1:
        raise ValueError(f"source_vocab_size={config.source_vocab_size} must be at least 1.")
    for name in ("pad_token_id", "decoder_start_token_id"):
        if getattr(config, name) is None and not (name == "decoder_start_token_id" and starts_by_itself):
            raise ValueError(f"{name}=None leaves the decoder without an input: give the id of a token.")
    for name in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        value = getattr(config, name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= token < config.vocab_size:
                raise ValueError(f"{name}={value} is no id of a vocabulary with vocab_size={config.vocab_size}.")
    if config.source_vocab_size is not None and config.pad_token_id >= config.source_vocab_size:
        raise ValueError(
            f"pad_token_id={config.pad_token_id} is no id of a vocabulary with source_vocab_size="
            f"{config.source_vocab_size}, but it pads sources, too."
        )
    if config.share_embeddings and config.source_vocab_size not in (None, config.vocab_size):
        raise ValueError(
            f"share_embeddings=True needs one vocabulary, but source_vocab_size={config.source_vocab_size} and "
            f"vocab_size={config.vocab_size}: set share_embeddings=False, or give both sides the same vocabulary."
        )
