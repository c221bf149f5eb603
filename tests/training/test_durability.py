"""Killed at any moment, a run goes on from its last complete checkpoint to the weights of an uninterrupted one."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import modeling_utils
from typer.testing import CliRunner

import dragoman.cli
from dragoman.training import run
from dragoman.training.arguments import load_experiment
from dragoman.training.checkpoints import (
    complete_checkpoints,
    last_complete_checkpoint,
    load_parts,
    unfinished_checkpoints,
)
from dragoman.training.run import train
from dragoman.training.trainer import DurableTrainer
from training.experiments import write_experiment
from training.test_run import assert_equal_weights


# 23 pairs are 6 steps an epoch; the last step is in the middle of the second.
BY_EPOCH = {"max_steps": 9, "eval_strategy": "epoch", "save_strategy": "epoch", "ema_decay": 0.8}
BY_STEPS = {"max_steps": 9, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 3}
BY_STEPS |= {"load_best_model_at_end": False, "logging_steps": 1}


def tiny(folder: Path, **training):
    folder.mkdir(exist_ok=True)
    path = write_experiment(folder, training=training)
    path.write_text(path.read_text().replace(f"  test: {folder}/test.jsonl\n", ""))
    return load_experiment(path)


def in_step(monkeypatch, step: int, action) -> None:
    """Do something in a training step, before its forward pass."""
    original = DurableTrainer.training_step

    def acting(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            action()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DurableTrainer, "training_step", acting)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the package catches it."""


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module", params=["epoch", "steps"])
def whole(request, tmp_path_factory):
    settings = {"epoch": BY_EPOCH, "steps": BY_STEPS}[request.param]
    return settings, train(tiny(tmp_path_factory.mktemp("whole"), **settings))


def assert_same_end(resumed: Path, whole: Path) -> None:
    assert_equal_weights(resumed, whole)
    last = "checkpoint-9"
    for name in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(folder / last / name) for folder in (resumed, whole))
        assert str(one) == str(other), name
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (resumed, whole)]
    scores = [[(log["step"], log["eval_loss"], log["eval_chrf"]) for log in one if "eval_loss" in log] for one in logs]
    assert scores[0] == scores[1]  # no evaluation is missing, and each saw the same weights


@pytest.mark.parametrize("step", [6, 9])
def test_sigterm_saves_and_stops(tmp_path, monkeypatch, whole, step):
    """Also in the last step of an epoch, whose evaluation comes after it, and in the last one of all."""
    settings, uninterrupted = whole
    with monkeypatch.context() as patch:
        in_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt, match="stopped and saved after step"):
            train(tiny(tmp_path, **settings))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert last_complete_checkpoint(tmp_path / "run").name == f"checkpoint-{step}"
    assert_same_end(train(tiny(tmp_path, **settings), resume=True), uninterrupted)


def test_a_kill_while_a_checkpoint_is_written(tmp_path, monkeypatch, whole, capsys):
    """Whether it happens after the weights or after all but the marker."""
    settings, uninterrupted = whole
    for method in ("save_model", "complete_checkpoint"):
        with monkeypatch.context() as patch:
            if method == "complete_checkpoint":
                patch.setattr(run, "_mark_complete", lambda *args: kill())
            else:
                original = getattr(DurableTrainer, method)

                def dying(self, *args, original=original, **kwargs):
                    original(self, *args, **kwargs)
                    if self.state.global_step >= 6:
                        kill()

                patch.setattr(DurableTrainer, method, dying)
            with pytest.raises(Killed):
                train(tiny(tmp_path, **settings), resume=method != "save_model")
        (unfinished,) = unfinished_checkpoints(tmp_path / "run")
    capsys.readouterr()
    output = train(tiny(tmp_path, **settings), resume=True)
    assert f"{unfinished} is skipped: the run ended before it was complete" in capsys.readouterr().out
    assert_same_end(output, uninterrupted)
    assert unfinished_checkpoints(output) == []


def test_a_kill_after_the_last_step(tmp_path, monkeypatch, whole, capsys):
    """Nothing is trained any more, though the epoch would have batches left."""
    _, uninterrupted = whole
    shutil.copytree(uninterrupted, tmp_path / "run")
    for name in ("complete.json", "model.safetensors", "trainer_state.json"):
        (tmp_path / "run" / name).unlink()
    state = tmp_path / "run" / "checkpoint-9" / "trainer_state.json"
    state.write_text(state.read_text().replace(str(uninterrupted), str(tmp_path / "run")))
    in_step(monkeypatch, 10, kill)
    experiment = load_experiment(uninterrupted / "experiment.yaml", [f"training.output_dir={tmp_path / 'run'}"])
    capsys.readouterr()
    assert_same_end(train(experiment, resume=True), uninterrupted)
    said = capsys.readouterr().out
    assert "step 9 was the last one: nothing is left to train" in said
    assert "train_loss" not in said  # of no steps


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-900-best", "checkpoint-notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9" / "complete.json").write_text("{}")
    (tmp_path / "checkpoint-900-best" / "complete.json").write_text("{}")
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-9"]
    assert [folder.name for folder in unfinished_checkpoints(tmp_path)] == ["checkpoint-10"]


def test_a_kill_after_early_stopping(tmp_path, monkeypatch):
    settings = {"learning_rate": 0.0, "early_stopping_patience": 1, "max_steps": 30, "save_steps": 2, "eval_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_card", lambda *args, **kwargs: kill())
        with pytest.raises(Killed):
            train(tiny(tmp_path, **settings))
    state = json.loads((train(tiny(tmp_path, **settings), resume=True) / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_the_old_checkpoint_goes_when_the_new_one_is_complete(tmp_path, monkeypatch):
    settings = {"save_total_limit": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    with monkeypatch.context() as patch:
        mark = run._mark_complete

        def dying(experiment, folder, state):
            if state.global_step == 4:
                kill()
            mark(experiment, folder, state)

        patch.setattr(run, "_mark_complete", dying)
        with pytest.raises(Killed):
            train(tiny(tmp_path, **settings))
    assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-2"
    output = train(tiny(tmp_path, **settings), resume=True)
    assert [folder.name for folder in complete_checkpoints(output)] == ["checkpoint-6"]


def test_the_average_is_saved_and_the_optimizer_goes_on_from_the_weights(tmp_path):
    output = train(tiny(tmp_path, **BY_STEPS | {"ema_decay": 0.9, "eval_strategy": "no"}))
    average = None
    for step in (3, 6, 9):
        saved = load_file(output / f"checkpoint-{step}" / "model.safetensors")
        current = load_file(output / f"checkpoint-{step}" / "current_weights.safetensors")
        assert saved.keys() == current.keys()
        assert not any(torch.equal(saved[name], current[name]) for name in saved if "k_proj" not in name)
        average = saved
    for name, weight in load_file(output / "model.safetensors").items():
        assert torch.equal(weight, average[name]), name


def test_the_average_follows_the_formula(tmp_path):
    settings = BY_STEPS | {"ema_decay": 0.25, "save_steps": 1, "max_steps": 3, "eval_strategy": "no"}
    output = train(tiny(tmp_path, **settings))
    folders = complete_checkpoints(output)
    weights = [load_file(folder / "current_weights.safetensors") for folder in folders]
    averages = [load_file(folder / "model.safetensors") for folder in folders]
    for step in (2, 3):
        decay = min(0.25, (1 + step) / (10 + step))
        for name, average in averages[step - 1].items():
            expected = decay * averages[step - 2][name] + (1 - decay) * weights[step - 1][name]
            torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("key", "value"),
    [("ema_decay", 0.9), ("seed", 7), ("per_device_train_batch_size", 3), ("dataloader_drop_last", True)],
)
def test_the_experiment_cannot_resume_with_another_average_or_order(tmp_path, key, value):
    train(tiny(tmp_path, max_steps=2))
    with pytest.raises(ValueError, match=rf"was started with another .*training\.{key}"):
        train(tiny(tmp_path, **{"max_steps": 2, key: value}), resume=True)


def test_the_batches_of_an_update_may_be_shared_out_otherwise(tmp_path):
    """As many of them in all: two processes with one each are one with two."""
    train(tiny(tmp_path, **(BY_STEPS | {"max_steps": 3})))
    marker = last_complete_checkpoint(tmp_path / "run") / "complete.json"
    assert json.loads(marker.read_text())["processes"] == 1
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "processes": 2}))
    with pytest.raises(
        ValueError,
        match="2 processes with 1 batches each made an update, now it would be 1 with 1; set "
        r"training\.gradient_accumulation_steps=2",
    ):
        train(tiny(tmp_path, **(BY_STEPS | {"max_steps": 4})), resume=True)
    train(tiny(tmp_path, **(BY_STEPS | {"max_steps": 4, "gradient_accumulation_steps": 2})), resume=True)


def test_overwriting_can_be_killed_too(tmp_path, monkeypatch):
    train(tiny(tmp_path, max_steps=2))
    with monkeypatch.context() as patch:
        original = shutil.rmtree

        def dying(path, **kwargs):
            kill() if Path(path).name.startswith("checkpoint-") else original(path, **kwargs)

        patch.setattr(shutil, "rmtree", dying)
        with pytest.raises(Killed):
            train(tiny(tmp_path, max_steps=2), overwrite=True)
    assert last_complete_checkpoint(tmp_path / "run") is None
    assert (train(tiny(tmp_path, max_steps=2), resume=True) / "complete.json").is_file()


def fill_up_for_safetensors(monkeypatch) -> None:
    """It writes under another name and renames, so that no link is followed; a limit on files is what fails it."""
    original, limits = modeling_utils.safe_save_file, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_file(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            original(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(modeling_utils, "safe_save_file", save_file)


@pytest.fixture(scope="module")
def with_room(tmp_path_factory):
    """An experiment and the folder where it ended."""
    settings = {"eval_strategy": "no", "load_best_model_at_end": False}
    path = write_experiment(tmp_path_factory.mktemp("room"), training=settings)
    return path, train(load_experiment(path))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "complete.json.unfinished"])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, with_room, file):
    """One sentence and exit status 2; the checkpoints before are whole, and with room the run ends as ever."""
    path, free = with_room
    output = tmp_path / "full"
    with monkeypatch.context() as patch:

        def fill() -> None:
            if file == "model.safetensors":
                fill_up_for_safetensors(patch)
            else:
                (output / "checkpoint-6").mkdir()
                (output / "checkpoint-6" / file).symlink_to("/dev/full")  # every write fails as on a full disk

        in_step(patch, 6, fill)
        usage = shutil.disk_usage(tmp_path)._replace(free=0)
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        result = CliRunner().invoke(dragoman.cli.app, ["train", str(path), f"training.output_dir={output}"])
    assert result.exit_code == 2, result.stderr
    sentence = f"dragoman train: the disk of {output} is full; make room and go on with --resume"
    assert result.stderr.splitlines()[-1] == sentence
    assert [folder.name for folder in complete_checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]
    for folder in complete_checkpoints(output):
        assert_equal_weights(folder, free / folder.name)
    assert_equal_weights(train(load_experiment(path, [f"training.output_dir={output}"]), resume=True), free)


def test_parts_of_a_checkpoint_that_is_gone(tmp_path):
    """It is an error: a model with whatever weights it had would pass for the best one."""
    with pytest.raises(FileNotFoundError, match=r"gone has no model\*\.safetensors to go back to"):
        load_parts(torch.nn.Linear(1, 1), tmp_path / "gone")
