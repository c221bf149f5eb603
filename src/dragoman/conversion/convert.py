"""A checkpoint of another encoder-decoder class of Transformers becomes a Dragoman checkpoint."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from dragoman.conversion.checkpoint import Origin, StoredWeights, write
from dragoman.conversion.families import family_of
from dragoman.conversion.family import Family
from dragoman.files import check_new_folder, new_folder
from dragoman.inference.loading import model_folder
from dragoman.models.configuration_dragoman import SIDES, DragomanConfig
from dragoman.models.modeling_dragoman import DragomanForConditionalGeneration
from dragoman.models.positions import SinusoidalPositions
from dragoman.settings import one_line


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "*.model", "*.spm")

SHARED, HEAD, HEAD_BIAS = "shared.weight", "lm_head.weight", "final_logits_bias"
TABLES = {side: f"{side}.embed_tokens.weight" for side in SIDES}


@dataclass(frozen=True)
class Conversion:
    """What was made of what: a folder, from a model of this `model_type`, with or without a tokenizer."""

    folder: Path
    model_type: str
    parameters: int
    has_tokenizer: bool


def convert(
    source: str | Path, output: str | Path, *, dtype: str | None = None, revision: str | None = None
) -> Conversion:
    """
    Writes a checkpoint of Marian, BART, mBART, Pegasus, BlenderBot, M2M100, NLLB, T5 or mT5 as a Dragoman checkpoint:
    weights, configuration, generation settings, tokenizer, modeling code and model card. The result computes the same
    logits. No code of the checkpoint's is run, and at most one shard is in memory.

    Args:
        source: folder of the checkpoint, or its name on the Hub; the weights are safetensors files.
        output: folder to write, new or empty. It appears when all of it is written.
        dtype: what to store the weights as: `float32`, `bfloat16`, `float16` or `float64`; None as they are.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: no such checkpoint, or it lacks its config or its weights.
        ValueError: the checkpoint cannot be expressed, with the reason, or weights are missing or left over, all of
            them named; an output folder in use; an unknown dtype.
    """
    output = Path(output).expanduser()
    check_new_folder(output)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES)}.")
    folder = model_folder(source, revision)
    written_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = family_of(written_config, str(source))
    theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    stored = StoredWeights(folder)
    try:
        config = _config(family.settings(theirs), stored)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{source} cannot be converted: {one_line(error.__cause__ or error)}") from error
    with torch.device("meta"):
        model = DragomanForConditionalGeneration(config)
    origins = _origins(model, family.modules(theirs), family.position_rows_before_first, stored)
    problems = _problems(model, origins, stored, family)
    if problems:
        raise ValueError(f"{source} cannot be converted as {theirs['model_type']!r}: {'; '.join(problems)}.")

    with new_folder(output) as partial:
        write(partial, origins, stored, DTYPES[dtype] if dtype else None)
        config.architectures = [type(model).__name__]
        config.dtype = dtype or str(stored.outline(origins["model.encoder.embed_tokens.weight"].name).dtype)[6:]
        custom_object_save(model, partial, config=cast(Any, config))
        config.save_pretrained(partial)
        _generation_config(folder, config).to_json_file(partial / "generation_config.json")
        has_tokenizer = any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern))
        if has_tokenizer:
            _load_tokenizer(folder, source).save_pretrained(partial)
        _write_model_card(partial, output.name, str(source), folder, theirs["model_type"])
    return Conversion(output, theirs["model_type"], model.num_parameters(), has_tokenizer)


def _config(settings: dict[str, Any], stored: StoredWeights) -> DragomanConfig:
    """The configuration, with the ties that the weights show, whatever the checkpoint's own says about them."""
    one_vocabulary = "source_vocab_size" not in settings
    tables = _token_tables(stored, one_vocabulary)

    def equal(one: str, other: str) -> bool:
        return tables[one] in stored and tables[other] in stored and stored.equal(tables[one], tables[other])

    return DragomanConfig(
        **settings,
        share_embeddings=one_vocabulary and equal("encoder", "decoder"),
        tie_lm_head=equal("head", "decoder"),
        lm_head_bias=HEAD_BIAS in stored and bool(stored.read(HEAD_BIAS).any()),
    )


def _token_tables(stored: StoredWeights, one_vocabulary: bool) -> dict[str, str]:
    """Names of the stored tables of encoder, decoder and output layer: their own, or one they are tied to."""
    ties = (SHARED, TABLES["decoder"], HEAD, TABLES["encoder"])
    candidates = {
        "encoder": (TABLES["encoder"], *(ties if one_vocabulary else ())),
        "decoder": (TABLES["decoder"], *(ties if one_vocabulary else (HEAD,))),
        "head": (HEAD, *(ties if one_vocabulary else (TABLES["decoder"],))),
    }
    return {part: next((name for name in names if name in stored), names[0]) for part, names in candidates.items()}


def _origins(
    model: DragomanForConditionalGeneration, modules: dict[str, str], rows_before_first: int, stored: StoredWeights
) -> dict[str, Origin]:
    """For every weight that the new checkpoint holds, the stored one it comes from, whether or not that is there."""
    tables = _token_tables(stored, model.config.source_vocab_size is None)
    special = {
        "model.encoder.embed_tokens.weight": Origin(tables["encoder"], _as_it_is),
        "model.decoder.embed_tokens.weight": Origin(tables["decoder"], _as_it_is),
        "lm_head.weight": Origin(tables["head"], _as_it_is),
        "lm_head.bias": Origin(HEAD_BIAS, torch.Tensor.flatten),
    }
    origins = {}
    for name in model.state_dict().keys() - model.all_tied_weights_keys.keys():
        if name in special:
            origins[name] = special[name]
            continue
        side, module, kind = _match(r"model\.(encoder|decoder)\.(.+)\.(weight|bias)", name)
        number = re.search(r"\d+", module)
        pattern = re.sub(r"\d+", "#", module)
        stored_module = modules[f"{side}.{pattern}" if f"{side}.{pattern}" in modules else pattern]
        stored_name = f"{side}.{stored_module.replace('#', number[0] if number else '')}.{kind}"
        change = _as_it_is
        if module == "embed_positions" and rows_before_first:
            change = _without_first_rows(rows_before_first)
        origins[name] = Origin(stored_name, change)
    return dict(sorted(origins.items()))


def _match(pattern: str, name: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, name)
    assert found, name
    return found.groups()


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _without_first_rows(count: int):
    return lambda tensor: tensor[count:]


def _problems(
    model: DragomanForConditionalGeneration, origins: dict[str, Origin], stored: StoredWeights, family: Family
) -> list[str]:
    """Everything that keeps these weights from being this model's, in words."""
    expected = model.state_dict()
    used = {origin.name for origin in origins.values()} | {*TABLES.values(), SHARED, HEAD, HEAD_BIAS}
    missing = sorted({origin.name for origin in origins.values() if origin.name not in stored})
    problems = [f"it lacks {', '.join(missing)}"] if missing else []
    for name, origin in origins.items():
        if origin.name in stored:
            outline = stored.outline(origin.name)
            found, wanted = tuple(origin.change(outline).shape), tuple(expected[name].shape)
            if found != wanted:
                problems.append(f"{origin.name} gives a shape of {found} where the configuration wants {wanted}")
            if not outline.is_floating_point():
                problems.append(f"{origin.name} holds {outline.dtype}, which are no weights as trained")
    left = [name for name in stored.names() if name not in used]
    left = [name for name in left if not any(re.fullmatch(pattern, name) for pattern in family.unused)]
    if family.stores_sinusoids:
        tables = {f"{side}.embed_positions.weight" for side in SIDES} & set(left)
        left = [name for name in left if name not in tables]
        for name in sorted(tables):
            if not _are_sinusoids(stored.read(name), model.config):
                problems.append(f"{name} holds other numbers than the sinusoids that its class computes")
    if left:
        problems.append(f"nothing in the model corresponds to {', '.join(sorted(left))}")
    return problems


def _are_sinusoids(table: torch.Tensor, config: DragomanConfig) -> bool:
    formula = SinusoidalPositions(config.d_model, config.sinusoid_layout)
    expected = formula(torch.arange(len(table))[None], torch.float32)[0]
    # They may be stored in half precision, which keeps three digits.
    return table.shape == expected.shape and torch.allclose(table.float(), expected, rtol=0, atol=1e-2)


def _generation_config(folder: Path, config: DragomanConfig) -> GenerationConfig:
    """Theirs, from a file of its own or, in old checkpoints, from config.json; and a length, if it has none."""
    if (folder / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(folder)
    else:
        settings = GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
    settings._from_model_config = False
    if settings.max_length is None and settings.max_new_tokens is None:
        settings.max_length = config.max_position_embeddings
    return settings


def _load_tokenizer(folder: Path, source: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"the tokenizer of {source} cannot be loaded (code of its own is never run here): {one_line(error)}"
        ) from error


def _write_model_card(output: Path, title: str, source: str, folder: Path, model_type: str) -> None:
    from_hub = not Path(source).expanduser().is_dir()
    header = ModelCardData(
        library_name="transformers",
        tags=["dragoman", "encoder-decoder"],
        base_model=source if from_hub else None,
    )
    origin = f"[{source}](https://huggingface.co/{source})" if from_hub else f"`{folder.resolve().name}`"
    sections = [
        f"# {title}",
        f"Converted with Dragoman from {origin}, a model of type `{model_type}`: the same weights under other names, "
        "the same outputs. What its card says about training data, license and limits holds here too.",
        "With the package installed, `import dragoman` makes `AutoModelForSeq2SeqLM.from_pretrained` load this folder; "
        "without it, pass `trust_remote_code=True`, and the modeling code beside the weights is used.",
    ]
    ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(output / "README.md")
