"""A trained model for other runtimes: CTranslate2, and ONNX."""

import logging
from importlib import import_module
from pathlib import Path

from dragoman.files import check_new_folder, new_folder
from dragoman.inference.loading import load


logger = logging.getLogger(__name__)

# What each one needs is imported when it is asked for, its own module last.
FORMATS = {
    "ctranslate2": ("ctranslate2", "dragoman.conversion.ctranslate2"),
    "onnx": ("onnx", "onnxruntime", "onnxscript", "dragoman.conversion.onnx"),
}


def export(
    model: str | Path,
    output: str | Path,
    *,
    format: str,
    quantization: str | None = None,
    revision: str | None = None,
) -> Path:
    """
    Writes a model for another runtime, with its tokenizer beside it. What it was saved with for decoding and the
    runtime does not hold is named in a warning.

    Args:
        model: folder of a saved model, or its name on the Hub.
        output: folder to write, new or empty. It appears when all of it is written.
        format: `ctranslate2`, or `onnx` (graphs, which `conversion/onnx.py` and `onnx_rnn.py` describe).
        quantization: of CTranslate2's weights, such as `int8`; None stores them as `float32`.
        revision: branch, tag or commit of a model on the Hub; None takes its main branch.

    Raises:
        FileNotFoundError: no such model.
        ValueError: an unknown format or quantization; an output folder in use; a missing package; a recurrent model for
            CTranslate2, or options that the runtime cannot express, all of them named.
    """
    output = Path(output).expanduser()
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: use {' or '.join(FORMATS)}.")
    check_new_folder(output)
    try:
        *_, runtime = (import_module(name) for name in FORMATS[format])
    except ImportError as error:
        raise ValueError(
            f"export to {format} needs {error.name}, which is not installed: pip install 'dragoman[export]'"
        ) from error
    if quantization is not None and quantization not in runtime.QUANTIZATIONS:
        raise ValueError(
            f"quantization {quantization!r} is unknown to {format}: use {', '.join(runtime.QUANTIZATIONS)}."
        )
    loaded, processing_class = load(model, "cpu", "float32", revision)
    families = ("dragoman",) if format == "ctranslate2" else ("dragoman", "dragoman_rnn")
    if loaded.config.model_type not in families:
        raise ValueError(
            f"{model} is of type {loaded.config.model_type!r}, but {format} takes only {' or '.join(families)}."
        )
    with new_folder(output) as partial:
        left_behind = runtime.write(partial, loaded, processing_class, quantization or "float32")
        processing_class.save_pretrained(partial)
    if left_behind:
        named = ", ".join(f"{name}={value!r}" for name, value in left_behind.items())
        logger.warning(f"{output} does not decode with all that the model was saved with: it does not hold {named}.")
    return output
