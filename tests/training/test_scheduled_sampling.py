"""The teacher forcing schedule of a training run: passed per optimizer step, with coins that come from the seed."""

import pytest
import torch

from dragoman.models.modeling_dragoman_rnn import DragomanRnnForConditionalGeneration
from dragoman.training.arguments import load_experiment
from dragoman.training.run import train
from training.experiments import write_experiment
from training.test_run import assert_equal_weights


RECURRENT = {
    "preset": "lstm_bahdanau", "embedding_dim": 7, "hidden_size": 12, "encoder_layers": 1, "decoder_layers": 1,
    "dropout": 0.1,
}  # fmt: skip
SCHEDULE = {"kind": "linear", "k": 1.0, "slope": 0.2, "minimum": 0.3}


def recurrent_experiment(folder, **training):
    folder.mkdir(exist_ok=True)
    path = write_experiment(folder, training={"teacher_forcing_schedule": SCHEDULE, **training})
    text = path.read_text()
    model = "model:\n" + "".join(f"  {key}: {value}\n" for key, value in RECURRENT.items())
    start = text.index("model:\n")
    end = next((i for i in range(start + 7, len(text)) if text[i - 1] == "\n" and text[i] != " "), len(text))
    path.write_text(text[:start] + model + text[end:])
    return path


@pytest.fixture
def passes(monkeypatch):
    """What each training pass was told, and the coins it tossed."""
    seen = []
    toss = DragomanRnnForConditionalGeneration.scheduled_sampling

    def spy(self, target, ratio, generator):
        coins = toss(self, target, ratio, generator)
        if self.training and ratio is not None:  # the estimate of the memory passes without a ratio
            seen.append((ratio, None if coins is None else coins.gold))
        return coins

    monkeypatch.setattr(DragomanRnnForConditionalGeneration, "scheduled_sampling", spy)
    return seen


def test_the_ratio_follows_the_optimizer_steps(tmp_path, passes):
    train(load_experiment(recurrent_experiment(tmp_path, gradient_accumulation_steps=2)))
    assert [ratio for ratio, _ in passes] == pytest.approx([1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.3, 0.3, 0.3, 0.3])
    assert any(not coins.all() for _, coins in passes[2:])


def test_a_resumed_run_tosses_the_same_coins(tmp_path, passes):
    constant = "training.lr_scheduler_type=constant"
    whole = train(load_experiment(recurrent_experiment(tmp_path / "whole"), [constant]))
    tossed = [coins for _, coins in passes]
    path = recurrent_experiment(tmp_path / "part")
    train(load_experiment(path, [constant, "training.max_steps=4"]))
    passes.clear()
    resumed = train(load_experiment(path, [constant]), resume=True)
    again = [coins for _, coins in passes]
    assert len(again) == 2
    assert all(torch.equal(a, b) for a, b in zip(tossed[4:], again, strict=True))
    assert_equal_weights(resumed, whole)


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        ("{kind: linar}", "teacher forcing schedule 'linar' is unknown"),
        ("{kindd: linear}", "unknown key 'teacher_forcing_schedule.kindd'; the nearest valid one is"),
        ("{k: 1.5}", "k=1.5 of a teacher forcing schedule that is constant must be between 0 and 1"),
        ("0.5", "training.teacher_forcing_schedule must be .*a mapping.*, got 0.5"),
    ],
)
def test_a_wrong_schedule_is_refused(tmp_path, schedule, sentence):
    path = recurrent_experiment(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load_experiment(path, [f"training.teacher_forcing_schedule={schedule}"])


def test_a_transformer_has_no_schedule(tmp_path):
    path = write_experiment(tmp_path, training={"teacher_forcing_schedule": SCHEDULE})
    with pytest.raises(ValueError, match="is for models of type 'dragoman_rnn', not 'dragoman'"):
        load_experiment(path)
