"""ROUGE by rouge-score, with a tokenizer that keeps accents and non-Latin scripts."""

import evaluate
from rouge_score import rouge_scorer, tokenizers

from .common import INPUTS, TEXT_FEATURES, TextMetric, reference_lists, unicode_words


_DESCRIPTION = """
ROUGE (Lin 2004): F-score of shared n-grams (rouge1, rouge2) or of the longest common subsequence (rougeL; rougeLsum by
lines), averaged over the rows. The tokenizer of rouge-score throws away every letter outside a-z, so "perché" becomes
"perch" and a Chinese text becomes empty; the default here keeps letters of all scripts, and on plain ASCII text both
give the same numbers.
"""

_CITATION = """
@inproceedings{lin-2004-rouge, title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew}, booktitle = {Text Summarization Branches Out}, year = {2004}, pages = {74--81},
  url = {https://aclanthology.org/W04-1013}}
"""

_INPUTS = f"""{INPUTS}
    rouge_types (`list[str]`): of "rouge1" to "rouge9", "rougeL", "rougeLsum" (default rouge1, rouge2, rougeL and
        rougeLsum).
    tokenize (`str`): "unicode" (default; letters of all scripts, one word per character for scripts without spaces) or
        "ascii" (rouge-score's own, for figures comparable with English papers).
    use_stemmer (`bool`): Porter stemmer, English only, with tokenize="ascii" (default False).
Returns:
    one F-score (0 to 1) per type; with several references the best one of the row counts.
Example:
    >>> rouge = load_metric("rouge")
    >>> rouge.compute(predictions=["perché no"], references=["perché sì"])["rouge1"]
    0.5
"""

_VALID_TYPES = [*(f"rouge{n}" for n in range(1, 10)), "rougeL", "rougeLsum"]


class UnicodeWords(tokenizers.Tokenizer):
    """Lower-cased words of any script, for rouge-score."""

    def tokenize(self, text):
        return unicode_words(text.lower())


class Rouge(TextMetric):
    """ROUGE by rouge-score."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=TEXT_FEATURES,
            codebase_urls=["https://github.com/google-research/google-research/tree/master/rouge"],
            reference_urls=["https://aclanthology.org/W04-1013"],
        )

    def _compute(
        self,
        *,
        predictions,
        references,
        rouge_types=("rouge1", "rouge2", "rougeL", "rougeLsum"),
        tokenize="unicode",
        use_stemmer=False,
    ):
        if tokenize not in ("unicode", "ascii"):
            raise ValueError(f"tokenize={tokenize!r} is unknown: use unicode or ascii.")
        if use_stemmer and tokenize != "ascii":
            raise ValueError("use_stemmer=True stems English words: it needs tokenize='ascii'.")
        for rouge_type in rouge_types:
            if rouge_type not in _VALID_TYPES:
                raise ValueError(f"rouge_types has {rouge_type!r}, which is unknown: use {', '.join(_VALID_TYPES)}.")
        scorer = rouge_scorer.RougeScorer(
            list(rouge_types), use_stemmer=use_stemmer, tokenizer=UnicodeWords() if tokenize == "unicode" else None
        )
        rows = [
            scorer.score_multi(row, prediction)
            for row, prediction in zip(reference_lists(references), predictions, strict=True)
        ]
        return {name: float(sum(row[name].fmeasure for row in rows) / len(rows)) for name in rouge_types}
