"""Decoding strategies by name: the one table of what each name means for `generate()`."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import yaml


# Each sets what tells the modes apart, so that a setting saved with the model does not turn one into another.
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "beam": {"num_beams": 4, "do_sample": False},
    "sampling": {"num_beams": 1, "do_sample": True, "top_k": 0, "top_p": 0.9},
    "contrastive": {"num_beams": 1, "do_sample": False, "penalty_alpha": 0.6, "top_k": 4},
}


def nearest(name: str, valid: Sequence[str]) -> str:
    """The end of an error's sentence: the nearest valid name if one is near, and all valid names."""
    close = difflib.get_close_matches(name, valid, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Valid: {', '.join(sorted(valid))}."


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split `"name"` or `"name:key=value,key=value"` into the name and its options, values read as YAML.

    Raises:
        ValueError: an option is not of the form key=value.
    """
    name, _, rest = spec.partition(":")
    options = {}
    for option in filter(None, (part.strip() for part in re.split(r",(?![^\[]*\])", rest))):
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ValueError(f"{spec!r}: the option {option!r} has to be written key=value.")
        options[key.strip()] = yaml.safe_load(value)
    return name.strip(), options


def strategy_arguments(spec: str) -> dict[str, Any]:
    """The generation arguments of a strategy: `"beam"`, or changed: `"beam:num_beams=8,length_penalty=0.8"`.

    Raises:
        ValueError: no strategy has that name, or an option is not of the form key=value.
    """
    name, options = parse_spec(spec)
    if name not in STRATEGIES:
        raise ValueError(f"there is no decoding strategy {name!r}: {nearest(name, list(STRATEGIES))}")
    return STRATEGIES[name] | options
