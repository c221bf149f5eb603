"""Decoding strategies by name: the one table of what each name means for `generate()`."""

import re
from typing import Any

import yaml

from dragoman.inference.arguments import parse_generation_options
from dragoman.settings import did_you_mean


# Each sets what tells the modes apart, so that a setting saved with the model does not turn one into another.
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "do_sample": False, "penalty_alpha": 0.0},
    "beam": {"num_beams": 4, "num_beam_groups": 1, "do_sample": False},
    "sampling": {"num_beams": 1, "do_sample": True, "top_k": 0, "top_p": 0.9},
    "contrastive": {"num_beams": 1, "do_sample": False, "penalty_alpha": 0.6, "top_k": 4},
}


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split `"name"` or `"name:key=value,key=value"` into the name and its options, values read as YAML.

    Raises:
        ValueError: an option is not of the form key=value, or its value is no YAML.
    """
    name, options = _split(spec)
    try:
        return name, {key: yaml.safe_load(text) for key, text in options.items()}
    except yaml.YAMLError as error:
        raise ValueError(f"{spec!r}: a value is no valid YAML.") from error


def _split(spec: str) -> tuple[str, dict[str, str]]:
    name, _, rest = spec.partition(":")
    options = {}
    for option in filter(None, (part.strip() for part in re.split(r",(?![^\[]*\])", rest))):
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ValueError(f"{spec!r}: the option {option!r} has to be written key=value.")
        options[key.strip()] = value.strip()
    return name.strip(), options


def strategy_arguments(spec: str, **common: Any) -> dict[str, Any]:
    """The generation arguments of a strategy.

    Args:
        spec: a name of `STRATEGIES`, or "default" for the settings saved with the model; changed if wanted:
            `"beam:num_beams=8,length_penalty=0.8"`.
        **common: arguments that hold for every strategy beside this one, and are given back with its own.

    Raises:
        ValueError: no strategy has that name; an option is not of the form key=value, is unknown or of the wrong type;
            the strategy sets a common argument differently.
    """
    name, options = _split(spec)
    known = {"default": {}, **STRATEGIES}
    if name not in known:
        raise ValueError(f"there is no decoding strategy {name!r}: {did_you_mean(name, list(known))}")
    try:
        changes = parse_generation_options([f"--{key}={text}" for key, text in options.items()])
    except ValueError as error:
        raise ValueError(f"strategy {spec!r}: {error}") from error
    arguments = known[name] | changes.given()
    for key, value in common.items():
        if arguments.get(key, value) != value:
            raise ValueError(
                f"{key}={value} is given for every strategy, but {spec!r} has {key}={arguments[key]}: "
                f"write the strategy with it, as in {name}:{key}={value}, or leave it out."
            )
    return common | arguments
