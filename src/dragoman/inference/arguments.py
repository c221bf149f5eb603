"""The arguments of `generate()` as a file, an option or a strategy may write them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from dragoman.settings import nearest, parse_yaml, typed


@dataclass(kw_only=True)
class GenerationArguments:
    """The arguments of `generate()` that a file or the command line may set; None = what generate() does by itself."""

    max_length: int | None = None  # None: from the longest training target, with a margin
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    early_stopping: bool | Literal["never"] | None = None
    max_time: float | None = None
    stop_strings: str | list[str] | None = None
    do_sample: bool | None = None
    num_beams: int | None = None
    use_cache: bool | None = None
    cache_implementation: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    penalty_alpha: float | None = None
    repetition_penalty: float | None = None
    encoder_repetition_penalty: float | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    exponential_decay_length_penalty: list[float] | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
    guidance_scale: float | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None

    def given(self) -> dict[str, Any]:
        """The arguments that were set, as keywords for `generate()`."""
        return {name: value for name, value in vars(self).items() if value is not None}


def parse_generation_options(options: list[str], others: Iterable[str] = ()) -> GenerationArguments:
    """`["--num-beams", "4", "--do-sample", "--top-p=0.9"]` -> GenerationArguments; values are YAML, no value is true.

    Args:
        options: what the command line has left over.
        others: further valid options such as "--nbest", known elsewhere, for the nearest valid one in an error.

    Raises:
        ValueError: an unknown option (with the nearest valid one), a stray word, a value of the wrong type.
    """
    hints = get_type_hints(GenerationArguments)
    given: dict[str, Any] = {}
    for option, text in _option_pairs(options):
        name = option.removeprefix("--").replace("-", "_")
        if name not in hints:
            valid = [f"--{valid_name.replace('_', '-')}" for valid_name in hints]
            raise ValueError(f"no such option: {option}; the nearest valid one is {nearest(option, [*valid, *others])}")
        given[name] = typed(parse_yaml(text, option), hints[name], option)
    arguments = GenerationArguments(**given)
    check_generation(arguments, "--")
    return arguments


def _option_pairs(options: list[str]) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(options):
        option, equals, text = options[position].partition("=")
        if not option.startswith("--"):
            raise ValueError(f"unexpected argument {options[position]!r}; options start with --")
        position += 1
        if not equals:
            text = "true"
            if position < len(options) and not options[position].startswith("--"):
                text = options[position]
                position += 1
        yield option, text


def check_generation(arguments: GenerationArguments, where: str) -> None:
    for name in ("num_beams", "max_length", "max_new_tokens", "penalty_alpha", "temperature"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ValueError(f"{where}{name} must be greater than 0, got {value}")
    if arguments.max_length is not None and arguments.max_new_tokens is not None:
        raise ValueError(f"{where}max_length and max_new_tokens exclude each other; give one of them")
