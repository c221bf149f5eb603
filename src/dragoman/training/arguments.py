"""One YAML file (plus `section.key=value` overrides) -> one typed `Experiment`.

The file has five sections, each checked key by key and type by type before anything runs:

    model:       preset: modern            # configs/models/modern.yaml, merged under the keys given here
                 d_model: 128              # any field of the configuration class, but what the tokenizer decides
          or     from_pretrained: runs/opus-en-it   # a Dragoman model with its tokenizer; then dropouts alone
    data:        DataArguments
    tokenizer:   TokenizerArguments
    generation:  GenerationArguments       # saved with the model as its defaults for generate()
    training:    TrainingArguments         # every field of Seq2SeqTrainingArguments, with the defaults of this page

Every mistake is a ValueError of one sentence: the file, the key, and what is allowed there.
"""

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, SchedulerType, Seq2SeqTrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from dragoman.data.reading import existing_path
from dragoman.evaluation.scores import check_metrics
from dragoman.files import write_whole
from dragoman.inference.arguments import GenerationArguments, check_combination, check_generation
from dragoman.inference.loading import model_folder
from dragoman.models.scheduled_sampling import teacher_forcing_schedule
from dragoman.settings import check_key, dump_yaml, nearest, one_line, parse_mapping, parse_yaml, typed
from dragoman.training.checks import check_libraries, check_ranges


PathPair = str | list[str]


SPLITS = ("train", "validation", "test")


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
    # For rows without columns of these names; each holds for all three sets.
    source_lang: str | None = None  # code of the language
    target_lang: str | None = None
    both_directions: bool = False  # use every pair a second time, turned round with its languages
    source_prefix: str | None = None  # put before every source, and saved with the model for later ones
    num_proc: int | None = None  # processes that encode the pairs
    streaming: bool = False  # read the training pairs while training, again and again, instead of before
    shuffle_buffer: int = 10_000  # pairs of a stream that are read ahead, to be shuffled and grouped by length

    def __post_init__(self) -> None:
        for name in ("num_proc", "shuffle_buffer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


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
    max_pairs: int | None = None  # to train on, from all over the data; null = all


# Optimizers of which tensor parallelism may give each process a part.
_ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


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
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most source and target tokens of a training batch on a device, padding included, in place of "
            "per_device_train_batch_size: pairs of like lengths share a batch."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Put several pairs into each row; max_tokens_per_batch then counts real tokens."},
    )
    attn_implementation: Literal["eager", "sdpa", "flex_attention", "varlen"] | None = field(
        default=None,
        metadata={
            "help": "How training steps of a Transformer compute attention; null is Transformers' default, which "
            "evaluations and the saved model have in any case."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in a row without a better metric_for_best_model."},
    )
    teacher_forcing_schedule: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Scheduled sampling of a recurrent model: kind, k, slope, minimum."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Average the weights over the steps, the newest with 1 - ema_decay: 0.999 looks back on 1,000 "
            "steps. The average is evaluated and saved."
        },
    )
    tensor_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Cut every matrix in so many parts, one for each process; all of them work on the same batches."
        },
    )
    stop_on_divergence: bool = field(
        default=True,
        metadata={"help": "Stop before the weights are lost to a gradient that is not finite or explodes."},
    )
    samples: int = field(default=2, metadata={"help": "Validation sources whose outputs each evaluation shows."})
    metrics: list[str] = field(
        default_factory=lambda: ["bleu", "chrf"],
        metadata={"help": "Metrics of every evaluation, with options if wanted: bleu:tokenize=zh."},
    )

    @property
    def data_processes(self) -> int:
        """Processes with batches of their own; those that share the matrices share the batches, too."""
        return int(self.world_size) // self.tensor_parallel_size

    @property
    def data_index(self) -> int:
        """Which of them this process is."""
        return int(self.process_index) // self.tensor_parallel_size

    def __post_init__(self) -> None:
        figures = check_metrics(self.metrics)
        if self.metric_for_best_model is not None:
            are_scored = self.predict_with_generate and not self.prediction_loss_only
            known = {"loss": False, **(figures if are_scored else {})}
            best = self.metric_for_best_model.removeprefix("eval_")
            if best not in known:
                raise ValueError(
                    f"metric_for_best_model must be one of {', '.join(known)}, got {self.metric_for_best_model!r}"
                )
            if self.greater_is_better is None:  # Transformers knows only that a loss should fall
                self.greater_is_better = known[best]
        check_ranges(self)
        if self.max_steps < 1 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}; it must be greater than 0")
        if self.packing and self.max_tokens_per_batch is None:
            raise ValueError("packing needs max_tokens_per_batch, the tokens of a batch")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy batch_rebalance cannot be resumed exactly; group_by_length can, or set "
                "max_tokens_per_batch instead"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be between 0 and 1, for example 0.999")
        if self.tensor_parallel_size > 1:
            # Nothing can scale the gradients of matrices that are cut and of others at once, which fp16 needs.
            for name in ("ema_decay", "fsdp", "deepspeed", "fp16"):
                if getattr(self, name):
                    raise ValueError(f"tensor_parallel_size and {name} exclude each other")
            if not self.average_tokens_across_devices:  # the Trainer would add the gradients of all parts up
                raise ValueError("tensor_parallel_size needs average_tokens_across_devices: true, which is the default")
            if self.optim not in _ELEMENTWISE:
                raise ValueError(f"tensor_parallel_size goes with optim {', '.join(_ELEMENTWISE)}, not {self.optim}")
        if self.report_to is None:
            self.report_to = "none"
        super().__post_init__()
        check_libraries(self)
        if self.teacher_forcing_schedule is not None:
            valid = list(inspect.signature(teacher_forcing_schedule).parameters)[1:]
            for key in self.teacher_forcing_schedule:
                check_key(key, valid, "", "teacher_forcing_schedule.")
            teacher_forcing_schedule(0, **self.teacher_forcing_schedule)
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
    "stop_strings": "they need the tokenizer, so give them to 'dragoman generate --stop-strings' or translate()",
    "decoder_start_token_id": "it comes from the tokenizer",
    "eos_token_id": "it comes from the tokenizer",
    "hub_token": "it would be saved and pushed with the experiment; set HF_TOKEN or run `hf auth login`",
    "batch_eval_metrics": "scores such as BLEU need all outputs at once",
    "use_liger_kernel": "Liger has no kernels for these models",
    "liger_kernel_config": "Liger has no kernels for these models",
    "parallelism_config": "set training.tensor_parallel_size, or launch with configs/accelerate/fsdp2.yaml",
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
# What may be changed of a model that starts from a checkpoint: it decides nothing but how it is trained on.
_OF_TRAINING = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "final_dropout",
    "layerdrop",
    "label_smoothing",
    "teacher_forcing_ratio",
)
_SECTIONS: dict[str, type] = {
    "data": DataArguments,
    "tokenizer": TokenizerArguments,
    "generation": GenerationArguments,
    "training": TrainingArguments,
}
# What tensor parallelism cuts, of either side.
_CUT = ("attention_heads", "num_key_value_heads", "ffn_dim")
# What a token budget takes the place of, and what a stream cannot have.
_WITHOUT_BUDGET = (
    "per_device_train_batch_size",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "auto_find_batch_size",
)
_WITHOUT_STREAM = ("train_sampling_strategy", "dataloader_drop_last", "auto_find_batch_size", "num_train_epochs")
# What a run without validation data cannot do; keys given by the user are left alone and refused by the Trainer.
_WITHOUT_VALIDATION = {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None}


@dataclass(kw_only=True)
class Experiment:
    """
    A checked experiment. `model` holds `model_type`, the keys given for its configuration class and, for one that
    starts from a checkpoint, `from_pretrained`.
    """

    model: dict[str, Any]
    data: DataArguments
    tokenizer: TokenizerArguments
    generation: GenerationArguments
    training: TrainingArguments
    path: Path  # the file it was read from
    given: dict[str, dict[str, Any]]  # the sections as written, presets and overrides merged in

    def model_config(self, **from_tokenizer: Any) -> PreTrainedConfig:
        """The model's configuration, with the sizes and ids that only the tokenizer knows."""
        return _build_config(self.model, "model", **from_tokenizer)

    def save(self, path: Path) -> None:
        """Write the experiment so that `load_experiment(path)` gives it back."""
        header = f"# dragoman train {path.name}\n"
        write_whole(path, header + dump_yaml(self.given))


def load_experiment(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read a YAML file, apply overrides such as `training.learning_rate=2e-3` (values are YAML too), check it all.

    The override `model.preset=NAME` takes the place of the file's whole model section and of what the preset says about
    training, `model.from_pretrained=PATH` of its tokenizer section too, and `training.max_tokens_per_batch=N` of its
    batch size and sampling strategy.

    Raises:
        FileNotFoundError: the file does not exist, or the checkpoint to start from.
        ValueError: not YAML, a key twice, an unknown or missing key, a value of the wrong type or out of range.
    """
    path = Path(path)
    written = _read_mapping(path)
    for name, keys in written.items():
        check_key(name, ["model", *_SECTIONS], f"{path}: ")
        if not isinstance(keys, dict | None):
            raise ValueError(f"{path}: section '{name}' must hold 'key: value' lines, got {keys!r}")
    sections = {name: dict(written.get(name) or {}) for name in ("model", *_SECTIONS)}
    changes = [_parse_override(override, list(sections)) for override in overrides]
    keys_changed = {(section, key) for section, key, _ in changes}
    if keys_changed & {("model", "preset"), ("model", "from_pretrained")}:
        sections["model"] = {}  # the sizes of another architecture would be wrong here, or unknown
    if ("model", "from_pretrained") in keys_changed:
        sections["tokenizer"] = {}
    for section, key, value in changes:
        sections[section][key] = value
    if ("training", "max_tokens_per_batch") in keys_changed:
        for key in _WITHOUT_BUDGET:
            if ("training", key) not in keys_changed:
                sections["training"].pop(key, None)

    for key, value in _recipe_of_preset(sections["model"]).items():
        replaces = ("model", "preset") in keys_changed and ("training", key) not in keys_changed
        if replaces or key not in sections["training"]:
            sections["training"][key] = value

    def where(section: str, key: str) -> str:
        return "override: " if (section, key) in keys_changed else f"{path}: "

    def files(section: str) -> str:
        return f"{path} with the overrides" if section in {changed for changed, _ in keys_changed} else str(path)

    sections["model"] = _checked_model(sections["model"], where)
    config = _build_config(sections["model"], f"{files('model')}: model")
    for key in sections["tokenizer"] if "from_pretrained" in sections["model"] else ():
        raise ValueError(
            f"{where('tokenizer', key)}tokenizer.{key} must be left out: a model that starts from a checkpoint "
            "(model.from_pretrained) keeps its tokenizer"
        )
    sections["training"].setdefault("output_dir", f"runs/{path.stem}")
    built: dict[str, Any] = {}
    for name, section_class in _SECTIONS.items():
        keys = _checked_section(name, section_class, sections[name], where)
        if name == "training" and built["data"].validation is None:
            if keys.get("eval_strategy", "no") != "no":
                raise ValueError(
                    f"{where(name, 'eval_strategy')}training.eval_strategy is {keys['eval_strategy']!r}, "
                    "but there is no data.validation to evaluate on: add it, or set training.eval_strategy=no"
                )
            keys = _WITHOUT_VALIDATION | keys
        if name == "training":
            keys = _checked_batches(keys, built["data"], sections["model"]["model_type"], where)
        try:
            built[name] = section_class(**keys)
        except (ImportError, TypeError, ValueError) as error:  # of the libraries that the Trainer asks
            raise ValueError(f"{files(name)}: {name}: {one_line(error)}") from error

    model_type = sections["model"]["model_type"]
    if built["training"].teacher_forcing_schedule is not None and model_type != "dragoman_rnn":
        raise ValueError(
            f"{where('training', 'teacher_forcing_schedule')}training.teacher_forcing_schedule is for models of type "
            f"'dragoman_rnn', not {model_type!r}; leave it out"
        )
    _check_parts(built["training"].tensor_parallel_size, config, where("training", "tensor_parallel_size"))
    if built["training"].attn_implementation is not None and model_type != "dragoman":
        raise ValueError(
            f"{where('training', 'attn_implementation')}training.attn_implementation is for models of type 'dragoman', "
            f"not {model_type!r}; leave it out"
        )
    check_generation(built["generation"], f"{files('generation')}: generation.")
    try:  # what generate() would ignore (top_k without sampling) cannot be saved with a model
        check_combination(built["generation"].given())
    except ValueError as error:
        raise ValueError(f"{files('generation')}: generation: {error}") from error
    return Experiment(model=sections["model"], path=path, given=sections, **built)


def _parse_override(override: str, sections: list[str]) -> tuple[str, str, Any]:
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", override, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"override {override!r}: expected section.key=value, for example training.seed=1")
    section, key, value = match.groups()
    check_key(section, sections, f"override {override!r}: ")
    return section, key, parse_yaml(value, f"override {override!r}")


def _checked_model(given: dict[str, Any], where: Callable[[str, str], str]) -> dict[str, Any]:
    """The model section with its preset merged in, `model_type` first."""
    if "from_pretrained" in given:
        return _checked_checkpoint(given, where)
    keys = {key: value for key, value in given.items() if key != "preset"}
    if "preset" in given:
        keys = _read_preset(str(given["preset"]), where("model", "preset"))[0] | keys
    keys = {"model_type": "dragoman"} | keys
    config_class = _config_class(keys["model_type"], where("model", "model_type"))
    hints = get_type_hints(config_class, localns={"torch": torch})  # transformers imports it for type checkers only
    valid = [name for name in _config_keys(config_class) if name not in _FROM_THE_TOKENIZER]
    for key in keys.keys() - {"model_type"}:
        name = f"{where('model', key)}model.{key}"
        if key in _FROM_THE_TOKENIZER:
            raise ValueError(f"{name} comes from the tokenizer; leave it out")
        check_key(key, valid, where("model", key), "model.")
        keys[key] = typed(keys[key], hints[config_class.attribute_map.get(key, key)], name)
    return keys


def _checked_checkpoint(given: dict[str, Any], where: Callable[[str, str], str]) -> dict[str, Any]:
    """A model section that names a checkpoint to start from."""
    name = f"{where('model', 'from_pretrained')}model.from_pretrained"
    start = typed(given["from_pretrained"], str, name)
    try:
        folder = model_folder(start)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}") from error
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type not in ("dragoman", "dragoman_rnn"):
        raise ValueError(
            f"{name}: {start} holds a model of type {model_type!r}; convert it first, with "
            f"'dragoman convert {start} FOLDER', and start from that folder"
        )
    hints = get_type_hints(_config_class(model_type, ""), localns={"torch": torch})
    valid = [key for key in _OF_TRAINING if key in hints]
    keys = {key: value for key, value in given.items() if key not in ("from_pretrained", "model_type")}
    for key, value in keys.items():
        if key not in valid:
            raise ValueError(
                f"{where('model', key)}model.{key} is the checkpoint's own beside model.from_pretrained; what can be "
                f"changed is {', '.join(valid)}"
            )
        keys[key] = typed(value, hints[key], f"{where('model', key)}model.{key}")
    return {"model_type": model_type, "from_pretrained": start, **keys}


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
        check_key(key, [f.name for f in fields], where(name, key), f"{name}.")
        keys[key] = typed(value, hints[key], f"{where(name, key)}{name}.{key}")
    for f in fields:
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in keys:
            raise ValueError(f"{where(name, f.name)}{name}.{f.name} is missing")
    return keys


def _checked_batches(
    keys: dict[str, Any], data: DataArguments, model_type: str, where: Callable[[str, str], str]
) -> dict[str, Any]:
    """The training section, with what follows from a stream; refuses what a budget or a stream would leave unused."""
    if keys.get("max_tokens_per_batch") is not None:
        for key in _WITHOUT_BUDGET:
            if key in keys:
                raise ValueError(
                    f"{where('training', key)}training.{key} and training.max_tokens_per_batch exclude each other"
                )
    if keys.get("packing") and model_type != "dragoman":
        raise ValueError(
            f"{where('training', 'packing')}training.packing is for models of type 'dragoman', not {model_type!r}, "
            "which would read on from one pair into the next"
        )
    if not data.streaming:
        return keys
    streaming = where("data", "streaming") + "data.streaming"
    if keys.get("max_steps", -1) < 1:
        raise ValueError(f"{streaming} needs training.max_steps: nobody knows how long a stream is")
    for key in _WITHOUT_STREAM:
        if key in keys:
            raise ValueError(f"{where('training', key)}training.{key} is of no use with data.streaming; leave it out")
    if data.max_source_length is None or data.max_target_length is None:
        raise ValueError(f"{streaming} needs data.max_source_length and data.max_target_length, which bound its memory")
    if data.both_directions:
        raise ValueError(f"{streaming} and data.both_directions exclude each other: write both directions to the files")
    if data.num_proc is not None:
        raise ValueError(f"{streaming} encodes while training: use training.dataloader_num_workers, not data.num_proc")
    keys = {"eval_strategy": "steps", "save_strategy": "steps"} | keys
    for key in ("eval_strategy", "save_strategy"):
        if keys[key] == "epoch":
            raise ValueError(f"{where('training', key)}training.{key} is 'epoch', which a stream has not; use steps")
    return keys


def _check_parts(parts: int, config: PreTrainedConfig, where: str) -> None:
    """Refuse tensor parallelism that would cut an attention head or the columns of an MLP unevenly."""
    if parts == 1:
        return
    name = f"{where}training.tensor_parallel_size"
    if config.model_type != "dragoman":
        raise ValueError(f"{name} is for models of type 'dragoman', not {config.model_type!r}; leave it out")
    for key in (f"{side}_{size}" for side in ("encoder", "decoder") for size in _CUT):
        if getattr(config, key) % parts:
            raise ValueError(f"{name} is {parts}, which must divide model.{key}, here {getattr(config, key)}")


def preset(name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a preset of configs/models, for example `preset("deep_shallow", d_model=256)`.

    Raises:
        ValueError: no such preset, an unknown field, or a combination that the configuration class refuses.
    """
    keys, _ = _read_preset(name, "")
    config_class = _config_class(keys["model_type"], f"preset {name}: ")
    for key in overrides:
        check_key(key, _config_keys(config_class), f"preset {name}: ")
    return _build_config({**keys, **overrides}, f"preset {name}")


def preset_names() -> list[str]:
    """The names of the presets that ship with the package."""
    return sorted(Path(entry.name).stem for entry in _presets_folder().iterdir() if entry.name.endswith(".yaml"))


def _presets_folder() -> Traversable:
    return resources.files("dragoman") / "configs" / "models"


def _recipe_of_preset(model: dict[str, Any]) -> dict[str, Any]:
    """What goes into the section `training` with the preset of a model section, if there is one."""
    name = model.get("preset")
    return _read_preset(name, "")[1] if name in preset_names() else {}


def _read_preset(name: str, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of the model, and those of `training` for which the model needs other values than the usual ones."""
    if name not in preset_names():
        names = preset_names()
        raise ValueError(f"{where}no preset {name!r}; the nearest is {nearest(name, names)!r}, all: {', '.join(names)}")
    keys = parse_mapping((_presets_folder() / f"{name}.yaml").read_text(encoding="utf-8"), f"preset {name}")
    return keys, keys.pop("training", {})


def _config_class(model_type: Any, where: str) -> type[PreTrainedConfig]:
    if model_type not in CONFIG_MAPPING:
        closest = nearest(str(model_type), ["dragoman", "dragoman_rnn"])
        raise ValueError(f"{where}unknown model.model_type {model_type!r}; did you mean {closest!r}?")
    return CONFIG_MAPPING[model_type]


def _config_keys(config_class: type[PreTrainedConfig]) -> list[str]:
    # A @strict configuration refuses wrong types but takes unknown keywords as attributes: the keys are checked here.
    return [f.name for f in dataclasses.fields(config_class)] + list(config_class.attribute_map)


def _build_config(keys: dict[str, Any], where: str, **more: Any) -> PreTrainedConfig:
    values = {key: value for key, value in keys.items() if key not in ("model_type", "from_pretrained")}
    if "from_pretrained" in keys:
        saved, _ = PreTrainedConfig.get_config_dict(model_folder(keys["from_pretrained"]))
        values = {**saved, **values}
    try:
        return CONFIG_MAPPING[keys["model_type"]](**values, **more)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{where}: {one_line(error.__cause__ or error)}") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    if existing_path(path).is_dir():
        raise ValueError(f"{path} is a folder: give the YAML file of an experiment")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 (byte {error.start + 1}); give a YAML file") from error
    return parse_mapping(text, str(path))
