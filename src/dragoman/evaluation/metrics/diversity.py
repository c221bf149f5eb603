"""Diversity of generated text: distinct-n over all predictions and repetition inside each of them."""

import datasets
import evaluate

from .common import check_predictions, unicode_words


_DESCRIPTION = """
Two opposite faults of generation, measured without references. distinct-n (Li et al. 2016): different n-grams over all
predictions divided by all n-grams; low when a system says the same everywhere; it falls as the number of predictions
grows, so compare equal inputs. rep-n (Welleck et al. 2020; Su et al. 2022): 1 - different / all
n-grams *within* a text, for n = 2, 3, 4; high when a system loops. Here both counts are summed over the texts before
dividing, so that a long loop weighs by its length and texts shorter than n count nothing (Welleck et al. average the
rates of the texts). diversity = (1 - rep-2)(1 - rep-3)(1 - rep-4). Words are runs of letters and digits of any script,
single characters where a script has no spaces, and each other symbol.
"""

_CITATION = """
@inproceedings{li-etal-2016-diversity,
  title = {A Diversity-Promoting Objective Function for Neural Conversation Models},
  author = {Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  booktitle = {Proceedings of NAACL-HLT}, year = {2016}, pages = {110--119}, url = {https://aclanthology.org/N16-1014}}
@inproceedings{welleck2020unlikelihood, title = {Neural Text Generation With Unlikelihood Training},
  author = {Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and Weston, Jason},
  booktitle = {International Conference on Learning Representations}, year = {2020},
  url = {https://arxiv.org/abs/1908.04319}}
@inproceedings{su2022contrastive, title = {A Contrastive Framework for Neural Text Generation},
  author = {Su, Yixuan and Lan, Tian and Wang, Yan and Yogatama, Dani and Kong, Lingpeng and Collier, Nigel},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2022},
  url = {https://arxiv.org/abs/2202.06417}}
"""

_INPUTS = """
Args:
    predictions (`list[str]`): what the system wrote, one text a row.
    orders (`list[int]`): the n of distinct-n (default 1 and 2).
Returns:
    `distinct_1`, `distinct_2` (one per order), `rep_2`, `rep_3`, `rep_4`, `diversity`, all from 0 to 1; without any
    n-gram distinct-n and rep-n are 0.
Example:
    >>> diversity = load_metric("diversity")
    >>> diversity.compute(predictions=["no no no no", "sì"])["rep_2"]
    0.6666666666666667
"""


def _ngrams(words, n):
    return list(zip(*(words[i:] for i in range(n)), strict=False))


class Diversity(evaluate.Metric):
    """distinct-n, rep-n and their product."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=[
                "https://aclanthology.org/N16-1014",
                "https://arxiv.org/abs/1908.04319",
                "https://arxiv.org/abs/2202.06417",
            ],
        )

    def add_batch(self, *, predictions=None, references=None):
        """Add rows of predictions, checked to be strings; references may be given, and are not used."""
        check_predictions(predictions)
        super().add_batch(predictions=predictions)

    def _compute(self, *, predictions, orders=(1, 2)):
        for n in orders:
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"orders has {n!r}: each has to be a whole number of at least 1.")
        texts = [unicode_words(prediction, symbols=True) for prediction in predictions]
        scores = {}
        for n in orders:
            ngrams = [ngram for words in texts for ngram in _ngrams(words, n)]
            scores[f"distinct_{n}"] = len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        scores["diversity"] = 1.0
        for n in (2, 3, 4):
            per_text = [_ngrams(words, n) for words in texts]
            total = sum(map(len, per_text))
            scores[f"rep_{n}"] = 1 - sum(len(set(ngrams)) for ngrams in per_text) / total if total else 0.0
            scores["diversity"] *= 1 - scores[f"rep_{n}"]
        return scores
