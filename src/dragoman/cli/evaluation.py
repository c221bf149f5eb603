"""`dragoman evaluate` and `compare`: scores on a test set, and whether they differ."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dragoman.cli.options import (
    ANY_OPTION,
    BatchSize,
    Device,
    Model,
    Pairs,
    Revision,
    SourcePrefix,
    TargetFile,
    TargetLang,
    generation_options,
)
from dragoman.cli.terminal import quiet_bars


commands = typer.Typer()


@commands.command(
    context_settings=ANY_OPTION,
    short_help="Score a model on a test set, under one or more decoding strategies.",
    epilog="""\b
Examples:
  dragoman evaluate runs/quickstart embedded:tiny_en_it/test
  dragoman evaluate runs/quickstart test.tsv --strategy greedy --strategy beam:num_beams=8
  dragoman evaluate runs/quickstart test.en --target test.it --metric bleu --metric ter""",
)
def evaluate(
    context: typer.Context,
    model: Model,
    data: Pairs,
    target: TargetFile = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="greedy, beam, sampling, contrastive, or changed: beam:num_beams=8; repeat to compare.",
            show_default="as the model was saved",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="bleu, chrf, ter, rouge, wer, ..., or bleu:tokenize=zh; repeat for more.",
            show_default="bleu, chrf, diversity",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the predictions and scores.json.",
            show_default="MODEL/evaluation, or evaluation/ORG--NAME for a name on the Hub",
        ),
    ] = None,
    references_column: Annotated[str, typer.Option(help="Column to score against.")] = "target",
    source_lang: Annotated[
        str | None, typer.Option(help="Code of the language, for rows without such a column.")
    ] = None,
    target_lang: TargetLang = None,
    source_prefix: SourcePrefix = None,
    batch_size: BatchSize = 32,
    revision: Revision = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
) -> None:
    """Translate a data set, write the predictions and their scores, and print the table of the strategies.

    The arguments of generate() listed below hold for all strategies: --max-new-tokens 80.
    """
    from rich.console import Console

    from dragoman.evaluation.run import comparison_table, evaluate_model

    options = generation_options(context)
    quiet_bars()
    is_local = (Path(model) / "config.json").is_file()
    folder = output or (Path(model) / "evaluation" if is_local else Path("evaluation", model.replace("/", "--")))
    chosen: dict[str, Any] = {"strategies": strategy, "metrics": metric}
    report = evaluate_model(
        model,
        data if target is None else [data, target],
        folder,
        references_column=references_column,
        source_lang=source_lang,
        target_lang=target_lang,
        source_prefix=source_prefix,
        batch_size=batch_size,
        seed=seed,
        revision=revision,
        device=device,
        progress=sys.stderr.isatty(),
        **{name: names for name, names in chosen.items() if names},
        **options,
    )
    Console().print(comparison_table(report))
    print(f"Predictions and scores.json are in {folder}")


@commands.command(
    short_help="Test whether the scores of two systems differ by more than chance.",
    epilog="""\b
Examples:
  dragoman compare a/predictions.default.jsonl b/predictions.default.jsonl
  dragoman compare a.txt b.txt --references test.it --metric bleu --metric ter""",
)
def compare(
    a: Annotated[Path, typer.Argument(help="Predictions of one system.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Predictions of another, for the same sources.", metavar="B")],
    references: Annotated[
        Path | None, typer.Option(help="Text file, one reference a line; for predictions that are plain text.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="bleu, chrf, ter, or bleu:tokenize=zh; repeat for more.", show_default="bleu, chrf"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Test sets drawn from the given one.")] = 1000,
) -> None:
    """Compare two files of predictions by paired bootstrap resampling (Koehn 2004), by sacreBLEU.

    The files are predictions.*.jsonl, which "dragoman evaluate" writes, or plain text with one prediction a line. A
    small p says that a difference like this hardly comes about by the choice of the test sentences.
    """
    from rich.console import Console

    from dragoman.evaluation.compare import compare_predictions, difference_table

    chosen: dict[str, Any] = {"metrics": metric} if metric else {}
    differences = compare_predictions(a, b, references, samples=samples, **chosen)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"A: {a}\nB: {b}")
    console.print(difference_table(differences))
    console.print("\n".join(f"{one.metric}: {one.signature}" for one in differences))
