"""The mean of checkpoints: of their parameters and nothing else, and only of one model's."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

import dragoman.cli
from dragoman.training.arguments import load_experiment
from dragoman.training.averaging import average_checkpoints
from dragoman.training.checkpoints import complete_checkpoints
from dragoman.training.run import train
from training.experiments import write_experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints after steps 2, 4 and 6."""
    settings = {"eval_strategy": "no", "load_best_model_at_end": False}
    folder = tmp_path_factory.mktemp("averaging")
    return train(load_experiment(write_experiment(folder, training=settings), ["data.test=null"]))


def average(*arguments):
    return CliRunner().invoke(dragoman.cli.app, ["average", *map(str, arguments)])


@pytest.mark.parametrize(("options", "steps"), [([], (2, 4, 6)), (["--last", 2], (4, 6))])
def test_the_mean_of_a_run(tmp_path, finished, options, steps):
    result = average(finished, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    checkpoints = [finished / f"checkpoint-{step}" for step in steps]
    assert result.stdout == f"{tmp_path}/out is the average of {', '.join(map(str, checkpoints))}\n"
    weights = [load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints]
    averaged = load_file(tmp_path / "out" / "model.safetensors")
    assert averaged.keys() == weights[0].keys()
    for name, weight in averaged.items():
        expected = torch.stack([one[name].double() for one in weights]).mean(dim=0)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(averaged["lm_head.weight" if "lm_head.weight" in averaged else name], weights[-1][name])


def test_it_is_a_whole_model(tmp_path, finished):
    average_checkpoints([finished], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "modeling_dragoman.py", "complete.json"} <= names
    assert not {name for name in names if name.startswith(("optimizer", "rng", "scheduler", "train", "current"))}
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.generate(**tokenizer("uno due", return_tensors="pt")).shape[0] == 1
    assert len(json.loads((tmp_path / "out" / "complete.json").read_text())["averaged"]) == 3


def test_nothing_that_is_said_about_another_model(tmp_path, finished):
    last = shutil.copytree(finished / "checkpoint-6", tmp_path / "last")
    others = ("README.md", "test_results.json", "samples.jsonl", "training.png", "evaluation/scores.json", "runs/log")
    for name in others:
        (last / name).parent.mkdir(exist_ok=True)
        (last / name).write_text("{}")
    average_checkpoints([finished / "checkpoint-2", last], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "config.json" in names
    assert not names & {name.partition("/")[0] for name in others}


def test_half_precision_is_added_up_in_single(tmp_path, finished):
    for number, value in enumerate((256.0, 1.0, 1.0)):
        shutil.copytree(finished / "checkpoint-2", tmp_path / str(number))
        save_file({"w": torch.tensor([value], dtype=torch.bfloat16)}, tmp_path / str(number) / "model.safetensors")
    average_checkpoints([tmp_path / str(number) for number in range(3)], tmp_path / "out")
    (weight,) = load_file(tmp_path / "out" / "model.safetensors").values()
    assert weight.dtype == torch.bfloat16
    assert weight.item() == torch.tensor(258 / 3).bfloat16().item()  # 256 + 1 is 256 in bfloat16


def test_unfinished_checkpoints_do_not_count(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-6" / "complete.json").unlink()
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    assert len(average_checkpoints([tmp_path / "run"], tmp_path / "out")) == 2


def test_mistakes_are_one_sentence(tmp_path, finished):
    one, two = finished / "checkpoint-2", tmp_path / "two"
    shutil.copytree(finished / "checkpoint-4", two)
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps({**config, "d_model": 16, "dropout": 0.5}))
    sharded = tmp_path / "sharded"
    shutil.copytree(one, sharded)
    weights = load_file(one / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name][:1].clone()}, sharded / "model.safetensors")
    out = tmp_path / "out"
    cases = [
        ((one, two, out), f"{one} and {two} are different models: their d_model, dropout differ"),
        ((one, sharded, out), f"{name} is {tuple(weights[name].shape)} in {one} and"),
        ((one, out), f"an average needs two checkpoints or more, not {one} alone"),
        ((finished, out, "--last", 4), "--last 4: there are 3 complete checkpoints"),
        ((tmp_path / "nowhere", out), f"{tmp_path}/nowhere does not exist"),
        ((tmp_path, out), f"{tmp_path} holds neither complete checkpoints nor weights in safetensors"),
        ((finished, two), f"{two} is not empty: choose a new folder"),
    ]
    for arguments, sentence in cases:
        result = average(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.startswith(f"dragoman average: {sentence}"), result.stderr
        assert result.stderr.count("\n") == 1
        assert not out.exists()
