"""One YAML file (plus `section.key=value` overrides) -> one typed `Experiment`.

The file has five sections, each checked key by key and type by type before anything runs:

    model:       preset: modern            # configs/models/modern.yaml, merged under the keys given here
                 d_model: 128              # any field of the configuration class, but what the tokenizer decides
    data:        DataArguments
    tokenizer:   TokenizerArguments
    generation:  GenerationArguments       # saved with the model as its defaults for generate()
    training:    TrainingArguments         # every field of Seq2SeqTrainingArguments, with the defaults of this page

Every mistake is a ValueError of one sentence: the file, the key, and what is allowed there.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, SchedulerType, Seq2SeqTrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


PathPair = str | list[str]


@dataclass(kw_only=True)
class DataArguments:
    """Where the sentence pairs are and which of them are used.

    A set of pairs is what `read_pairs` takes: a path to .jsonl or .tsv (also .gz), a list of two parallel text files,
    the folder of a saved dataset, or `embedded:NAME/SPLIT`. The length limits, `overlong` and `empty` hold for the
    training pairs; every pair of the other two sets counts.
    """

    train: PathPair
    validation: PathPair | None = None
    test: PathPair | None = None
    max_source_length: int | None = None  # tokens, </s> included; None = no limit
    max_target_length: int | None = None
    overlong: Literal["error", "drop", "truncate"] = "error"
    empty: Literal["error", "drop"] = "error"
    source_column: str = "source"
    target_column: str = "target"


@dataclass(kw_only=True)
class TokenizerArguments:
    """Either `path` (a folder with a saved tokenizer or processor), or how to train one on the training pairs."""

    path: str | None = None
    kind: Literal["bpe", "unigram", "word", "char"] = "bpe"
    vocab_size: int = 8000
    joint: bool = True  # false: one vocabulary for the source, one for the target
    target_kind: Literal["bpe", "unigram", "word", "char"] | None = None  # with joint: false; null = kind
    target_vocab_size: int | None = None  # with joint: false; null = vocab_size
    extra_special_tokens: list[str] = field(default_factory=list)  # for example language codes


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


@dataclass(kw_only=True)
class TrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the recipe under which models of this family train from scratch.

    AdamW with the second moment of Vaswani et al. 2017 (section 5.3, beta2 0.98), a short warm-up and a linear decay.
    Label smoothing is a field of the model (`model.label_smoothing`), where it costs no second pass over the logits.
    """

    num_train_epochs: float = 20
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    learning_rate: float = 1e-3
    lr_scheduler_type: SchedulerType | str = "linear"
    warmup_steps: float = 0.05  # below 1: a fraction of all steps
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    logging_steps: float = 50
    eval_strategy: IntervalStrategy | str = "epoch"
    save_strategy: SaveStrategy | str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "chrf"
    predict_with_generate: bool = True
    dataloader_pin_memory: bool = torch.accelerator.is_available()
    generation_num_beams: int | None = 1  # during training; the test at the end uses the `generation` section
    restore_callback_states_from_checkpoint: bool = True  # so that a resumed run keeps the patience it has used up
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in a row without a better metric_for_best_model."},
    )
    metrics: list[str] = field(
        default_factory=lambda: ["bleu", "chrf"],
        metadata={"help": "Metrics of every evaluation, with options if wanted: bleu:tokenize=zh."},
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # Transformers knows only that a loss should fall
            self.greater_is_better = not self.metric_for_best_model.endswith(
                ("loss", "wer", "cer", "ter", "error_rate")
            )
        super().__post_init__()
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true and a validation set")


# Keys of the Trainer that another section or a command line flag decides here.
_DECIDED_ELSEWHERE = {
    "label_smoothing_factor": "set model.label_smoothing",
    "generation_config": "use the section 'generation'",
    "resume_from_checkpoint": "use the flag --resume",
    "do_train": "'dragoman train' always trains",
    "do_eval": "give or leave out data.validation",
    "do_predict": "give or leave out data.test",
    "sortish_sampler": "set training.train_sampling_strategy: group_by_length",
}
_FROM_THE_TOKENIZER = (
    "vocab_size",
    "source_vocab_size",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
)
_SECTIONS: dict[str, type] = {
    "data": DataArguments,
    "tokenizer": TokenizerArguments,
    "generation": GenerationArguments,
    "training": TrainingArguments,
}
# What a run without validation data cannot do; keys given by the user are left alone and refused by the Trainer.
_WITHOUT_VALIDATION = {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None}


@dataclass(kw_only=True)
class Experiment:
    """A checked experiment. `model` holds `model_type` and the keys given for its configuration class."""

    model: dict[str, Any]
    data: DataArguments
    tokenizer: TokenizerArguments
    generation: GenerationArguments
    training: TrainingArguments
    given: dict[str, dict[str, Any]]  # the sections as written, presets and overrides merged in

    def model_config(self, **from_tokenizer: Any) -> PreTrainedConfig:
        """The model's configuration, with the sizes and ids that only the tokenizer knows."""
        return _build_config(self.model, "model", **from_tokenizer)

    def save(self, path: Path) -> None:
        """Write the experiment so that `load_experiment(path)` gives it back."""
        header = f"# dragoman train {path.name}\n"
        path.write_text(header + yaml.safe_dump(self.given, sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_experiment(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read a YAML file, apply overrides such as `training.learning_rate=2e-3` (values are YAML too), check it all.

    The override `model.preset=NAME` takes the place of the file's whole model section.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not YAML, a key twice, an unknown or missing key, a value of the wrong type or out of range.
    """
    path = Path(path)
    written = _read_mapping(path)
    for name, keys in written.items():
        _check_key(name, ["model", *_SECTIONS], f"{path}: ")
        if not isinstance(keys, dict | None):
            raise ValueError(f"{path}: section '{name}' must hold 'key: value' lines, got {keys!r}")
    sections = {name: dict(written.get(name) or {}) for name in ("model", *_SECTIONS)}
    changes = [_parse_override(override, list(sections)) for override in overrides]
    if any((section, key) == ("model", "preset") for section, key, _ in changes):
        sections["model"] = {}  # the sizes of another architecture would be wrong here, or unknown
    for section, key, value in changes:
        sections[section][key] = value
    overridden = {(section, key) for section, key, _ in changes}

    def where(section: str, key: str) -> str:
        return f"override {section}.{key}: " if (section, key) in overridden else f"{path}: "

    sections["model"] = _checked_model(sections["model"], where)
    _build_config(sections["model"], f"{path}: model")
    sections["training"].setdefault("output_dir", f"runs/{path.stem}")
    built: dict[str, Any] = {}
    for name, section_class in _SECTIONS.items():
        keys = _checked_section(name, section_class, sections[name], where)
        if name == "training" and built["data"].validation is None:
            if keys.get("eval_strategy", "no") != "no":
                raise ValueError(
                    f"{where(name, 'eval_strategy')}training.eval_strategy is {keys['eval_strategy']!r}, "
                    "but there is no data.validation to evaluate on"
                )
            keys = _WITHOUT_VALIDATION | keys
        try:
            built[name] = section_class(**keys)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {_one_line(error)}") from error

    _check_generation(built["generation"], f"{path}: generation.")
    try:  # what generate() would ignore (top_k without sampling) cannot be saved with a model
        generation_config = GenerationConfig()
        vars(generation_config).update(built["generation"].given())  # as keywords they would be warned about first
        generation_config.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"{path}: generation: {_one_line(error)}") from error
    return Experiment(model=sections["model"], given=sections, **built)


def _parse_override(override: str, sections: list[str]) -> tuple[str, str, Any]:
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", override, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"override {override!r}: expected section.key=value, for example training.seed=1")
    section, key, value = match.groups()
    _check_key(section, sections, f"override {override!r}: ")
    return section, key, _parse_yaml(value, f"override {override!r}")


def _checked_model(given: dict[str, Any], where: Callable[[str, str], str]) -> dict[str, Any]:
    """The model section with its preset merged in, `model_type` first."""
    keys = {key: value for key, value in given.items() if key != "preset"}
    if "preset" in given:
        keys = _read_preset(str(given["preset"]), where("model", "preset")) | keys
    keys = {"model_type": "dragoman"} | keys
    config_class = _config_class(keys["model_type"], where("model", "model_type"))
    hints = get_type_hints(config_class, localns={"torch": torch})  # transformers imports it for type checkers only
    valid = [name for name in _config_keys(config_class) if name not in _FROM_THE_TOKENIZER]
    for key in keys.keys() - {"model_type"}:
        name = f"{where('model', key)}model.{key}"
        if key in _FROM_THE_TOKENIZER:
            raise ValueError(f"{name} comes from the tokenizer; leave it out")
        _check_key(key, valid, where("model", key), "model.")
        keys[key] = _typed(keys[key], hints[config_class.attribute_map.get(key, key)], name)
    return keys


def _checked_section(
    name: str, section_class: type, given: dict[str, Any], where: Callable[[str, str], str]
) -> dict[str, Any]:
    """The keys of any other section, each known, of the right type and none missing."""
    hints = get_type_hints(section_class)
    fields = [f for f in dataclasses.fields(section_class) if f.init and f.name not in _DECIDED_ELSEWHERE]
    keys = {}
    for key, value in given.items():
        if key in _DECIDED_ELSEWHERE:
            raise ValueError(f"{where(name, key)}{name}.{key} is not used here: {_DECIDED_ELSEWHERE[key]}")
        _check_key(key, [f.name for f in fields], where(name, key), f"{name}.")
        keys[key] = _typed(value, hints[key], f"{where(name, key)}{name}.{key}")
    for f in fields:
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in keys:
            raise ValueError(f"{where(name, f.name)}{name}.{f.name} is missing")
    return keys


def preset(name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a preset of configs/models, for example `preset("deep_shallow", d_model=256)`.

    Raises:
        ValueError: no such preset, an unknown field, or a combination that the configuration class refuses.
    """
    keys = _read_preset(name, "")
    config_class = _config_class(keys["model_type"], f"preset {name}: ")
    for key in overrides:
        _check_key(key, _config_keys(config_class), f"preset {name}: ")
    return _build_config({**keys, **overrides}, f"preset {name}")


def preset_names() -> list[str]:
    """The names of the presets that ship with the package."""
    return sorted(Path(entry.name).stem for entry in _presets_folder().iterdir() if entry.name.endswith(".yaml"))


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
            raise ValueError(
                f"no such option: {option}; the nearest valid one is {_nearest(option, [*valid, *others])}"
            )
        given[name] = _typed(_parse_yaml(text, option), hints[name], option)
    arguments = GenerationArguments(**given)
    _check_generation(arguments, "--")
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


def _check_generation(arguments: GenerationArguments, where: str) -> None:
    for name in ("num_beams", "max_length", "max_new_tokens", "penalty_alpha", "temperature"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ValueError(f"{where}{name} must be greater than 0, got {value}")
    if arguments.max_length is not None and arguments.max_new_tokens is not None:
        raise ValueError(f"{where}max_length and max_new_tokens exclude each other; give one of them")


def _presets_folder() -> Traversable:
    return resources.files("dragoman") / "configs" / "models"


def _read_preset(name: str, where: str) -> dict[str, Any]:
    if name not in preset_names():
        nearest = _nearest(name, preset_names())
        raise ValueError(f"{where}no preset {name!r}; the nearest is {nearest!r}, all are: {', '.join(preset_names())}")
    return _parse_mapping((_presets_folder() / f"{name}.yaml").read_text(encoding="utf-8"), f"preset {name}")


def _config_class(model_type: Any, where: str) -> type[PreTrainedConfig]:
    if model_type not in CONFIG_MAPPING:
        nearest = _nearest(str(model_type), ["dragoman", "dragoman_rnn"])
        raise ValueError(f"{where}unknown model.model_type {model_type!r}; did you mean {nearest!r}?")
    return CONFIG_MAPPING[model_type]


def _config_keys(config_class: type[PreTrainedConfig]) -> list[str]:
    # A @strict configuration refuses wrong types but takes unknown keywords as attributes: the keys are checked here.
    return [f.name for f in dataclasses.fields(config_class)] + list(config_class.attribute_map)


def _build_config(keys: dict[str, Any], where: str, **more: Any) -> PreTrainedConfig:
    values = {key: value for key, value in keys.items() if key != "model_type"}
    try:
        return CONFIG_MAPPING[keys["model_type"]](**values, **more)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{where}: {_one_line(error.__cause__ or error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _nearest(word: str, valid: list[str]) -> str:
    return difflib.get_close_matches(word, valid, n=1, cutoff=0.0)[0]


def _check_key(key: Any, valid: list[str], where: str, section: str = "") -> None:
    if key not in valid:
        nearest = _nearest(str(key), valid)
        raise ValueError(f"{where}unknown key '{section}{key}'; the nearest valid one is '{section}{nearest}'")


def _typed(value: Any, hint: Any, where: str) -> Any:
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
        return True, [_typed(item, items[0], f"{where}: each entry") for item in value]
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
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _parse_mapping(path.read_text(encoding="utf-8"), str(path))


def _parse_mapping(text: str, where: str) -> dict[str, Any]:
    mapping = _parse_yaml(text, where)
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where}: expected 'key: value' lines, got {mapping!r}")
    return dict(mapping)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {_one_line(error)}") from error
