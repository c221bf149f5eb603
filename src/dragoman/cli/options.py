"""Options that several commands have, and those of `generate()`, which some take beside their own."""

from pathlib import Path
from typing import Annotated, Any

import typer


ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}

Model = Annotated[str, typer.Argument(help="Folder of a trained model, or its name on the Hub.")]
Models = Annotated[list[str], typer.Argument(help="Folders of trained models, or their names on the Hub.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.", show_default="its main branch")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sentences decoded together.")]
Pairs = Annotated[str, typer.Argument(help="Pairs: .jsonl, .tsv, embedded:NAME/SPLIT, or a text file of sources.")]
TargetFile = Annotated[Path | None, typer.Option(help="With a text file of sources: that of the targets.")]
SourceLang = Annotated[str | None, typer.Option(help="Code of a model with many languages: it, ita_Latn.")]
TargetLang = Annotated[str | None, typer.Option(help="The same for the output.")]
SourcePrefix = Annotated[
    str | None, typer.Option(help="Text before every source, as for T5.", show_default="as the model was trained")
]


def generation_options(context: typer.Context) -> dict[str, Any]:
    """The arguments of `generate()` among the words that are none of the command's own (`ANY_OPTION`).

    Raises:
        ValueError: as `parse_generation_options`.
    """
    from dragoman.inference.arguments import parse_generation_options

    own_options = [name for parameter in context.command.params for name in parameter.opts]
    return parse_generation_options(context.args, own_options).given()
