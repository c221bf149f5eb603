"""What a converter consists of: a table of settings and a table of names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one `model_type` of Transformers read as Dragoman's.

    Attributes:
        settings: from their configuration, as the dictionary that `to_dict()` gives, the fields of `DragomanConfig`;
            what the weights decide (ties, the bias of the output layer) is left out.
        modules: from the same, our name of every module of a stack and theirs, both without the ending `.weight` or
            `.bias` and with `#` for the number of a layer. A name of ours that begins with `encoder.` or `decoder.`
            holds for that stack, another for both. Token tables and output layer are called alike everywhere.
        unused: regular expressions of weights that their class does not read either.
        position_rows_before_first: rows at the beginning of their table of learned positions that no token reaches.
        stores_sinusoids: the checkpoints may hold their sinusoids; they are compared with the formula.
    """

    settings: Callable[[dict[str, Any]], dict[str, Any]]
    modules: Callable[[dict[str, Any]], dict[str, str]]
    unused: tuple[str, ...] = ()
    position_rows_before_first: int = 0
    stores_sinusoids: bool = False


def one_rate(theirs: dict[str, Any], one: str, other: str) -> float:
    """The value of two settings for which Dragoman has one field.

    Raises:
        ValueError: they differ.
    """
    if theirs[one] != theirs[other]:
        raise ValueError(
            f"{one}={theirs[one]} and {other}={theirs[other]} differ, but Dragoman has one rate for both stacks: "
            "make them equal in config.json (they matter in training only)."
        )
    return theirs[one]
