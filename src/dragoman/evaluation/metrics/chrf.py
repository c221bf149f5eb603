"""chrF and chrF++ by sacreBLEU, with the signature that says how it was computed."""

import evaluate
from sacrebleu.metrics import CHRF

from .common import INPUTS, TEXT_FEATURES, TextMetric, reference_streams


_DESCRIPTION = """
chrF (Popović 2015): F-score of character 1- to 6-grams, recall weighing twice as much as precision; no tokenizer, so it
suits every language. With `word_order=2` it is chrF++ (Popović 2017), which adds words and pairs of words.
"""

_CITATION = """
@inproceedings{popovic-2015-chrf, title = {chr{F}: character n-gram {F}-score for automatic {MT} evaluation},
  author = {Popovi{\\'c}, Maja}, booktitle = {Proceedings of the Tenth Workshop on Statistical Machine Translation},
  year = {2015}, pages = {392--395}, url = {https://aclanthology.org/W15-3049}}
@inproceedings{popovic-2017-chrf, title = {chr{F}++: words helping character n-grams}, author = {Popovi{\\'c}, Maja},
  booktitle = {Proceedings of the Second Conference on Machine Translation}, year = {2017}, pages = {612--618},
  url = {https://aclanthology.org/W17-4770}}
"""

_INPUTS = f"""{INPUTS}
    char_order (`int`): longest character n-gram (default 6).
    word_order (`int`): longest word n-gram: 0 (default) is chrF, 2 is chrF++.
    beta (`int`): weight of recall against precision (default 2).
    lowercase (`bool`): compare without case (default False).
    whitespace (`bool`): let character n-grams run across spaces (default False).
Returns:
    `chrf` (0 to 100), `signature`.
Example:
    >>> chrf = load_metric("chrf")
    >>> chrf.compute(predictions=["il gatto dorme"], references=["il gatto dorme"])["chrf"]
    100.0
"""


class Chrf(TextMetric):
    """chrF and chrF++ by sacreBLEU."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=TEXT_FEATURES,
            codebase_urls=["https://github.com/mjpost/sacrebleu", "https://github.com/m-popovic/chrF"],
            reference_urls=["https://aclanthology.org/W15-3049", "https://aclanthology.org/W17-4770"],
        )

    def _compute(
        self, *, predictions, references, char_order=6, word_order=0, beta=2, lowercase=False, whitespace=False
    ):
        if char_order < 1 or word_order < 0 or beta <= 0:
            raise ValueError(
                f"char_order={char_order}, word_order={word_order}, beta={beta}: "
                "char_order has to be at least 1, word_order at least 0 and beta more than 0."
            )
        metric = CHRF(
            char_order=char_order, word_order=word_order, beta=beta, lowercase=lowercase, whitespace=whitespace
        )
        score = metric.corpus_score(list(predictions), reference_streams(references))
        return {"chrf": score.score, "signature": str(metric.get_signature())}
