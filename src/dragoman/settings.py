"""Values that people write, in a file or on the command line: read as YAML, checked against a type hint, key by key."""

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def nearest(word: str, valid: list[str]) -> str:
    """The valid word most like this one."""
    return difflib.get_close_matches(word, valid, n=1, cutoff=0.0)[0]


def did_you_mean(name: str, valid: Sequence[str]) -> str:
    """The end of an error's sentence: the nearest valid name if one is near, and all valid names."""
    close = difflib.get_close_matches(name, valid, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Valid: {', '.join(sorted(valid))}."


def check_key(key: Any, valid: list[str], where: str, section: str = "") -> None:
    if key not in valid:
        closest = nearest(str(key), valid)
        raise ValueError(f"{where}unknown key '{section}{key}'; the nearest valid one is '{section}{closest}'")


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation asks, or a ValueError that says what is allowed."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    if enums:  # the Trainer annotates `SchedulerType | str`: the plain str would let every misspelling through
        members = tuple(member for member in members if member is not str)
    for member in members:
        matches, converted = _match(value, member, where)
        if matches:
            return converted
    allowed = " or ".join(_describe(member) for member in members)
    raise ValueError(f"{where} must be {allowed}, got {value!r}")


def _match(value: Any, member: Any, where: str) -> tuple[bool, Any]:
    origin = get_origin(member)
    if member is Any:
        return True, value
    if member is types.NoneType:
        return value is None, None
    if origin is Literal:
        # 1 == True in Python; a flag is not a number here
        return any(value == choice and type(value) is type(choice) for choice in get_args(member)), value
    if origin is list or member is list:
        items = get_args(member) or (Any,)
        if not isinstance(value, list):
            return False, None
        return True, [typed(item, items[0], f"{where}: each entry") for item in value]
    if origin is dict or member is dict:
        return isinstance(value, dict), value
    if isinstance(member, type) and issubclass(member, Enum):
        return value in [choice.value for choice in member], value
    if member is float:
        return isinstance(value, int | float) and not isinstance(value, bool), value
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(member, type) and isinstance(value, member), value


def _describe(member: Any) -> str:
    if get_origin(member) is Literal:
        return " or ".join(repr(choice) for choice in get_args(member))
    if get_origin(member) is list:
        return f"a list ({_describe(get_args(member)[0])} each)"
    if get_origin(member) is dict:
        return "a mapping"
    if isinstance(member, type) and issubclass(member, Enum):
        return "one of " + ", ".join(str(choice.value) for choice in member)
    if get_origin(member) in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in get_args(member))
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        dict: "a mapping",
        types.NoneType: "null",
    }
    return words.get(member, str(member))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2e-3 as text and `no` as false; a learning rate and `eval_strategy: no` need YAML 1.2's reading.

    A key given twice is an error; PyYAML alone keeps the last one in silence.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"key '{key}' is given twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(*_FLOAT)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around each text that YAML 1.1 or 1.2 would take for something else."""


_Dumper.add_implicit_resolver(*_FLOAT)


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """A text that `parse_mapping`, and any other reader of YAML, reads as this mapping."""
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    mapping = parse_yaml(text, where)
    if not isinstance(mapping, Mapping):
        found = "but there are none" if mapping is None else f"got {mapping!r}"
        raise ValueError(f"{where}: expected 'key: value' lines, {found}")
    return dict(mapping)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = one_line(error).replace('in "<unicode string>", ', "in ")
        raise ValueError(f"{where}: not valid YAML: {problem}") from error
