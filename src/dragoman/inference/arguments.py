"""The arguments of `generate()` as a file, an option or a strategy may write them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from transformers import GenerationConfig

from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer
from dragoman.settings import nearest, one_line, parse_yaml, typed


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
    num_beam_groups: int | None = None  # diverse beam search
    diversity_penalty: float | None = None
    force_words_ids: list[list[Any]] | None = None  # [[5, 6], [7]]: both; [[[5, 6], [7]]]: one of the two
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
    sequence_bias: list[list[Any]] | None = None  # [[[5, 6], -2.0], ...]: added to the logit of what ends in 5 6
    decoder_start_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    exponential_decay_length_penalty: list[float] | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
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


_POSITIVE = (
    "num_beams",
    "num_beam_groups",
    "max_length",
    "max_new_tokens",
    "max_time",
    "temperature",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
)
_NOT_NEGATIVE = (
    "diversity_penalty",
    "min_length",
    "min_new_tokens",
    "top_k",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
)
_RANGES: list[tuple[tuple[str, ...], str, Callable[[float], bool]]] = [
    (_POSITIVE, "greater than 0", lambda value: value > 0),
    (_NOT_NEGATIVE, "at least 0", lambda value: value >= 0),
    (("top_p", "typical_p", "top_h"), "greater than 0 and at most 1", lambda value: 0 < value <= 1),
    (("min_p", "penalty_alpha"), "at least 0 and at most 1", lambda value: 0 <= value <= 1),
    (("epsilon_cutoff", "eta_cutoff"), "at least 0 and less than 1", lambda value: 0 <= value < 1),
]


def check_generation(arguments: GenerationArguments, where: str) -> None:
    """Raise a ValueError for a value out of its range; `where` stands before the names."""
    check_ranges(arguments.given(), where)
    if arguments.max_length is not None and arguments.max_new_tokens is not None:
        raise ValueError(f"{where}max_length and max_new_tokens exclude each other; give one of them")


def check_ranges(given: Mapping[str, Any], where: str = "") -> None:
    for names, allowed, holds in _RANGES:
        for name in names:
            value = given.get(name)
            if value is not None and not holds(value):
                written = name.replace("_", "-") if where == "--" else name
                raise ValueError(f"{where}{written} must be {allowed}, got {value}")


def check_combination(given: Mapping[str, Any], defaults: GenerationConfig | None = None) -> None:
    """Raise a ValueError for what `generate()` would ignore beside the other arguments, such as top_p without sampling.

    Args:
        given: arguments of `generate()`; others than those of a generation config are passed over.
        defaults: the model's own settings, which tell the mode where the arguments leave it open.
    """
    config = GenerationConfig()
    if defaults is not None:
        mode = {"do_sample": defaults.do_sample, "num_beams": defaults.num_beams, "use_cache": defaults.use_cache}
        vars(config).update(mode)
    # As keywords or by update() they would be warned about first.
    vars(config).update({name: value for name, value in given.items() if name in vars(config) and value is not None})
    if defaults is not None and (defaults.penalty_alpha if config.penalty_alpha is None else config.penalty_alpha):
        config.top_k = None  # which contrastive search has without sampling
    try:
        config.validate(strict=True)
    except ValueError as error:
        problem = one_line(error).removeprefix("GenerationConfig is invalid: - ")
        raise ValueError(problem.split(" If you're using a pretrained model")[0]) from error


# Whose values are ids of the target vocabulary.
_ID_ARGUMENTS = (
    "force_words_ids",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "decoder_start_token_id",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def check_token_ids(given: Mapping[str, Any], vocab_size: int, where: str = "") -> None:
    """Raise a ValueError for a token id outside the target vocabulary; `where` stands before the name."""
    for name in _ID_ARGUMENTS:
        value = given.get(name)
        if name == "sequence_bias" and isinstance(value, list):
            if not all(isinstance(entry, list) and len(entry) == 2 for entry in value):
                raise ValueError(f"{where}{name} must be a list of pairs such as [[5, 6], -2.0], got {value!r}")
            value = [ids for ids, _ in value]
        for token_id in _flat(value):
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{where}{name} has the token id {token_id}, but the target vocabulary has the ids 0 to "
                    f"{vocab_size - 1}"
                )


def forced_words(processing_class: ProcessingClass, words: Iterable[str]) -> list[list[list[int]]]:
    """`force_words_ids` that have every one of the words in the output, at its beginning or after a space.

    Args:
        processing_class: tokenizer or processor of the model.
        words: words or phrases; `"cat|cats"` is a choice.

    Raises:
        ValueError: a word is empty, or the target vocabulary cannot spell it.
    """
    _, tokenizer = source_and_target_tokenizer(processing_class)
    forced = []
    for word in words:
        forms: list[list[int]] = []
        for form in word.split("|"):
            if not form.strip():
                raise ValueError(f"the forced word {word!r} is empty; write a word, or two to choose from as A|B")
            for text in (form.strip(), f" {form.strip()}"):
                ids = tokenizer(text_target=text, add_special_tokens=False)["input_ids"]
                if tokenizer.unk_token_id in ids and text == form.strip():
                    raise ValueError(f"the target vocabulary cannot spell the forced word {form.strip()!r}")
                if ids not in forms and tokenizer.unk_token_id not in ids:
                    forms.append(ids)
        forced.append(forms)
    return forced


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif value is not None:
        for part in value:
            yield from _flat(part)
