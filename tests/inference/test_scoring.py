"""Scores of given targets: against one pair at a time, against generate(), and for finding pairs that do not match."""

import random

import pytest
import torch
from datasets import Dataset

from conftest import V, family
from dragoman.data.tokenizers import train_tokenizer
from dragoman.inference import scoring
from dragoman.inference.scoring import score
from dragoman.models.processing_dragoman import DragomanProcessor
from inference.tiny import PAIRS, learned_by_heart


SENTENCES = [
    ("w1 w2 w3 w4 w5 w6", "w7"),
    ("w3", "w1 w4 w9 w11 w2"),
    ("w5 w1", "w8 w8"),
    ("w2 w2 w7", "w3 w1 w10"),
    ("w18 w17 w16 w15", "w14 w13 w12 w11"),
]


def dataset(pairs):
    sources, targets = zip(*pairs, strict=True)
    return Dataset.from_dict({"source": sources, "target": targets})


def word_tokenizer(size):
    return train_tokenizer([" ".join(f"w{number}" for number in range(size - 4))], "word")


@pytest.fixture
def tools(any_family):
    """A model with label smoothing and dropout, which must not show, and its tokenizer or processor."""
    model = any_family.build(dropout=0.5, label_smoothing=0.3).train()
    source_size = model.config.source_vocab_size or V
    if source_size == V:
        return model, word_tokenizer(V)
    return model, DragomanProcessor(word_tokenizer(source_size), word_tokenizer(V))


def one_by_one(model, processing_class, pairs):
    """The obvious way: no padding, no batches, one softmax a token."""
    model.eval()
    rows = []
    for source, target in pairs:
        source_ids = torch.tensor([processing_class(text=source)["input_ids"]])
        target_ids = processing_class(text_target=target)["input_ids"]
        values = []
        for position, token in enumerate(target_ids):
            before = torch.tensor([[model.config.decoder_start_token_id, *target_ids[:position]]])
            with torch.no_grad():
                logits = model(input_ids=source_ids, decoder_input_ids=before).logits[0, -1]
            values.append(logits.softmax(dim=-1)[token].log().item())
        rows.append(values)
    return rows


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_are_those_of_one_pair_at_a_time(tools, batch_size):
    model, processing_class = tools
    found = list(score(model, processing_class, dataset(SENTENCES), batch_size=batch_size, length_penalty=0.7))
    assert model.training
    for one, values, (_, target) in zip(found, one_by_one(*tools, SENTENCES), SENTENCES, strict=True):
        assert one.tokens == [*target.split(), "</s>"]
        assert one.token_log_probabilities == pytest.approx(values, abs=1e-9)
        assert one.log_probability == pytest.approx(sum(values), abs=1e-9)
        assert one.score == pytest.approx(sum(values) / len(values) ** 0.7, abs=1e-9)


def test_long_targets_make_smaller_batches(monkeypatch):
    tools = family("modern").build(), word_tokenizer(V)
    sizes = []
    forward = scoring._token_log_probabilities
    monkeypatch.setattr(
        scoring,
        "_token_log_probabilities",
        lambda model, batch: sizes.append(len(batch["labels"])) or forward(model, batch),
    )
    whole = list(score(*tools, dataset(SENTENCES)))
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 14 * V)
    parts = list(score(*tools, dataset(SENTENCES), window=4))
    assert sizes[0] == 5
    assert sizes[1:] == [2, 2, 1]
    assert [one.score for one in parts] == pytest.approx([one.score for one in whole], abs=1e-9)


@pytest.fixture(scope="module", params=[False, True], ids=["joint", "two vocabularies"])
def learned(request):
    return learned_by_heart(two_vocabularies=request.param)


@pytest.mark.parametrize("length_penalty", [None, 0.0, 1.6])
def test_scores_are_those_of_beam_search(learned, length_penalty):
    model, processing_class = learned
    arguments = {} if length_penalty is None else {"length_penalty": length_penalty}
    expected, rows = [], []
    for source, _ in PAIRS:
        inputs = processing_class(text=[source], return_tensors="pt")
        output = model.generate(
            **inputs, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True, **arguments
        )
        texts = processing_class.batch_decode(output.sequences, skip_special_tokens=True)
        for text, ids, value in zip(texts, output.sequences.tolist(), output.sequences_scores.tolist(), strict=True):
            encoded = processing_class(text_target=text)["input_ids"]
            if text and ids[1 : 1 + len(encoded)] == encoded:  # not one that was cut off, or holds a special token
                rows.append((source, text))
                expected.append(value)
    assert len(rows) > 12
    found = score(model, processing_class, dataset(rows), length_penalty=length_penalty)
    assert [one.score for one in found] == pytest.approx(expected, abs=1e-4)


def test_shuffled_targets_score_lower(learned):
    sources, targets = map(list, zip(*PAIRS, strict=True))
    random.Random(3).shuffle(targets)
    right = [one.score for one in score(*learned, dataset(PAIRS))]
    wrong = [one.score for one in score(*learned, dataset(list(zip(sources, targets, strict=True))))]
    moved = [position for position, (_, target) in enumerate(PAIRS) if target != targets[position]]
    assert len(moved) > 7
    assert min(right) > max(wrong[position] for position in moved) + 1


def test_the_model_own_length_penalty_counts(learned):
    model, processing_class = learned
    model.generation_config.length_penalty = 2.0
    try:
        (one,) = score(model, processing_class, dataset(PAIRS[:1]))
    finally:
        model.generation_config.length_penalty = None
    assert one.score == pytest.approx(one.log_probability / len(one.tokens) ** 2)


def test_what_cannot_be_scored_is_refused():
    model, tokenizer = family("learned").build(), word_tokenizer(V)
    with pytest.raises(ValueError, match=r"pair 2 \('w1' / ''\): the target is empty$"):
        score(model, tokenizer, dataset([("w1", "w2"), ("w1", "")]))
    with pytest.raises(ValueError, match="29"):
        list(score(model, tokenizer, dataset([("w1", " ".join(["w2"] * 40))])))
    with pytest.raises(ValueError, match="the tokenizer and the model do not belong together"):
        list(score(model, word_tokenizer(V + 5), dataset([(" ".join(f"w{number}" for number in range(V)), "w2")])))
