"""Paired bootstrap: what it finds in systems that differ or do not, and what it refuses."""

import json
import random

import numpy as np
import pytest
import sacrebleu

from dragoman.evaluation.compare import compare_predictions


WORDS = ["il", "gatto", "dorme", "sul", "tetto", "rosso", "della", "casa", "vecchia"]
REFERENCES = [" ".join(random.Random(row).choices(WORDS, k=5 + row % 4)) for row in range(60)]


def spoiled(share, seed):
    """The references with some words changed."""
    chance = random.Random(seed)
    return [
        " ".join("cane" if chance.random() < share else word for word in reference.split()) for reference in REFERENCES
    ]


def write(path, predictions, references=REFERENCES):
    if path.suffix == ".txt":
        path.write_text("".join(f"{line}\n" for line in predictions))
    else:
        rows = zip(predictions, references, strict=True)
        path.write_text("".join(json.dumps({"prediction": one, "target": other}) + "\n" for one, other in rows))
    return path


@pytest.fixture
def files(tmp_path):
    good, bad = spoiled(0.1, 1), spoiled(0.4, 2)
    return write(tmp_path / "a.jsonl", bad), write(tmp_path / "b.jsonl", good)


def test_a_better_system_is_found_better(files):
    bleu, chrf, ter = compare_predictions(*files, metrics=["bleu", "chrf:word_order=2", "ter"], samples=200)
    bad, good = spoiled(0.4, 2), spoiled(0.1, 1)
    assert bleu.scores == pytest.approx(
        [sacrebleu.corpus_bleu(texts, [REFERENCES]).score for texts in (bad, good)], abs=1e-9
    )
    assert chrf.scores == pytest.approx(
        [sacrebleu.corpus_chrf(texts, [REFERENCES], word_order=2).score for texts in (bad, good)], abs=1e-9
    )
    assert chrf.metric == "chrf:word_order=2"
    assert "nw:2" in chrf.signature
    assert "bs:200" in bleu.signature
    assert min(bleu.difference, chrf.difference, -ter.difference) > 5
    assert max(bleu.p_value, chrf.p_value, ter.p_value) < 0.01


def test_equally_good_systems_are_not_told_apart(tmp_path):
    a, b = write(tmp_path / "a.jsonl", spoiled(0.2, 3)), write(tmp_path / "b.jsonl", spoiled(0.2, 4))
    (chrf,) = compare_predictions(a, b, metrics=["chrf"], samples=200)
    assert chrf.p_value > 0.05
    # the interval covers what other draws from the same system score
    others = [sacrebleu.corpus_chrf(spoiled(0.2, seed), [REFERENCES]).score for seed in range(10, 20)]
    assert chrf.intervals[0] == pytest.approx(2 * np.std(others), rel=1.5)
    (same,) = compare_predictions(a, a, metrics=["chrf"], samples=50)
    assert (same.difference, same.difference_interval, same.p_value) == (0.0, 0.0, 1.0)


def test_the_interval_of_the_difference_is_that_of_pairs(tmp_path):
    """Resampled by hand. A system and the same with one word less differ, though their own intervals overlap."""
    first = spoiled(0.3, 3)
    second = [line.replace("cane", "", 1) for line in first]
    files = write(tmp_path / "a.txt", first), write(tmp_path / "b.jsonl", second)
    (chrf,) = compare_predictions(*files, metrics=["chrf"], samples=200)
    rows = np.random.default_rng(12345).choice(60, size=(200, 60))
    scores = np.array([
        [sacrebleu.corpus_chrf([texts[row] for row in of], [[REFERENCES[row] for row in of]]).score for of in rows]
        for texts in (first, second)
    ])  # fmt: skip
    low, high = np.quantile(scores[1] - scores[0], [0.025, 0.975])
    assert chrf.difference_interval == pytest.approx((high - low) / 2, rel=0.1)
    assert chrf.difference_interval < abs(chrf.difference) < sum(chrf.intervals)


def test_plain_text_with_references(files, tmp_path):
    texts = [write(tmp_path / name, spoiled(*how)) for name, how in (("a.txt", (0.4, 2)), ("b.txt", (0.1, 1)))]
    references = write(tmp_path / "references.txt", REFERENCES)
    expected = compare_predictions(*files, samples=50)
    assert compare_predictions(*texts, references, samples=50) == expected
    assert compare_predictions(files[0], texts[1], samples=50) == expected


def test_several_accepted_references(tmp_path):
    many = [[reference, "questa è un'altra frase"] for reference in REFERENCES]
    a = write(tmp_path / "a.jsonl", spoiled(0.2, 3), many)
    b = write(tmp_path / "b.jsonl", ["questa è un'altra frase"] * 60, many)
    (bleu,) = compare_predictions(a, b, metrics=["bleu"], samples=50)
    assert bleu.scores[1] == pytest.approx(100)


def test_what_cannot_be_compared_is_one_sentence(files, tmp_path):
    a, b = files
    short = write(tmp_path / "short.jsonl", ["x"], REFERENCES[:1])
    other = write(tmp_path / "other.jsonl", spoiled(0.1, 1), [*REFERENCES[:-1], "x"])
    text = write(tmp_path / "a.txt", REFERENCES)
    one = write(tmp_path / "one.txt", ["x"])
    empty = write(tmp_path / "empty.txt", [])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prediction": "x"}\n')
    for arguments, sentence in [
        ((a, short), f"{a} has 60 predictions and {short} has 1: compare two of the same test set"),
        ((a, other), f"the reference of prediction 60 is {REFERENCES[-1]!r} in {a} but 'x' in {other}"),
        ((text, text), f"{text} and {text} hold no references: give a file of them (--references)"),
        ((a, b, one), f"{one} has 1 references for 60 predictions"),
        ((empty, a), f"{empty}: the file holds no predictions"),
        ((broken, a), f"{broken}:1: expected an object with the keys 'prediction' and 'target'"),
        ((a, b, None, ["rouge"]), "no paired test of the metric 'rouge': Valid: bleu, chrf, ter."),
        ((a, b, None, ["bleu:tokenise=zh"]), "metric 'bleu' has no option 'tokenise'"),
    ]:
        with pytest.raises(ValueError) as error:
            compare_predictions(*arguments)
        assert str(error.value).startswith(sentence)
