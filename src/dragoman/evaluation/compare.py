"""Two systems on the same test set: is the difference between their scores more than chance?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich import box
from rich.table import Table
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest, _bootstrap_resample, estimate_ci

from dragoman.data.reading import read_lines
from dragoman.evaluation.metrics.common import reference_streams
from dragoman.evaluation.scores import check_metrics
from dragoman.inference.strategies import parse_spec
from dragoman.settings import did_you_mean


# The metrics of which sacreBLEU resamples the sufficient statistics.
PAIRED = {"bleu": BLEU, "chrf": CHRF, "ter": TER}
Reference = str | list[str]


@dataclass
class Difference:
    """Two systems under one metric.

    Attributes:
        metric: as it was asked for.
        scores: of A and of B, 0 to 100 (TER may pass 100).
        intervals: half the width of the 95 % confidence interval of each, by the same resamples.
        difference_interval: the same of the difference.
        p_value: chance of a difference at least this large between two systems that are equally good (two-sided).
        signature: what sacreBLEU computed, to be cited with the scores.
    """

    metric: str
    scores: tuple[float, float]
    intervals: tuple[float, float]
    difference_interval: float
    p_value: float
    signature: str

    @property
    def difference(self) -> float:
        """The score of B less that of A."""
        return self.scores[1] - self.scores[0]


def compare_predictions(
    a: str | Path,
    b: str | Path,
    references: str | Path | None = None,
    metrics: Sequence[str] = ("bleu", "chrf"),
    samples: int = 1000,
) -> list[Difference]:
    """Paired bootstrap resampling (Koehn 2004) of two files of predictions, by sacreBLEU.

    Args:
        a, b: files of predictions for the same sources: `.jsonl` with the keys `prediction` and `target` as
            `evaluate_model` writes them, or one prediction a line.
        references: a text file, one reference a line; needed where neither file holds its own.
        metrics: bleu, chrf, ter, each with options if wanted: `"bleu:tokenize=zh"`.
        samples: resampled test sets. Their random numbers are the same in every call (sacreBLEU's seed, 12345, or that
            of the environment variable SACREBLEU_SEED).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed file; files of different lengths or with different references; no references; another
            metric.
    """
    for spec in metrics:
        name = parse_spec(spec)[0]
        if name not in PAIRED:
            raise ValueError(f"no paired test of the metric {name!r}: {did_you_mean(name, list(PAIRED))}")
    check_metrics(metrics)
    files = [_read(Path(path)) for path in (a, b)]
    (first, references_a), (second, references_b) = files
    if len(first) != len(second):
        raise ValueError(
            f"{a} has {len(first)} predictions and {b} has {len(second)}: compare two of the same test set"
        )
    if references is not None:
        found: list[Reference] = list(read_lines(references))
        if len(found) != len(first):
            raise ValueError(f"{references} has {len(found)} references for {len(first)} predictions")
    elif references_a is None and references_b is None:
        raise ValueError(f"{a} and {b} hold no references: give a file of them (--references)")
    else:
        for row, pair in enumerate(zip(references_a or [], references_b or [], strict=False), start=1):
            if pair[0] != pair[1]:
                raise ValueError(f"the reference of prediction {row} is {pair[0]!r} in {a} but {pair[1]!r} in {b}")
        found = references_a or references_b or []
    return [compare_texts(first, second, found, spec, samples) for spec in metrics]


def compare_texts(
    a: list[str], b: list[str], references: list[Reference], metric: str = "chrf", samples: int = 1000
) -> Difference:
    """The same for texts in memory and one metric."""
    name, options = parse_spec(metric)
    scorer: Any = PAIRED[name](**options)
    streams = reference_streams(references)
    signatures, results = PairedTest([("A", a), ("B", b)], {name: scorer}, streams, "bs", samples)()
    (label,) = signatures
    first, second = cast(list[Any], results[label])
    # sacreBLEU's test keeps no interval of the difference; its resamples are the same in every call.
    statistics = (scorer._extract_corpus_statistics(texts, streams) for texts in (a, b))
    resampled = [_bootstrap_resample(one, scorer, samples)[1] for one in statistics]
    differences = np.array([other.score - one.score for one, other in zip(*resampled, strict=True)])
    return Difference(
        metric=metric,
        scores=(first.score, second.score),
        intervals=(first.ci, second.ci),
        difference_interval=estimate_ci(differences)[1],
        # Any two systems differ by at least nothing; sacreBLEU counts the resamples that differ by more.
        p_value=1.0 if first.score == second.score else second.p_value,
        signature=str(signatures[label]),
    )


def _read(path: Path) -> tuple[list[str], list[Reference] | None]:
    """Predictions, and their references where the file has them."""
    lines = list(read_lines(path))
    if not lines:
        raise ValueError(f"{path}: the file holds no predictions")
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return lines, None
    predictions, references = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            predictions.append(row["prediction"])
            references.append(row["target"])
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: expected an object with the keys 'prediction' and 'target'") from error
    return predictions, references


def difference_table(differences: Sequence[Difference]) -> Table:
    """The rows of `compare_predictions`; print it with `rich.print`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", overflow="fold")
    for column in ("A", "B", "B - A", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in differences:
        cells = [f"{score:.2f} ± {half:.2f}" for score, half in zip(one.scores, one.intervals, strict=True)]
        difference = f"{one.difference:+.2f} ± {one.difference_interval:.2f}"
        table.add_row(one.metric, *cells, difference, f"{one.p_value:.4f}")
    return table
