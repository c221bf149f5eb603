"""A whole evaluation: files, report, table."""

import json
import shutil

import pytest
import sacrebleu
import torch
from datasets import Dataset
from rich.console import Console

from dragoman.evaluation import comparison_table, evaluate_model
from dragoman.inference import STRATEGIES, load, translate
from inference.tiny import PAIRS, SOURCES, TARGETS, learned_by_heart


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in learned_by_heart(two_vocabularies=True):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The pairs by heart and one that the model cannot know."""
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("".join(f"{source}\t{target}\n" for source, target in [*PAIRS, ("yes yes yes", "certo")]))
    return path


def test_report_files_and_table(folder, data, tmp_path):
    strategies = ["default", *STRATEGIES, "beam:num_beams=2,length_penalty=0.5"]
    metrics = ["bleu:tokenize=char", "chrf", "exact_match", "diversity"]
    random_state = torch.get_rng_state()
    report = evaluate_model(
        str(folder), data, tmp_path / "out", metrics=metrics, strategies=strategies, device="cpu", max_length=17
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == report
    assert (report["model"], report["data"], report["rows"]) == (str(folder), str(data), 11)
    assert report["versions"]["sacrebleu"] == sacrebleu.__version__
    assert list(report["strategies"]) == strategies
    names = ["default", "greedy", "beam", "sampling", "contrastive", "beam_num_beams_2_length_penalty_0.5"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "scores.json",
        *(f"predictions.{name}.{ending}" for name in names for ending in ("txt", "jsonl")),
    }

    model, processor = load(folder, "cpu")
    sources, references = [*SOURCES, "yes yes yes"], [*TARGETS, "certo"]
    for strategy, name in zip(strategies, names, strict=True):
        result = report["strategies"][strategy]
        assert result["arguments"]["max_length"] == 17
        assert result["headline"]["exact_match"] == pytest.approx(10 / 11)
        assert result["seconds"] > 0
        assert result["sentences_per_second"] == pytest.approx(11 / result["seconds"], rel=0.1)
        lines = (tmp_path / "out" / f"predictions.{name}.txt").read_text().splitlines()
        rows = [json.loads(line) for line in (tmp_path / "out" / f"predictions.{name}.jsonl").open()]
        assert [row["prediction"] for row in rows] == lines
        assert [row["source"] for row in rows] == sources
        assert [row["target"] for row in rows] == references
        bleu = sacrebleu.metrics.BLEU(tokenize="char")
        assert result["scores"]["bleu"]["bleu"] == bleu.corpus_score(lines, [references]).score
        assert result["scores"]["bleu"]["signature"] == str(bleu.get_signature())
        if strategy != "sampling":
            expected = [best for best, *_ in translate(model, processor, sources, **result["arguments"])]
            assert lines == [best.text for best in expected]
            assert [row["score"] for row in rows] == pytest.approx([best.score for best in expected], abs=1e-5)
            assert result["generated_tokens"] == sum(len(best.token_ids) for best in expected)

    console = Console(width=80, record=True)
    console.print(comparison_table(report))
    text = console.export_text()
    for column in ("strategy", "bleu", "chrf", "exact", "distinct", "diversity", "seconds"):
        assert column in text
    greedy = next(line.split() for line in text.splitlines() if "greedy" in line)
    assert greedy[1:4] == [f"{report['strategies']['greedy']['headline'][key]:.2f}" for key in ("bleu", "chrf")] + [
        "0.909"
    ]


def test_the_seed_decides_the_samples(folder, tmp_path):
    def sample(seed):
        data = Dataset.from_dict({"source": SOURCES, "target": TARGETS})
        evaluate_model(
            folder, data, tmp_path, strategies=["sampling:temperature=5.0,top_p=1.0"], metrics=["chrf"], seed=seed
        )
        (path,) = tmp_path.glob("predictions.*.txt")
        return path.read_text()

    first = sample(1)
    assert sample(2) != first
    assert sample(1) == first


def test_the_callers_random_numbers_are_left_alone(folder, tmp_path):
    """Also by the call before the first strategy, of a model that was saved to sample."""
    model = shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True}))
    data = Dataset.from_dict({"source": SOURCES[:2], "target": TARGETS[:2]})
    random_state = torch.get_rng_state()
    evaluate_model(model, data, tmp_path / "out", strategies=["greedy"], metrics=["chrf"])
    assert torch.equal(torch.get_rng_state(), random_state)


def test_several_references_from_a_column(folder, tmp_path):
    variants = [[f"{target} x", target] for target in TARGETS]
    data = Dataset.from_dict({"source": SOURCES, "target": ["?"] * 10, "variants": variants})
    report = evaluate_model(
        folder, data, tmp_path, strategies=["greedy"], metrics=["wer", "bleu"], references_column="variants"
    )
    assert report["strategies"]["greedy"]["headline"]["wer"] == 0
    assert "nrefs:2" in report["strategies"]["greedy"]["scores"]["bleu"]["signature"]
    stream = evaluate_model(
        folder,
        data.to_iterable_dataset(),
        tmp_path,
        strategies=["greedy"],
        metrics=["wer", "bleu"],
        references_column="variants",
    )
    assert stream["strategies"]["greedy"]["scores"] == report["strategies"]["greedy"]["scores"]


def test_line_breaks_in_a_prediction_stay_in_the_json(folder, tmp_path, monkeypatch):
    def with_a_break(*args, **kwargs):
        outputs = translate(*args, **kwargs)
        for best, *_ in outputs:
            best.text = best.text.replace(" ", "\n")
        return outputs

    monkeypatch.setattr("dragoman.evaluation.run.translate", with_a_break)
    data = Dataset.from_dict({"source": SOURCES[:2], "target": TARGETS[:2]})
    evaluate_model(folder, data, tmp_path, strategies=["greedy"], metrics=["chrf"])
    assert (tmp_path / "predictions.greedy.txt").read_text() == "il gatto dorme\nil cane\n"
    rows = [json.loads(line) for line in (tmp_path / "predictions.greedy.jsonl").open()]
    assert [row["prediction"] for row in rows] == ["il\ngatto\ndorme", "il\ncane"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"metrics": ["blue"]}, "there is no metric 'blue': did you mean 'bleu'?"),
        (
            {"strategies": ["beams"]},
            "there is no decoding strategy 'beams': did you mean 'beam'? Valid: beam, ",
        ),
        ({"strategies": ["beam:beams=3"]}, "strategy 'beam:beams=3': no such option: --beams; the nearest"),
        (
            {"strategies": ["greedy"], "num_beams": 3},
            "num_beams=3 is given for every strategy, but 'greedy' has num_beams=1",
        ),
        ({"strategies": ["beam", "beam"]}, "strategies ['beam', 'beam']: name at least one, and each once."),
        ({"strategies": []}, "strategies []: name at least one, and each once."),
        ({"lenght_penalty": 2.0}, "there is no generation argument 'lenght_penalty': did you mean 'length_penalty'?"),
        ({"metrics": ["bleu:tokenize=xx"]}, "tokenize='xx' is no tokenizer of sacreBLEU: use "),
        ({"references_column": "variants"}, "a dataset in memory has no column 'variants': it has source, target."),
    ],
)
def test_mistakes_are_found_before_anything_is_written(folder, tmp_path, arguments, sentence):
    data = Dataset.from_dict({"source": SOURCES, "target": TARGETS})
    with pytest.raises(ValueError) as caught:
        evaluate_model(folder, data, tmp_path / "out", **arguments)
    assert str(caught.value).startswith(sentence)
    assert not (tmp_path / "out").exists()
