"""What a run tells: speed, samples, curves; and that it stops when it diverges."""

import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dragoman.cli
from dragoman.data.tokenizers import train_tokenizer
from dragoman.training import run
from dragoman.training.arguments import load_experiment
from dragoman.training.checkpoints import complete_checkpoints
from dragoman.training.run import train
from dragoman.training.trainer import DurableTrainer
from dragoman.training.watching import Divergence, Samples, Speed, plot_run
from training.experiments import write_experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that reports to TensorBoard, and what it said."""
    folder = tmp_path_factory.mktemp("watching")
    path = write_experiment(folder, training={"report_to": "tensorboard", "packing": True, "max_tokens_per_batch": 60})
    path.write_text(path.read_text().replace("  per_device_train_batch_size: 4\n", ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "board"))
        patch.setattr(run, "plot_run", plot_run)
        result = CliRunner().invoke(dragoman.cli.app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    return folder / "run", result.stdout


def test_tokens_are_counted():
    batch = {
        "input_ids": torch.ones(2, 5),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "labels": torch.tensor([[7, 2, -100], [7, 8, 2]]),
    }
    packed = {
        "input_ids": torch.ones(1, 6),
        "segment_ids": torch.tensor([[1, 1, 2, 2, 2, 0]]),
        "labels": batch["labels"],
    }
    speed = Speed()
    for inputs in (batch, packed):
        speed.add(inputs)
    speed.pause()
    speed.seconds = 0.5
    figures = speed.figures(lambda counts: torch.cat([counts, counts]))  # as of two processes
    assert figures["target_tokens_per_second"] == 2 * 10 / 0.5
    assert figures["padded_target_tokens_per_second"] == 2 * 12 / 0.5
    assert figures["padding"] == pytest.approx(1 - (10 + 7 + 5) / (12 + 10 + 6))
    assert (speed.seconds, speed.tokens) == (0.0, {})


def test_the_log_has_speed_rate_and_norm(finished):
    state = json.loads((finished[0] / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "loss" in log]
    assert logs
    for log in logs:
        assert 0 < log["target_tokens_per_second"] <= log["padded_target_tokens_per_second"]
        assert 0 <= log["padding"] < 1
        assert log["grad_norm"] > 0
        assert log["learning_rate"] >= 0
    assert "target_tokens_per_second" in finished[1]


def test_samples_at_each_evaluation(finished):
    rows = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2, 4, 4, 6, 6]
    assert {(row["source"], row["target"]) for row in rows} == {
        ("quattro sette tre sei", "sei tre sette quattro"),
        ("cinque", "cinque"),
    }
    for row in rows:
        assert f"{row['source']} → {row['output']} ({row['target']})" in finished[1]


def test_tensorboard_gets_all_of_it(finished):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulators.EventAccumulator(str(finished[0].parent / "board"))
    board.Reload()
    tags = board.Tags()
    wanted = ("loss", "grad_norm", "learning_rate", "target_tokens_per_second", "padding")
    assert {f"train/{name}" for name in wanted} | {"eval/loss", "eval/chrf"} <= set(tags["scalars"])
    assert any("eval/samples" in tag for tag in tags["tensors"])


def test_the_picture(finished, tmp_path):
    with Image.open(finished[0] / "training.png") as picture:
        assert picture.size == (1100, 780)  # six panels
        assert len(picture.convert("L").getcolors(256)) > 50
    plot_run([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    plot_run([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (1100, 260)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch):
    original = DurableTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * math.nan if self.model.training and self.state.global_step == 4 else loss

    monkeypatch.setattr(DurableTrainer, "compute_loss", poisoned)
    monkeypatch.setattr(run, "plot_run", plot_run)
    result = CliRunner().invoke(dragoman.cli.app, ["train", str(write_experiment(tmp_path))])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "dragoman train: training diverged: the gradient became nan in step 5, at a learning rate of 0.004; "
        f"the last good checkpoint is {tmp_path}/run/checkpoint-4; "
        "start anew with a lower training.learning_rate or a longer training.warmup_steps"
    )
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "run" / "training.png").is_file()
    settings = ["training.stop_on_divergence=false", "training.eval_strategy=no", "data.test=null"]
    settings += ["training.load_best_model_at_end=false"]
    train(load_experiment(tmp_path / "tiny.yaml", settings), overwrite=True)


def test_a_norm_that_explodes_stops_the_run():
    divergence = Divergence(lambda: None)
    for step in range(1, 31):
        divergence.check(1.0 + step % 3, step, 0.1)
    divergence.check(1e9, 31, 0.1)  # once is noise, which clipping deals with
    divergence.check(1.0, 32, 0.1)
    for step in range(33, 42):
        divergence.check(250.0, step, 0.1)
    with pytest.raises(
        ValueError, match="norm of the gradient is 250 in step 42, the 10th above 100 times the usual 2,"
    ):
        divergence.check(250.0, 42, 0.1)
    with pytest.raises(
        ValueError, match=r"the gradient became inf in step 43, .*; there is no checkpoint yet; start anew"
    ):
        divergence.check(math.inf, 43, 0.1)


def test_samples_with_line_separators(tmp_path):
    """U+2028 and U+0085 stand in texts, and end no line of a file of JSON."""
    samples = Samples(train_tokenizer(["a"], "word", 9), lambda *args, **kwargs: None, 1)
    samples.texts = lambda: [{"source": "a\u2028b", "output": "c\u0085d", "target": "e"}]
    for step in (2, 4):
        samples.report(tmp_path, step, [])
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().rstrip("\n").split("\n")]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["source"] == "a\u2028b"
