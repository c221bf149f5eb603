"""The baseline of summarization: the first words of each text as its summary, and its ROUGE.

python scripts/lead_words.py data/debian_summary/test.jsonl.gz --words 10
"""

from typing import Annotated

import typer

from dragoman.data.reading import read_pairs
from dragoman.evaluation.scores import compute_scores, headline


def main(
    data: Annotated[str, typer.Argument(help="Pairs, as `dragoman evaluate` takes them.")],
    words: Annotated[int, typer.Option(min=1, help="Words of a summary.")] = 10,
) -> None:
    """Score the first words of the sources of a test set against its targets."""
    pairs = read_pairs(data)
    leads = [" ".join(source.split()[:words]) for source in pairs["source"]]
    for name, value in headline(compute_scores(leads, pairs["target"][:], ["rouge"])).items():
        typer.echo(f"{name}: {value:.4f}")


if __name__ == "__main__":
    typer.run(main)
