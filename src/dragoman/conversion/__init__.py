"""Checkpoints of other encoder-decoder classes of Transformers, turned into Dragoman's; and ours for other runtimes."""

from dragoman.conversion.convert import convert
from dragoman.conversion.export import export
from dragoman.conversion.families import FAMILIES


__all__ = ["FAMILIES", "convert", "export"]
