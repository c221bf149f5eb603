"""Translation edit rate by sacreBLEU, with the signature that says how it was computed."""

import evaluate
from sacrebleu.metrics import TER

from .common import INPUTS, TEXT_FEATURES, TextMetric, reference_streams


_DESCRIPTION = """
Translation edit rate (Snover et al. 2006): insertions, deletions, substitutions and shifts of word blocks that turn the
prediction into its closest reference, per 100 reference words (of the average reference). Lower is better.
"""

_CITATION = """
@inproceedings{snover-etal-2006-study, title = {A Study of Translation Edit Rate with Targeted Human Annotation},
  author = {Snover, Matthew and Dorr, Bonnie and Schwartz, Rich and Micciulla, Linnea and Makhoul, John},
  booktitle = {Proceedings of AMTA}, year = {2006}, pages = {223--231}, url = {https://aclanthology.org/2006.amta-papers.25}}
"""

_INPUTS = f"""{INPUTS}
    case_sensitive (`bool`): tell upper from lower case (default False, as in Tercom).
    normalized (`bool`): split off punctuation and undo XML escapes first (default False).
    no_punct (`bool`): remove punctuation (default False).
    asian_support (`bool`): with `normalized`, one Chinese or Japanese character is one word; with `no_punct`, remove
        their punctuation too (default False).
Returns:
    `ter` (0 is perfect; may pass 100), `num_edits`, `reference_length` (average words of the references), `signature`.
Example:
    >>> ter = load_metric("ter")
    >>> ter.compute(predictions=["il gatto dorme"], references=["il cane dorme"])["ter"]
    33.33333333333333
"""


class Ter(TextMetric):
    """Translation edit rate by sacreBLEU."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=TEXT_FEATURES,
            codebase_urls=["https://github.com/mjpost/sacrebleu", "https://github.com/jhclark/tercom"],
            reference_urls=["https://aclanthology.org/2006.amta-papers.25"],
        )

    def _compute(
        self, *, predictions, references, case_sensitive=False, normalized=False, no_punct=False, asian_support=False
    ):
        if asian_support and not (normalized or no_punct):
            raise ValueError("asian_support=True changes nothing alone: set normalized=True or no_punct=True with it.")
        metric = TER(
            case_sensitive=case_sensitive, normalized=normalized, no_punct=no_punct, asian_support=asian_support
        )
        score = metric.corpus_score(list(predictions), reference_streams(references))
        return {
            "ter": score.score,
            "num_edits": score.num_edits,
            "reference_length": score.ref_length,
            "signature": str(metric.get_signature()),
        }
