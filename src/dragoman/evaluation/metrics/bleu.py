"""BLEU by sacreBLEU, with the signature that says how it was computed."""

import evaluate
from sacrebleu.metrics import BLEU

from .common import INPUTS, TEXT_FEATURES, TextMetric, reference_streams


_DESCRIPTION = """
BLEU (Papineni et al. 2002): clipped precision of 1- to 4-grams, geometric mean, brevity penalty; computed by sacreBLEU
(Post 2018) on detokenized text, so that figures with equal signatures can be compared between papers.
"""

_CITATION = """
@inproceedings{post-2018-call, title = {A Call for Clarity in Reporting {BLEU} Scores}, author = {Post, Matt},
  booktitle = {Proceedings of the Third Conference on Machine Translation: Research Papers}, year = {2018},
  pages = {186--191}, url = {https://aclanthology.org/W18-6319}}
@inproceedings{papineni-etal-2002-bleu, title = {{B}leu: a Method for Automatic Evaluation of Machine Translation},
  author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing}, booktitle = {Proceedings of ACL},
  year = {2002}, pages = {311--318}, url = {https://aclanthology.org/P02-1040}}
"""

_INPUTS = f"""{INPUTS}
    tokenize (`str`): how sacreBLEU splits both sides into words: "13a" (default; languages with spaces), "intl", "zh"
        (Chinese), "char", "none" (already tokenized); "ja-mecab" and "ko-mecab" need sacreBLEU's extras; "spm",
        "flores101", "flores200" and "spBLEU-1K" need sentencepiece and download their model once.
    lowercase (`bool`): compare without case (default False).
    smooth_method (`str`): "exp" (default), "floor", "add-k" or "none"; `smooth_value` for floor and add-k.
    effective_order (`bool`): leave out orders without a match, for single sentences (default False).
Returns:
    `bleu` (0 to 100), `precisions` (of 1- to 4-grams, 0 to 100), `brevity_penalty`, `system_length` and
    `reference_length` in words, `signature`.
Example:
    >>> bleu = load_metric("bleu")
    >>> bleu.compute(predictions=["il gatto dorme"], references=["il gatto dorme"], effective_order=True)["bleu"]
    100.00000000000004
"""


class Bleu(TextMetric):
    """BLEU by sacreBLEU."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=TEXT_FEATURES,
            codebase_urls=["https://github.com/mjpost/sacrebleu"],
            reference_urls=["https://aclanthology.org/W18-6319", "https://aclanthology.org/P02-1040"],
        )

    def _compute(
        self,
        *,
        predictions,
        references,
        tokenize="13a",
        lowercase=False,
        smooth_method="exp",
        smooth_value=None,
        effective_order=False,
    ):
        if tokenize not in BLEU.TOKENIZERS:
            raise ValueError(f"tokenize={tokenize!r} is no tokenizer of sacreBLEU: use {', '.join(BLEU.TOKENIZERS)}.")
        if smooth_method not in BLEU.SMOOTH_DEFAULTS:
            raise ValueError(f"smooth_method={smooth_method!r} is unknown: use {', '.join(BLEU.SMOOTH_DEFAULTS)}.")
        try:
            metric = BLEU(
                lowercase=lowercase,
                tokenize=tokenize,
                smooth_method=smooth_method,
                smooth_value=smooth_value,
                effective_order=effective_order,
            )
        except (ImportError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"tokenize={tokenize!r} cannot be used on this machine: {reason}") from error
        score = metric.corpus_score(list(predictions), reference_streams(references))
        return {
            "bleu": score.score,
            "precisions": score.precisions,
            "brevity_penalty": score.bp,
            "system_length": score.sys_len,
            "reference_length": score.ref_len,
            "signature": str(metric.get_signature()),
        }
