"""What a recipe may say: schedules, weight decay, precision; and the defaults, under which every preset learns."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from dragoman.training import run
from dragoman.training.arguments import load_experiment, preset, preset_names
from dragoman.training.run import train
from dragoman.training.trainer import DurableTrainer
from training.experiments import write_experiment


ALONE = ["data.validation=null", "data.test=null", "training.eval_strategy=no", "training.save_strategy=no"]
ALONE += ["training.load_best_model_at_end=false", "training.logging_steps=1"]


def logs_of(folder, *overrides, **sections):
    """A run without evaluations: its folder and the logs of its steps."""
    folder.mkdir(exist_ok=True)
    output = train(load_experiment(write_experiment(folder, **sections), [*ALONE, *overrides]))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return output, [log for log in history if "loss" in log]


@pytest.fixture
def trainers(monkeypatch):
    """The trainers of the runs of a test, stopped before they train."""
    made = []

    class Stopped(Exception):
        pass

    def stopped(self, *args, **kwargs):
        made.append(self)
        raise Stopped

    monkeypatch.setattr(run.LanguagesTrainer, "train", stopped)

    def make(folder, *overrides, **sections):
        with pytest.raises(Stopped):
            logs_of(folder, *overrides, **sections)
        return made.pop()

    return make


@pytest.mark.parametrize(
    ("settings", "curve"),
    [
        ({"lr_scheduler_type": "linear"}, lambda step: (20 - step) / 16),
        ({"lr_scheduler_type": "inverse_sqrt"}, lambda step: math.sqrt(4 / step)),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 9}},
            lambda step: math.sqrt(9 / (9 + step - 4)),
        ),
        ({"lr_scheduler_type": "cosine"}, lambda step: (1 + math.cos(math.pi * (step - 4) / 16)) / 2),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            lambda step: 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2,
        ),
        (  # warmup-stable-decay (Hu 2024): up, level, down
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 5, "decay_type": "linear", "min_lr_ratio": 0.0},
            },
            lambda step: 1.0 if step < 15 else (20 - step) / 5,
        ),
    ],
)
def test_schedules(tmp_path, trainers, settings, curve):
    """From YAML; the rate of each of 20 steps, of which 4 warm up."""
    trainer = trainers(tmp_path, training={"warmup_steps": 4, "max_steps": 20, "learning_rate": 0.5, **settings})
    trainer.create_optimizer_and_scheduler(20)
    rates = []
    for _ in range(20):
        rates.append(trainer.lr_scheduler.get_last_lr()[0] / 0.5)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    expected = [step / 4 if step < 4 else curve(step) for step in range(20)]
    assert rates == pytest.approx(expected)


def test_a_misspelled_schedule_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"training\.lr_scheduler_type must be one of linear, cosine, .*'invers_sqrt'"):
        load_experiment(write_experiment(tmp_path), ["training.lr_scheduler_type=invers_sqrt"])


@pytest.mark.parametrize("name", ["modern", "transformer_2017", "lstm_bahdanau"])
def test_weight_decay_is_for_matrices(tmp_path, trainers, name):
    """Biases and norms have none, as the stock Trainer has it; embeddings and everything else have."""
    trainer = trainers(tmp_path, training={"weight_decay": 0.3})
    if name != "modern":
        sizes = {"embedding_dim": 7, "hidden_size": 12} if name == "lstm_bahdanau" else {"d_model": 12}
        ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
        heads = {} if name == "lstm_bahdanau" else {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        trainer.model = run.AutoModelForSeq2SeqLM.from_config(preset(name, vocab_size=23, **sizes, **heads, **ids))
    optimizer = trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[parameter] for parameter in group["params"]} for group in optimizer.param_groups
    }
    assert groups.keys() == {0.3, 0.0}
    assert groups[0.3] | groups[0.0] == set(names.values())
    for decayed in groups[0.3]:
        assert not any(word in decayed for word in ("bias", "norm")), decayed
    for bare in groups[0.0]:
        assert any(word in bare for word in ("bias", "norm")), bare
    assert any("embed_tokens" in decayed for decayed in groups[0.3])


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, _ = logs_of(tmp_path / "plain")
    saving, _ = logs_of(tmp_path / "saving", "training.activation_checkpointing=true")
    weights, others = (load_file(folder / "model.safetensors") for folder in (plain, saving))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-6)


def test_bfloat16(tmp_path):
    """Weights and optimizer stay in single precision, and the losses are nearly those of single precision."""
    output, half = logs_of(tmp_path / "half", "training.bf16=true", "model.dropout=0.0")
    _, single = logs_of(tmp_path / "single", "model.dropout=0.0")
    assert {weight.dtype for weight in load_file(output / "model.safetensors").values()} == {torch.float32}
    assert [log["loss"] for log in half] == pytest.approx([log["loss"] for log in single], rel=0.02)
    assert [log["loss"] for log in half] != [log["loss"] for log in single]


def test_clipping(tmp_path, monkeypatch):
    """The norm that is logged is that before clipping; the optimizer gets no more than allowed."""
    norms = []
    original = DurableTrainer._get_grad_norm

    def watched(self, model, grad_norm=None):
        squares = [weight.grad.square().sum() for weight in self.model.parameters() if weight.grad is not None]
        norms.append(torch.stack(squares).sum().sqrt().item())
        return original(self, model, grad_norm)

    monkeypatch.setattr(DurableTrainer, "_get_grad_norm", watched)
    _, logs = logs_of(tmp_path, "training.max_grad_norm=0.25")
    assert norms == pytest.approx([0.25] * 6, rel=1e-3)
    assert min(log["grad_norm"] for log in logs) > 0.3


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(tmp_path):
    shorter = ["training.max_steps=3", EVERY_PAIR, "model.dropout=0.0"]
    compiling = ["training.torch_compile=true", "training.torch_compile_backend=aot_eager"]
    _, compiled = logs_of(tmp_path / "compiled", *shorter, *compiling)
    _, plain = logs_of(tmp_path / "plain", *shorter)
    assert [log["loss"] for log in compiled] == pytest.approx([log["loss"] for log in plain], rel=1e-5)


EVERY_PAIR = "training.per_device_train_batch_size=23"
SMALL = {
    "dragoman": {
        "d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2,
    },
    "dragoman_rnn": {"embedding_dim": 16, "hidden_size": 32},
}  # fmt: skip


RECIPES = {
    "bart": {"learning_rate": 5e-4, "warmup_steps": 0.1},
    "marian": {"learning_rate": 5e-4, "warmup_steps": 0.1},
    "transformer_2017": {"learning_rate": 7e-4, "warmup_steps": 0.1},
}


def test_a_preset_brings_its_recipe(tmp_path):
    """In place of what a file says about training another architecture, but not of what the command line says."""
    path = write_experiment(tmp_path)
    text = path.read_text()
    assert load_experiment(path, ["model.preset=marian"]).training.learning_rate == 5e-4
    changed = load_experiment(path, ["model.preset=marian", "training.learning_rate=2e-3"])
    assert (changed.training.learning_rate, changed.training.warmup_steps) == (2e-3, 0.1)
    assert load_experiment(path, ["model.preset=modern"]).training.learning_rate == 1e-2
    path.write_text(text.replace("preset: modern", "preset: marian"))
    written = load_experiment(path)
    assert (written.training.learning_rate, written.training.warmup_steps) == (1e-2, 0.1)
    written.save(tmp_path / "again.yaml")
    assert load_experiment(tmp_path / "again.yaml").training.warmup_steps == 0.1


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_learns_by_default(tmp_path, name):
    """60 steps of the default recipe on one batch, at small sizes: the loss falls, and never rises much on the way."""
    path = write_experiment(tmp_path)
    sizes = {**SMALL[preset(name).model_type], "dropout": 0.1}
    text = path.read_text().replace("  learning_rate: 0.01\n", "")
    path.write_text(text[: text.index("model:")] + text[text.index("tokenizer:") :])
    model = [f"model.preset={name}", *(f"model.{key}={value}" for key, value in sizes.items())]
    experiment = load_experiment(path, [*ALONE, *model, "training.max_steps=60", EVERY_PAIR])
    recipe = {"learning_rate": 1e-3, "warmup_steps": 0.05, **RECIPES.get(name, {})}
    assert {key: getattr(experiment.training, key) for key in recipe} == recipe
    output = train(experiment)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in history if "loss" in log]
    assert len(losses) == 60
    assert losses[-1] < 0.95 * losses[0]
    assert max(losses) < 1.1 * losses[0]
