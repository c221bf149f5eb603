"""`dragoman train`."""

from pathlib import Path
from typing import Annotated

import typer

from dragoman.cli.terminal import quiet_bars


commands = typer.Typer()


@commands.command(
    short_help="Train a model from one YAML file.",
    epilog="""\b
Examples:
  dragoman train configs/quickstart.yaml
  dragoman train configs/quickstart.yaml training.seed=1 model.dropout=0.2
  dragoman train configs/quickstart.yaml --resume

\b
In several processes or on several GPUs, with the same arguments:
  accelerate launch -m dragoman train configs/quickstart.yaml""",
)
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file as in configs/, which explain their keys.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it: section.key=value, the value as in YAML.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what an earlier run left.")] = False,
) -> None:
    """Train a model from one YAML file: read the pairs, train the tokenizer and the model, test, save.

    The finished model is in training.output_dir: weights, tokenizer, settings, test scores and a model card. Ctrl-C
    saves and stops; --resume goes on from there.
    """
    from dragoman.training.arguments import load_experiment
    from dragoman.training.run import train as run

    quiet_bars()
    run(load_experiment(config, overrides or []), resume=resume, overwrite=overwrite)
