"""`dragoman convert`, `average`, `export` and `push`: a saved model becomes another one."""

from pathlib import Path
from typing import Annotated

import typer

from dragoman.cli.options import Model, Revision
from dragoman.cli.terminal import quiet_bars


commands = typer.Typer()


@commands.command(
    short_help="Convert a checkpoint of Marian, BART, T5 and others into a Dragoman model.",
    epilog="""\b
Examples:
  dragoman convert Helsinki-NLP/opus-mt-en-it runs/opus-en-it
  dragoman convert checkpoints/my-t5 runs/my-t5 --dtype bfloat16""",
)
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder of a Marian, BART, T5, ... checkpoint, or its name on the Hub.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Store weights as float32, bfloat16, float16 or float64.", show_default="as they are"),
    ] = None,
    revision: Revision = None,
) -> None:
    """Turn a checkpoint of Transformers' own seq2seq classes into a Dragoman checkpoint that computes the same."""
    from dragoman.conversion import convert as run

    quiet_bars()
    made = run(source, output, dtype=dtype, revision=revision)
    tokenizer = "and its tokenizer" if made.has_tokenizer else "without a tokenizer, since it has none"
    print(f"{source} ({made.model_type}, {made.parameters:,} parameters) {tokenizer}: now a Dragoman model in {output}")


@commands.command(
    short_help="Average checkpoints into one model.",
    epilog="""\b
Examples:
  dragoman average runs/quickstart runs/averaged
  dragoman average runs/quickstart runs/averaged --last 5
  dragoman average runs/a/checkpoint-900 runs/b/checkpoint-900 runs/averaged""",
)
def average(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Checkpoints, or runs, which stand for their complete checkpoints; then the folder to write.",
            metavar="CHECKPOINTS... OUTPUT",
        ),
    ],
    last: Annotated[int | None, typer.Option(min=2, help="Only the last so many of them.", show_default="all")] = None,
) -> None:
    """Write a model whose weights are the means of those of several checkpoints of one model.

    Everything else comes from the last of them. A run keeps as many checkpoints as training.save_total_limit says.
    """
    from dragoman.training.averaging import average_checkpoints

    quiet_bars()
    *sources, output = folders
    if not sources:
        raise ValueError(f"{output} is to be written, but from what? Give checkpoints, or a run, before it")
    averaged = average_checkpoints(sources, output, last)
    print(f"{output} is the average of {', '.join(map(str, averaged))}")


@commands.command(
    short_help="Write a model for CTranslate2 or ONNX.",
    epilog="""\b
Examples:
  dragoman export runs/quickstart runs/quickstart-ct2 --format ctranslate2 --quantization int8
  dragoman export runs/quickstart runs/quickstart-onnx --format onnx""",
)
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    format: Annotated[str, typer.Option(help="ctranslate2 or onnx.")],
    quantization: Annotated[
        str | None,
        typer.Option(help="Of ctranslate2: int8, int8_float32, int16, float16 and so on.", show_default="float32"),
    ] = None,
    revision: Revision = None,
) -> None:
    """Write a model and its tokenizer for another runtime: CTranslate2, or ONNX (onnxruntime).

    docs/export.md shows how to translate with them. Needs pip install 'dragoman[export]'.
    """
    from dragoman.conversion import export as run

    quiet_bars()
    folder = run(model, output, format=format, quantization=quantization, revision=revision)
    megabytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
    print(f"{model} is now a model for {format} in {folder}, {megabytes:.1f} MB")


@commands.command(
    short_help="Push a model to the Hub.",
    epilog="""\b
Examples:
  dragoman push runs/quickstart my-translator --private
  dragoman push runs/quickstart my-organization/my-translator --revision v2""",
)
def push(
    model: Annotated[Path, typer.Argument(help="Folder of a finished model.")],
    repository: Annotated[str, typer.Argument(help="Its name on the Hub: ORGANIZATION/NAME, or NAME for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if need be.", show_default="main")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.", show_default=False)] = None,
) -> None:
    """Push a model to the Hub: weights, tokenizer, modeling code, training YAML and a model card with its scores.

    Only files that differ from what is there travel. The token comes from HF_TOKEN or `hf auth login`.
    """
    from dragoman.training.push import push as run

    quiet_bars()
    commit = run(model, repository, private=private or None, revision=revision, message=message)
    print(f"{model} is now {commit.repo_url} at revision {commit.oid}")
