"""Metrics by name, several at once, and the trainer's `compute_metrics`."""

import jiwer
import numpy as np
import pytest
import sacrebleu
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments

from dragoman.data.collators import Seq2SeqCollator
from dragoman.evaluation import build_compute_metrics, compute_scores, headline, load_metric
from inference.tiny import PAIRS, TARGETS, learned_by_heart


PREDICTIONS = ["你好 世界", "il gatto dorme qui"]
REFERENCES = ["你好世界", "il gatto dorme lì"]


def test_several_metrics_with_options():
    scores = compute_scores(PREDICTIONS, REFERENCES, ["bleu:tokenize=zh,lowercase=true", "chrf:word_order=2", "wer"])
    assert list(scores) == ["bleu", "chrf", "wer"]
    direct = sacrebleu.metrics.BLEU(tokenize="zh", lowercase=True)
    assert scores["bleu"]["bleu"] == direct.corpus_score(PREDICTIONS, [REFERENCES]).score
    assert scores["bleu"]["signature"] == str(direct.get_signature())
    assert scores["chrf"]["chrf"] == sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES], word_order=2).score
    assert scores["wer"]["wer"] == jiwer.wer(REFERENCES, PREDICTIONS)


def test_one_metric_twice():
    scores = compute_scores(
        PREDICTIONS,
        REFERENCES,
        ["bleu", "bleu:tokenize=char", "rouge:rouge_types=[rouge1,rouge3]", "diversity:orders=[3]"],
    )
    assert list(scores) == ["bleu", "bleu:tokenize=char", "rouge", "diversity"]
    figures = headline(scores)
    assert list(figures) == ["bleu", "bleu:tokenize=char", "rouge1", "rep_2", "diversity"]
    assert figures["bleu"] == scores["bleu"]["bleu"] != figures["bleu:tokenize=char"]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            "blue",
            "there is no metric 'blue': did you mean 'bleu'? Valid: bleu, cer, chrf, diversity, exact_match, rouge, ",
        ),
        (
            "bleu:tokenise=zh",
            "metric 'bleu' has no option 'tokenise': did you mean 'tokenize'? Valid: effective_order, ",
        ),
        ("wer:lowercase=true", "metric 'wer' has no option 'lowercase': it takes none."),
        ("bleu:tokenize=[zh", "'bleu:tokenize=[zh': a value is no valid YAML."),
        ("bleu:tokenize", "'bleu:tokenize': the option 'tokenize' has to be written key=value."),
    ],
)
def test_mistakes_in_a_metric(spec, sentence):
    with pytest.raises(ValueError) as caught:
        compute_scores(PREDICTIONS, REFERENCES, ["chrf", spec])
    assert str(caught.value).startswith(sentence)


def test_load_metric_names_the_nearest():
    with pytest.raises(ValueError, match="there is no metric 'exactmatch': did you mean 'exact_match'"):
        load_metric("exactmatch")


@pytest.mark.parametrize("two_vocabularies", [False, True])
def test_compute_metrics_of_the_trainer(two_vocabularies, tmp_path):
    """Seq2SeqTrainer's own evaluation: ids padded in two ways go in, the figures of the texts come out."""
    model, processing_class = learned_by_heart(two_vocabularies)
    rows = [
        {
            "input_ids": processing_class(text=source)["input_ids"],
            "labels": processing_class(text_target=target)["input_ids"],
        }
        for source, target in PAIRS
    ]
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            str(tmp_path), predict_with_generate=True, per_device_eval_batch_size=3, report_to="none", use_cpu=True
        ),
        eval_dataset=rows,
        data_collator=Seq2SeqCollator(processing_class, model),
        processing_class=processing_class,
        compute_metrics=build_compute_metrics(processing_class, ["chrf", "exact_match", "wer"]),
    )
    figures = trainer.evaluate()
    assert figures["eval_exact_match"] == 1.0
    assert figures["eval_chrf"] == 100.0
    assert figures["eval_wer"] == 0.0
    # words of the targets and </s>
    assert figures["eval_gen_len"] == np.mean([len(target.split()) + 1 for target in TARGETS])


def test_compute_metrics_counts_what_is_wrong():
    _, tokenizer = learned_by_heart()
    ids = tokenizer(["il gatto dorme", "il cane", "sì"], padding=True, return_tensors="np").input_ids
    predictions = np.concatenate([np.zeros((3, 1), dtype=ids.dtype), ids], axis=1)  # the start token first
    labels = np.where(ids == tokenizer.pad_token_id, -100, ids)
    labels[1, 1] = tokenizer.convert_tokens_to_ids("gatto")
    predictions[2, 3:] = -100
    compute_metrics = build_compute_metrics(tokenizer, ["exact_match", "cer"])
    figures = compute_metrics(EvalPrediction(predictions=(predictions, None), label_ids=labels))
    assert figures["exact_match"] == pytest.approx(2 / 3)
    assert figures["cer"] == jiwer.cer(["il gatto dorme", "il gatto", "sì"], ["il gatto dorme", "il cane", "sì"])
    assert figures["gen_len"] == pytest.approx((4 + 3 + 2) / 3)


def test_compute_metrics_refuses_unknown_names_before_training():
    _, tokenizer = learned_by_heart()
    with pytest.raises(ValueError, match="there is no metric 'belu': did you mean 'bleu'"):
        build_compute_metrics(tokenizer, ["chrf", "belu"])
