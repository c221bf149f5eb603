"""From the folder of a saved model, or its name on the Hub, to a model that is ready to decode."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from dragoman.data.reading import similar_paths
from dragoman.data.tokenizers import ProcessingClass, load_tokenizer


# Of a model on the Hub: configurations, weights and the files of every kind of tokenizer, but no code.
_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.spm", "*.bpe", "*.jinja"]


def load(
    model: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, ProcessingClass]:
    """Load a model and its tokenizer, or its processor if it has two vocabularies, ready to decode.

    Args:
        model: folder of a saved model, or its name on the Hub (from the local cache when offline).
        device: "cpu", "cuda", "cuda:1", ...; None takes a GPU if there is one.
        dtype: "float32", "bfloat16", ...; None keeps what was saved.
        revision: branch, tag or commit of a model on the Hub; None takes its main branch.

    Raises:
        FileNotFoundError: no such folder or model, or the folder lacks the config, the weights or the tokenizer.
        ValueError: the model is no encoder-decoder; its weights or its tokenizer are damaged; the device or dtype does
            not exist; a revision of a folder.
    """
    target = _device(device)
    if isinstance(dtype, str):
        if not isinstance(torch.__dict__.get(dtype), torch.dtype):
            raise ValueError(f"dtype {dtype!r} is unknown: use float32, bfloat16 or float16.")
        dtype = torch.__dict__[dtype]
    folder = model_folder(model, revision)
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise FileNotFoundError(f"{folder} holds no weights (model.safetensors is missing).")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not config.is_encoder_decoder:
        raise ValueError(f"{folder} holds a model of type {config.model_type!r}, which is no encoder-decoder.")
    processing_class = load_tokenizer(folder)
    with one_sentence_for_damaged_weights(folder):
        loaded = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=False, dtype=dtype or "auto")
    return loaded.to(target).eval(), processing_class


@contextmanager
def one_sentence_for_damaged_weights(folder: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged or incomplete ({error}); copy them again") from error


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from error


def model_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a saved model: itself, or where its name on the Hub is downloaded to.

    Raises:
        FileNotFoundError: there is neither, it has no configuration, or the model on the Hub has no such revision.
        ValueError: a revision of a folder.
    """
    folder, name = Path(model).expanduser(), str(model)
    is_path = isinstance(model, Path) or name.count("/") > 1 or name.startswith((".", "/", "~"))
    if (folder / "config.json").is_file() or (folder.is_dir() and is_path):
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for a name on the Hub, but {folder} is a folder here.")
    elif folder.is_file():
        raise FileNotFoundError(f"{folder} is a file: give the folder of a saved model.")
    elif is_path:
        raise FileNotFoundError(
            f"{folder} does not exist: give the folder of a saved model, or its name on the Hub{_suggestion(folder)}"
        )
    else:
        folder = _downloaded(name, revision)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model (config.json is missing){_suggestion(folder)}")
    return folder


def _downloaded(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_MODEL_FILES))
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name!r} has no revision {revision!r} on the Hub.") from error
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            return Path(name)  # not a name but a folder that holds no model
        raise FileNotFoundError(
            f"{name!r} is no folder here and no model that the Hub or the local cache gives "
            f"({type(error).__name__}){_suggestion(Path(name))}"
        ) from error


def _suggestion(folder: Path) -> str:
    """The end of the sentence about a folder that is no model: those in it, or else those spelled like it."""
    inside = sorted((file.parent for file in folder.glob("*/config.json")), key=lambda path: path.stat().st_mtime)
    if inside:
        return f"; there are models in it: {', '.join(map(str, reversed(inside[-3:])))}"
    # A name alone is looked for where the configurations of configs/ put models, too.
    similar = similar_paths(folder) + ([] if folder.is_absolute() else similar_paths(Path("runs") / folder))
    models = list(dict.fromkeys(path for path in similar if path != folder and (path / "config.json").is_file()))
    return f"; did you mean {' or '.join(map(str, models[:3]))}?" if models else "."
