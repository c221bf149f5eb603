"""Exact match: how many predictions equal one of their references."""

import evaluate

from .common import INPUTS, TEXT_FEATURES, TextMetric, reference_lists


_DESCRIPTION = """
Share of rows whose prediction equals one of the accepted references; spaces at the ends do not count.
"""

_INPUTS = f"""{INPUTS}
    ignore_case (`bool`): compare without case, by Unicode case folding (default False).
Returns:
    `exact_match` (0 to 1), `correct` and `total` in rows.
Example:
    >>> exact_match = load_metric("exact_match")
    >>> exact_match.compute(predictions=["R EH D"], references=[["R IY D", "R EH D"]])["exact_match"]
    1.0
"""


class ExactMatch(TextMetric):
    """Share of predictions that equal an accepted reference."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=TEXT_FEATURES
        )

    def _compute(self, *, predictions, references, ignore_case=False):
        def normal(text):
            return text.strip().casefold() if ignore_case else text.strip()

        correct = sum(
            normal(prediction) in {normal(text) for text in row}
            for prediction, row in zip(predictions, reference_lists(references), strict=True)
        )
        return {"exact_match": correct / len(predictions), "correct": correct, "total": len(predictions)}
