"""Character error rate by jiwer, also with several accepted references a row."""

import evaluate
import jiwer

from .common import INPUTS, TEXT_FEATURES, TextMetric, error_rate


_DESCRIPTION = """
Character error rate: substituted, deleted and inserted characters (Unicode code points, spaces included) per reference
character, summed over all rows before dividing. With several accepted references the one with the fewest edits counts;
the longer one if two are as close.
"""

_CITATION = """
@misc{jiwer, title = {{JiWER}: similarity measures for automatic speech recognition evaluation},
  author = {Vaessen, Nik}, url = {https://github.com/jitsi/jiwer}}
"""

_INPUTS = f"""{INPUTS}
Returns:
    `cer` (0 is perfect; may pass 1), `sequence_error_rate` (share of rows that no accepted reference matches, 0 to 1),
    `substitutions`, `deletions`, `insertions`, `hits` in characters.
Example:
    >>> cer = load_metric("cer")
    >>> cer.compute(predictions=["perche"], references=["perché"])["cer"]
    0.16666666666666666
"""


class Cer(TextMetric):
    """Character error rate by jiwer."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=TEXT_FEATURES,
            codebase_urls=["https://github.com/jitsi/jiwer"],
        )

    def _compute(self, *, predictions, references):
        return error_rate("cer", jiwer.process_characters, predictions, references)
