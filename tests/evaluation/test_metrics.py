"""The metric modules against sacreBLEU, jiwer and rouge-score called directly, and against values counted by hand."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import jiwer
import pytest
import sacrebleu
from rouge_score import rouge_scorer

import dragoman.evaluation.metrics
from dragoman.evaluation import METRICS, load_metric


FOLDER = Path(dragoman.evaluation.metrics.__file__).parent

PREDICTIONS = [
    "Il gatto dorme sul divano, vicino alla finestra.",
    "Perché no?",
    "La luna è piena questa notte.",
]
REFERENCES = [
    "Il gatto dorme sul divano vicino alla finestra.",
    "Perché mai?",
    "La luna, stanotte, è piena.",
]
# As many accepted texts a row as there happen to be.
SEVERAL = [
    [REFERENCES[0], "Il gatto sta dormendo sul divano."],
    [REFERENCES[1]],
    [REFERENCES[2], "Questa notte la luna è piena.", "La luna è piena questa notte!"],
]
STREAMS = [
    [row[0] for row in SEVERAL],
    [SEVERAL[0][1], None, SEVERAL[2][1]],
    [None, None, SEVERAL[2][2]],
]


def compute(name, predictions=PREDICTIONS, references=REFERENCES, **options):
    return load_metric(name).compute(predictions=predictions, references=references, **options)


def test_every_module_is_listed_and_described():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "common"} == set(METRICS)
    for name, figures in METRICS.items():
        metric = load_metric(name)
        assert len(metric.description.strip()) > 50
        assert set(figures) <= compute(name).keys()
        for key in compute(name):
            # distinct_1 and distinct_2 are documented together, rouge types in a list
            assert key in metric.inputs_description, (name, key)


@pytest.mark.parametrize("name", METRICS)
def test_the_example_in_the_description(name):
    test = doctest.DocTestParser().get_doctest(
        load_metric(name).inputs_description, {"load_metric": load_metric}, name, None, 0
    )
    assert len(test.examples) == 2
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("name", METRICS)
def test_evaluate_loads_the_file(name, tmp_path):
    metric = evaluate.load(str(FOLDER / f"{name}.py"), cache_dir=str(tmp_path))
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == compute(name)


class TestBleu:
    @pytest.mark.parametrize("tokenize", ["13a", "intl", "char", "zh", "none"])
    def test_tokenizers(self, tokenize):
        direct = sacrebleu.metrics.BLEU(tokenize=tokenize)
        result = compute("bleu", tokenize=tokenize)
        assert result["bleu"] == direct.corpus_score(PREDICTIONS, [REFERENCES]).score
        assert result["signature"] == str(direct.get_signature())
        assert f"tok:{tokenize}" in result["signature"]

    def test_chinese_needs_its_tokenizer(self):
        predictions, references = ["我爱你们所有的人。"], ["我爱你和所有的人。"]
        result = compute("bleu", predictions, references, tokenize="zh")
        assert result["bleu"] == sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score > 20
        assert result["system_length"] == 9
        assert compute("bleu", predictions, references)["system_length"] == 1

    def test_options_change_the_score_and_the_signature(self):
        upper = [text.upper() for text in PREDICTIONS]
        assert compute("bleu", upper, lowercase=True)["bleu"] == compute("bleu", lowercase=True)["bleu"]
        assert compute("bleu", upper)["bleu"] < 5
        direct = sacrebleu.metrics.BLEU(smooth_method="add-k", smooth_value=2.0, effective_order=True)
        result = compute("bleu", smooth_method="add-k", smooth_value=2.0, effective_order=True)
        assert result["bleu"] == direct.corpus_score(PREDICTIONS, [REFERENCES]).score
        assert "smooth:add-k[2.00]" in result["signature"]

    def test_by_hand(self):
        # 4 of 5 words, 2 of 4 pairs, 1 of 3 triples, smoothed 1/(2*2) of the quadruples; lengths equal
        result = compute("bleu", ["a b c x e"], ["a b c d e"])
        assert result["precisions"] == pytest.approx([80.0, 50.0, 100 / 3, 25.0])
        assert result["bleu"] == pytest.approx(100 * (0.8 * 0.5 / 3 * 0.25) ** 0.25)
        assert (result["brevity_penalty"], result["system_length"], result["reference_length"]) == (1.0, 5, 5)

    def test_unknown_choices(self):
        with pytest.raises(ValueError, match="tokenize='chinese' is no tokenizer of sacreBLEU: use none, zh, 13a"):
            compute("bleu", tokenize="chinese")
        with pytest.raises(ValueError, match="smooth_method='more' is unknown: use none, floor, add-k, exp"):
            compute("bleu", smooth_method="more")

    def test_a_tokenizer_that_is_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "mecab_ko", None)
        with pytest.raises(ValueError, match="tokenize='ko-mecab' cannot be used on this machine: "):
            compute("bleu", tokenize="ko-mecab")


def test_several_references_of_any_count():
    bleu, chrf, ter = sacrebleu.metrics.BLEU(), sacrebleu.metrics.CHRF(), sacrebleu.metrics.TER()
    result = compute("bleu", references=SEVERAL)
    assert result["bleu"] == bleu.corpus_score(PREDICTIONS, STREAMS).score
    assert result["bleu"] > compute("bleu")["bleu"] + 5
    assert "nrefs:var" in result["signature"]
    assert compute("chrf", references=SEVERAL)["chrf"] == chrf.corpus_score(PREDICTIONS, STREAMS).score
    assert compute("ter", references=SEVERAL)["ter"] == ter.corpus_score(PREDICTIONS, STREAMS).score


def test_rows_of_both_forms():
    mixed = [REFERENCES[0], *SEVERAL[1:]]
    as_lists = [[REFERENCES[0]], *SEVERAL[1:]]
    assert compute("chrf", references=mixed) == compute("chrf", references=as_lists)


@pytest.mark.parametrize("options", [{}, {"word_order": 2}, {"lowercase": True}, {"whitespace": True, "beta": 3}])
def test_chrf(options):
    direct = sacrebleu.metrics.CHRF(**options)
    result = compute("chrf", **options)
    assert result["chrf"] == direct.corpus_score(PREDICTIONS, [REFERENCES]).score
    assert result["signature"] == str(direct.get_signature())


def test_chrf_refuses_impossible_orders():
    with pytest.raises(ValueError, match="char_order=0, word_order=0, beta=2: char_order has to be at least 1"):
        compute("chrf", char_order=0)


@pytest.mark.parametrize("options", [{}, {"case_sensitive": True}, {"normalized": True, "asian_support": True}])
def test_ter(options):
    direct = sacrebleu.metrics.TER(**options)
    result = compute("ter", **options)
    assert result["ter"] == direct.corpus_score(PREDICTIONS, [REFERENCES]).score
    assert result["signature"] == str(direct.get_signature())


def test_ter_by_hand():
    # one block moved (1 shift), one word wrong: 2 edits on 6 words
    result = compute("ter", ["d e f a b x"], ["a b c d e f"])
    assert (result["num_edits"], result["reference_length"]) == (2, 6.0)
    assert result["ter"] == pytest.approx(100 * 2 / 6)


def test_ter_refuses_an_option_without_effect():
    with pytest.raises(ValueError, match="asian_support=True changes nothing alone"):
        compute("ter", asian_support=True)


class TestRouge:
    @pytest.mark.parametrize("use_stemmer", [False, True])
    def test_english_as_rouge_score(self, use_stemmer):
        predictions = ["The cats were sleeping on the mat.\nIt rained.", "A dog_house, isn't it?"]
        references = ["The cat sleeps on a mat.\nIt was raining.", "It is a dog house."]
        types = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        scorer = rouge_scorer.RougeScorer(types, use_stemmer=use_stemmer)
        rows = [scorer.score(*row) for row in zip(references, predictions, strict=True)]
        expected = {name: sum(row[name].fmeasure for row in rows) / 2 for name in types}
        assert compute("rouge", predictions, references, tokenize="ascii", use_stemmer=use_stemmer) == expected
        if not use_stemmer:
            assert compute("rouge", predictions, references) == expected

    def test_accents_are_letters(self):
        # rouge-score would cut "è" away and find "perch" twice
        assert compute("rouge", ["è perché"], ["perche"], rouge_types=["rouge1"]) == {"rouge1": 0.0}
        assert compute("rouge", ["è"], ["è"], rouge_types=["rouge1"], tokenize="ascii") == {"rouge1": 0.0}
        assert compute("rouge", ["È così"], ["è così"], rouge_types=["rouge2"]) == {"rouge2": 1.0}

    @pytest.mark.parametrize(
        ("prediction", "reference", "words"),
        [
            ("我爱你", "我爱她", 3),
            ("猫が寝る", "猫が走る", 4),
            ("हिन्दी भाषा", "हिन्दी पुस्तक", 2),  # marks stay with their letters
            ("Привет, мир", "Привет, Рим", 2),
        ],
    )
    def test_other_scripts(self, prediction, reference, words):
        shared = {2: 1, 3: 2, 4: 3}[words]
        result = compute("rouge", [prediction], [reference], rouge_types=["rouge1"])
        assert result["rouge1"] == pytest.approx(shared / words)

    def test_the_best_of_several_references(self):
        alone = compute("rouge", references=REFERENCES, rouge_types=["rougeL"])["rougeL"]
        best = compute("rouge", references=SEVERAL, rouge_types=["rougeL"])["rougeL"]
        assert best > alone
        assert compute("rouge", [PREDICTIONS[2]], [SEVERAL[2]], rouge_types=["rougeL"]) == {"rougeL": 1.0}

    def test_unknown_choices(self):
        with pytest.raises(ValueError, match="rouge_types has 'rouge0', which is unknown: use rouge1, "):
            compute("rouge", rouge_types=["rouge0"])
        with pytest.raises(ValueError, match="tokenize='13a' is unknown: use unicode or ascii"):
            compute("rouge", tokenize="13a")
        with pytest.raises(ValueError, match="use_stemmer=True stems English words: it needs tokenize='ascii'"):
            compute("rouge", use_stemmer=True)


def test_exact_match():
    predictions = ["R EH D", " sì", "no", "Straße"]
    references = [["R IY D", "R EH D"], ["sì "], ["n o", "NO"], ["STRASSE"]]
    assert compute("exact_match", predictions, references) == {"exact_match": 0.5, "correct": 2, "total": 4}
    assert compute("exact_match", predictions, references, ignore_case=True)["correct"] == 4


class TestErrorRates:
    def test_one_reference_as_jiwer(self):
        words = jiwer.process_words(REFERENCES, PREDICTIONS)
        result = compute("wer")
        assert result["wer"] == words.wer == jiwer.wer(REFERENCES, PREDICTIONS)
        for name in ("substitutions", "deletions", "insertions", "hits"):
            assert result[name] == words.__dict__[name]
        assert compute("cer")["cer"] == jiwer.cer(REFERENCES, PREDICTIONS)

    def test_pronunciations(self):
        predictions = ["R EH T", "K AE T", "", "D AO G Z"]
        references = [["R IY D AH", "R EH D"], ["K AE T"], ["AH"], ["D AA G", "D AO G"]]
        result = compute("wer", predictions, references)
        # against R EH D: 1 of 3; 0 of 3; 1 of 1; against D AO G: 1 of 3
        assert result["wer"] == pytest.approx(3 / 10)
        assert result["sequence_error_rate"] == 0.75
        assert (result["substitutions"], result["deletions"], result["insertions"], result["hits"]) == (1, 1, 1, 8)

    def test_ties_take_the_longer_reference_in_any_order(self):
        for row in (["a", "a b c"], ["a b c", "a"]):
            assert compute("wer", ["a b"], [row])["wer"] == pytest.approx(1 / 3)

    def test_characters_are_code_points(self):
        result = compute("cer", ["perche", "我爱"], [["perché"], ["他爱你", "我爱你"]])
        assert result["cer"] == pytest.approx(2 / 9)
        assert (result["substitutions"], result["deletions"]) == (1, 1)

    def test_empty_references(self):
        assert compute("wer", ["a b", "c"], ["", "c"])["wer"] == 2.0
        for name in ("wer", "cer"):
            with pytest.raises(ValueError, match="every reference is empty"):
                compute(name, ["a", ""], ["", ""])


class TestDiversity:
    def test_by_hand(self):
        # words: a b a b a | b. 1-grams: 6, of them 2 different; 2-grams: ab ba ab ba, 2 different
        result = compute("diversity", ["a b a b a", "b"], None)
        assert result["distinct_1"] == pytest.approx(2 / 6)
        assert result["distinct_2"] == pytest.approx(2 / 4)
        # inside the first text: 2-grams 2 of 4, 3-grams aba bab aba 2 of 3, 4-grams abab baba 2 of 2
        assert [result[f"rep_{n}"] for n in (2, 3, 4)] == pytest.approx([1 / 2, 1 / 3, 0])
        assert result["diversity"] == pytest.approx(1 / 2 * 2 / 3 * 1)

    def test_repetition_between_texts_is_no_loop(self):
        result = compute("diversity", ["one two three"] * 3, None)
        assert result["rep_2"] == 0
        assert result["distinct_2"] == pytest.approx(2 / 6)

    def test_counts_are_pooled(self):
        # 2-grams: 3 of which 1 different, and 1 of which 1 different
        assert compute("diversity", ["no no no no", "sì sì"], None)["rep_2"] == pytest.approx(1 - 2 / 4)

    def test_chinese_and_symbols(self):
        assert compute("diversity", ["我我我我"], None)["rep_2"] == pytest.approx(2 / 3)
        assert compute("diversity", ["ha!!!!"], None)["rep_3"] == pytest.approx(1 / 3)

    def test_orders_and_empty_texts(self):
        result = compute("diversity", ["", "uno due tre"], None, orders=[1, 3])
        assert result["distinct_3"] == 1.0
        assert "distinct_2" not in result
        assert compute("diversity", ["", ""], None)["distinct_1"] == 0.0
        with pytest.raises(ValueError, match="orders has 0: each has to be a whole number of at least 1"):
            compute("diversity", orders=[0])


@pytest.mark.parametrize("name", METRICS)
def test_no_predictions(name):
    with pytest.raises(ValueError, match="there are no predictions to score: give at least one row"):
        compute(name, [], [])
    with pytest.raises(ValueError, match=r"predictions\[1\] is 7: each prediction has to be one string"):
        compute(name, ["a", 7], ["a", "b"])


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"diversity"}))
def test_bad_references(name):
    metric = load_metric(name)
    for references, sentence in (
        (None, "there are no references: give one row of them for each prediction."),
        (["a"], "there are 2 predictions but 1 rows of references: each prediction needs its own row."),
        ([["a"], []], "references[1] is an empty list: each row needs at least one accepted string."),
        (["a", None], "references[1] is None: a row is one string or a list of accepted strings."),
        ([["a"], ["b", 3]], "references[1] is ['b', 3]: a row is one string or a list of accepted strings."),
    ):
        with pytest.raises(ValueError) as caught:
            metric.compute(predictions=["a", "b"], references=references)
        assert str(caught.value) == sentence
    # and the metric goes on as if nothing had been given
    assert len(metric) == 0
    metric.add_batch(predictions=PREDICTIONS[:1], references=REFERENCES[:1])
    metric.add_batch(predictions=PREDICTIONS[1:], references=REFERENCES[1:])
    assert metric.compute() == compute(name)


def run_python(code: str, folder: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_and_a_clean_folder(tmp_path):
    """Two processes that load the same files into one empty cache and score at once do not disturb each other."""
    code = f"""
import evaluate, json
results = []
for round in range(8):
    metric = evaluate.load({str(FOLDER / "wer.py")!r})
    metric.add_batch(predictions=["a b"] * (round + 1), references=["a c"] * (round + 1))
    results.append(metric.compute()["substitutions"])
print(json.dumps(results))
"""
    work = tmp_path / "work"
    work.mkdir()
    processes = [run_python(code, work, HF_HOME=str(tmp_path / "home")) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(work.iterdir()) == []


@pytest.mark.slow
def test_a_home_that_cannot_be_written(tmp_path):
    """`load_metric` needs no cache folder; a file stands where it would be."""
    (tmp_path / "home").write_text("not a folder")
    code = """
from dragoman.evaluation import compute_scores
print(compute_scores(["a b"], ["a c"], ["wer"])["wer"]["wer"])
"""
    work = tmp_path / "work"
    work.mkdir()
    process = run_python(code, work, HF_HOME=str(tmp_path / "home"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.strip() == "0.5"
    assert list(work.iterdir()) == []
