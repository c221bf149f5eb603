"""What the metric modules beside this file share: their inputs, the checks on them, and words of any script.

`evaluate.load(".../bleu.py")` copies a metric file together with the siblings it imports, so a metric folder works
wherever it lies. Only `evaluate`, `datasets` and `regex` may be imported here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import regex


# One reference per row, or several accepted ones (any count).
TEXT_FEATURES = [
    datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}),
    datasets.Features(
        {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
    ),
]

INPUTS = """
Args:
    predictions (`list[str]`): what the system wrote, one text a row.
    references (`list[str]` or `list[list[str]]`): the accepted texts of each row, one or any number of them.
"""

# Scripts that put no spaces between words: each character (with its marks) counts as one word.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_WORD = rf"{_UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--{_UNSPACED}]+"
_WORDS = regex.compile(_WORD, regex.V1)
_WORDS_AND_SYMBOLS = regex.compile(rf"{_WORD}|\S", regex.V1)


def unicode_words(text: str, symbols: bool = False) -> list[str]:
    """Words of a text in any script: runs of letters, marks and digits; single characters where a script has no spaces.

    Args:
        text: the text.
        symbols: also give every other visible character (punctuation, signs) as a word of its own.
    """
    return (_WORDS_AND_SYMBOLS if symbols else _WORDS).findall(text)


def reference_lists(references: list) -> list[list[str]]:
    """References as a list of accepted texts per row, whichever of the two input forms came."""
    return [[row] if isinstance(row, str) else list(row) for row in references]


def reference_streams(references: list) -> Any:
    """References turned as sacreBLEU wants them: stream k holds reference k of every row, None where there is none."""
    rows = reference_lists(references)
    return [[row[k] if k < len(row) else None for row in rows] for k in range(max(map(len, rows)))]


def check_predictions(predictions: Any) -> None:
    """Raise a ValueError unless there is at least one prediction and each is a text."""
    if predictions is None or len(predictions) == 0:
        raise ValueError("there are no predictions to score: give at least one row.")
    for i, prediction in enumerate(predictions):
        if not isinstance(prediction, str):
            raise ValueError(f"predictions[{i}] is {prediction!r}: each prediction has to be one string.")


def check_references(predictions: Any, references: Any) -> None:
    """Raise a ValueError unless every prediction has its row of references: a text or a non-empty list of texts."""
    if references is None:
        raise ValueError("there are no references: give one row of them for each prediction.")
    if len(predictions) != len(references):
        raise ValueError(
            f"there are {len(predictions)} predictions but {len(references)} rows of references: "
            "each prediction needs its own row."
        )
    for i, row in enumerate(references):
        texts = [row] if isinstance(row, str) else row
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"references[{i}] is {row!r}: a row is one string or a list of accepted strings.")
        if not texts:
            raise ValueError(f"references[{i}] is an empty list: each row needs at least one accepted string.")


class TextMetric(evaluate.Metric, ABC):
    """A metric over texts and their references, whose inputs are checked before anything is stored."""

    def add_batch(self, *, predictions=None, references=None):
        """Add rows of predictions and references, checked: equal counts, strings only, no empty row of references."""
        check_predictions(predictions)
        check_references(predictions, references)
        # evaluate infers the form of all rows from the first one, so rows of both forms have to be made alike.
        if not all(isinstance(row, str) for row in references):
            references = reference_lists(references)
        super().add_batch(predictions=predictions, references=references)

    @abstractmethod
    def _compute(self, *args, **kwargs):
        """Score the gathered `predictions` and `references`; further keyword arguments are the metric's own."""


def error_rate(name: str, process: Callable, predictions: list[str], references: list) -> dict[str, float]:
    """Edits per reference unit over all rows, each row against its closest reference.

    Args:
        name: key of the rate in the result.
        process: `jiwer.process_words` or `jiwer.process_characters`; they count edits in their unit.
        predictions: one text a row.
        references: one accepted text or a list of them a row.
    """

    def edits(output):
        return output.substitutions + output.deletions + output.insertions

    rows = []
    for prediction, accepted in zip(predictions, reference_lists(references), strict=True):
        outputs = [process(text, prediction) for text in accepted]
        rows.append(min(outputs, key=lambda output: (edits(output), -len(output.references[0]))))
    reference_length = sum(len(row.references[0]) for row in rows)
    if reference_length == 0:
        raise ValueError("every reference is empty: an error rate needs at least one that is not.")
    return {
        name: sum(map(edits, rows)) / reference_length,
        "sequence_error_rate": sum(edits(row) > 0 for row in rows) / len(rows),
        "substitutions": sum(row.substitutions for row in rows),
        "deletions": sum(row.deletions for row in rows),
        "insertions": sum(row.insertions for row in rows),
        "hits": sum(row.hits for row in rows),
    }
