"""The `dragoman` command: parse, call, nothing else. A file for the commands of each folder of the package.

A mistake of the user's is one sentence on standard error and exit status 2; Ctrl-C ends with 130.
"""

from typing import Annotated

import typer

from dragoman.cli import apps, checkpoints, evaluation, inference, training
from dragoman.cli.terminal import Commands
from dragoman_command import print_versions


def _show_version(wanted: bool) -> None:
    if wanted:
        print_versions()
        raise typer.Exit()


app = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(
    invoke_without_command=True,
    epilog="""\b
Examples:
  dragoman train configs/quickstart.yaml
  echo "Open the settings page" | dragoman generate runs/quickstart

"dragoman COMMAND --help" explains a command. Mistakes are answered in one
sentence and with exit status 2.""",
)
def dragoman(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Versions of dragoman, transformers and torch."
        ),
    ] = False,
) -> None:
    """Train, use and score encoder-decoder models: translation, summarization, dialogue, text to text."""
    if context.invoked_subcommand is None:
        print(context.get_help())


for group in (training, inference, evaluation, apps, checkpoints):
    app.add_typer(group.commands)


def main() -> None:
    """The `dragoman` command; its entry point is dragoman_command.py."""
    app(prog_name="dragoman")  # also where `python -m dragoman` or a launcher started it
