"""Checkpoints of other encoder-decoder classes of Transformers, turned into Dragoman's."""

from dragoman.conversion.convert import convert
from dragoman.conversion.families import FAMILIES


__all__ = ["FAMILIES", "convert"]
