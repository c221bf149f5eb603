"""Word error rate by jiwer, also with several accepted references a row."""

import evaluate
import jiwer

from .common import INPUTS, TEXT_FEATURES, TextMetric, error_rate


_DESCRIPTION = """
Word error rate: substitutions, deletions and insertions per reference word, summed over all rows before dividing; words
are what spaces separate. Over texts of phonemes ("R EH D") it is the phoneme error rate of grapheme-to-phoneme
conversion, and `sequence_error_rate` is that task's word error rate. With several accepted references the one with the
fewest edits counts, as usual for pronunciations (Yao and Zweig 2015); the longer one if two are as close.
"""

_CITATION = """
@inproceedings{yao-zweig-2015-g2p, title = {Sequence-to-sequence neural net models for grapheme-to-phoneme conversion},
  author = {Yao, Kaisheng and Zweig, Geoffrey}, booktitle = {Proceedings of Interspeech}, year = {2015},
  url = {https://arxiv.org/abs/1506.00196}}
"""

_INPUTS = f"""{INPUTS}
Returns:
    `wer` (0 is perfect; may pass 1), `sequence_error_rate` (share of rows that no accepted reference matches, 0 to 1),
    `substitutions`, `deletions`, `insertions`, `hits` in words.
Example:
    >>> wer = load_metric("wer")
    >>> wer.compute(predictions=["R EH T"], references=[["R IY D", "R EH D"]])["wer"]
    0.3333333333333333
"""


class Wer(TextMetric):
    """Word error rate by jiwer."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=TEXT_FEATURES,
            codebase_urls=["https://github.com/jitsi/jiwer"],
            reference_urls=["https://arxiv.org/abs/1506.00196"],
        )

    def _compute(self, *, predictions, references):
        return error_rate("wer", jiwer.process_words, predictions, references)
