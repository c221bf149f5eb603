"""Two processes end where one does: DDP, FSDP2 and tensor parallelism in float64, over gloo."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM
from transformers.distributed import DistributedConfig

from dragoman import preset
from dragoman.training.arguments import load_experiment
from dragoman.training.checkpoints import complete_checkpoints, unfinished_checkpoints
from dragoman.training.run import train
from training import ranks
from training.test_batches import TRAIN_ONLY, WITHOUT_EVALUATION, experiment, log_of, streaming


ROOT = Path(__file__).parents[2]
# An even number of batches of a token budget, and the same of a stream.
BUDGET = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
BUDGET |= {**WITHOUT_EVALUATION, "save_strategy": "no", "max_tokens_per_batch": 36}
CHANGES = {"model": {"dropout": 0.0}, "data": TRAIN_ONLY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have done what ranks.py says, all in one start."""
    folder = tmp_path_factory.mktemp("two")
    ranks.prepare(folder)
    experiment(folder / "budget", training=BUDGET, **CHANGES).save(folder / "budget.yaml")
    streaming(folder / "stream", **BUDGET, max_steps=5).save(folder / "stream.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / "configs" / "accelerate" / "tensor_parallel.yaml")]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *sys.path])
    process = subprocess.run(
        [*launch, str(Path(ranks.__file__)), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,  # on a busy machine
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return folder


def losses(path: Path) -> list[float]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["losses"])


def assert_same_training(path: Path, other: Path, of_losses: float = 1e-9) -> None:
    assert losses(path) == pytest.approx(losses(other), abs=of_losses, rel=0)
    weights, others = load_file(path), load_file(other)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def one_and_two(folder):
    """Where one process has trained through the Trainer, too."""
    for optimizer in ranks.OPTIMIZERS:
        ranks.with_the_trainer(folder, 1, optimizer)
    return folder


@pytest.mark.slow
def test_ddp_trains_as_one_process(one_and_two):
    """Ten steps through the Trainer, the tokens of all processes counted."""
    one, two = (one_and_two / f"trainer-sgd-{processes}.safetensors" for processes in (1, 2))
    assert len(losses(two)) == 10
    # The Trainer adds the losses that it logs up in single precision.
    assert_same_training(two, one, of_losses=1e-6)


@pytest.mark.slow
def test_ddp_trains_as_one_process_with_adamw(one_and_two):
    """In single precision, where AdamW makes whole steps of gradients that are rounding errors: the losses alone."""
    one, two = (losses(one_and_two / f"trainer-adamw_torch-{processes}.safetensors") for processes in (1, 2))
    assert two == pytest.approx(one, abs=1e-4, rel=0)
    assert len(two) == 10
    assert two[-1] < two[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ranks.OPTIMIZERS)
def test_an_evaluation_that_generates_ends(one_and_two, optimizer):
    """Seven pairs for two processes, whose outputs end at different lengths."""
    one, two = (json.loads((one_and_two / f"scores-{optimizer}-{processes}.json").read_text()) for processes in (1, 2))
    assert one == two
    assert one["rows"] == 7


@pytest.fixture(scope="module")
def alone(folder):
    """One process does what two did, once for each model."""

    @functools.cache
    def train(name: str) -> Path:
        ranks.by_hand(ranks.read_model(folder, name), folder, f"alone-{name}", 0, 1)
        return folder / f"alone-{name}.safetensors"

    return train


@pytest.mark.slow
@pytest.mark.parametrize("way", [*(f"fsdp-{name}" for name in ranks.MODELS), "tp-tied"])
def test_sharded_models_train_as_whole_ones(folder, alone, way):
    """The loss is made in chunks, and no process has all the weights (ranks.py asserts it); ties stay ties."""
    assert_same_training(folder / f"{way}.safetensors", alone(way.partition("-")[2]))


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint(folder, alone):
    """Weights and momentum, each process's part, in two processes again or in one (torch.distributed.checkpoint)."""
    expected = load_file(alone("tied"))
    ranks.by_hand(ranks.read_model(folder, "tied"), folder, "resharded", 0, 1, folder / "sharded", resume=True)
    for name in ("fsdp-resumed", "resharded"):
        assert losses(folder / f"{name}.safetensors") == pytest.approx(losses(alone("tied"))[ranks.SAVED :], abs=1e-9)
        for key, weight in load_file(folder / f"{name}.safetensors").items():
            torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-9, msg=key)
    interrupted, resumed = (load_file(folder / f"fsdp-{name}.safetensors") for name in ("tied", "resumed"))
    assert all(torch.equal(resumed[name], weight) for name, weight in interrupted.items())


@pytest.mark.slow
def test_a_sharded_model_is_saved_with_its_own_code(folder):
    """And not with that of the class that FSDP2 gives it."""
    config = json.loads((folder / "fsdp-saved" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == "modeling_dragoman.DragomanForConditionalGeneration"
    assert (folder / "fsdp-saved" / "modeling_dragoman.py").is_file()
    saved = load_file(folder / "fsdp-saved" / "model.safetensors")
    expected = load_file(folder / "fsdp-tied.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in expected.items())


def losses_of(run: Path) -> list[float]:
    return [log["loss"] for log in log_of(run)["log_history"] if "loss" in log]


def scores_of(run: Path) -> list[tuple[int, float, float]]:
    return [
        (log["step"], log["eval_loss"], log["eval_chrf"]) for log in log_of(run)["log_history"] if "eval_loss" in log
    ]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", "tp"])
def test_one_process_told_to_stop_stops_both(folder, way):
    """
    After the same step, with one complete checkpoint; resumed, the run ends as one that was left alone, bit for bit:
    under DDP, shared out by Accelerate's FSDP2, both with an average of the weights, and under tensor parallelism, tied
    as the default is. (The checkpoint of the stop is in the middle of an epoch.)
    """
    for rank in (0, 1):
        assert f"stopped and saved after step {ranks.STOPPED};" in (folder / way / f"stopped-{rank}.txt").read_text()
    whole, stopped = folder / way / "whole", folder / way / "stopped"
    names = [[checkpoint.name for checkpoint in complete_checkpoints(run)] for run in (whole, stopped)]
    steps = [5] if way == "tp" else [3, 5]  # batches of its own has one process alone, so that an epoch has six
    assert names == [[f"checkpoint-{step}" for step in made] for made in (steps, sorted({*steps, ranks.STOPPED}))]
    assert unfinished_checkpoints(stopped) == []
    files = ["model.safetensors", "checkpoint-5/model.safetensors"]
    for name in [*files, *(["checkpoint-5/current_weights.safetensors"] if way == "ddp" else [])]:
        one, other = load_file(whole / name), load_file(stopped / name)
        assert one.keys() == other.keys()
        assert [key for key, weight in one.items() if not torch.equal(weight, other[key])] == []
    assert scores_of(whole) == scores_of(stopped)
    assert [step for step, *_ in scores_of(whole)] == steps
    config = json.loads((stopped / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == "modeling_dragoman.DragomanForConditionalGeneration"


@pytest.mark.slow
def test_a_run_under_fsdp_ends_as_one_under_ddp(folder):
    whole = folder / "fsdp" / "whole"
    best = Path(json.loads((whole / "trainer_state.json").read_text())["best_model_checkpoint"]).name
    for name in ("checkpoint-5", best):
        ours, ddp = (load_file(folder / way / "whole" / name / "model.safetensors") for way in ("fsdp", "ddp"))
        for key, weight in ours.items():
            torch.testing.assert_close(weight, ddp[key], rtol=1e-4, atol=1e-6)
    kept = load_file(whole / "model.safetensors")
    assert [key for key, weight in ours.items() if not torch.equal(weight, kept[key])] == []
    assert kept.keys() == load_file(folder / "ddp" / "whole" / "model.safetensors").keys()
    assert any((whole / "checkpoint-5").glob("pytorch_model_fsdp_0/__1_*.distcp"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "output"), [("tiny", "whole"), ("again", "again")])
def test_tensor_parallelism_trains_as_one_process(folder, tmp_path, name, output):
    """
    The same batches, dropout, losses and scores, a fresh model and one that goes on in packed batches and ends with
    a checkpoint on its way; what is saved is whole and says nothing of processes.
    """
    changes = ["training.tensor_parallel_size=1", f"training.output_dir={tmp_path}"]
    one, two = train(load_experiment(folder / "tp" / f"{name}.yaml", changes)), folder / "tp" / output
    expected, weights = (load_file(run / "model.safetensors") for run in (one, two))
    assert weights.keys() == expected.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-3, atol=1e-5, msg=key)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-5)
    assert len(losses_of(two)) == ranks.STOPPED + 1
    for score, other in zip(scores_of(two), scores_of(one), strict=True):
        assert score == pytest.approx(other, abs=1e-5)
    assert log_of(two)["num_input_tokens_seen"] == log_of(one)["num_input_tokens_seen"] > 0
    best = Path(log_of(two)["best_model_checkpoint"])
    assert best.name == Path(log_of(one)["best_model_checkpoint"]).name
    assert (best.name == "checkpoint-5") == (output == "whole")
    assert all(torch.equal(weights[key], weight) for key, weight in load_file(best / "model.safetensors").items())
    for file in ("config.json", "generation_config.json", "test_results.json"):
        assert (two / file).read_text() == (one / file).read_text()
    assert json.loads((two / "complete.json").read_text())["processes"] == 1


@pytest.mark.slow
def test_tensor_parallelism_of_processes_on_the_cpu_is_refused(folder):
    sentence = "training.tensor_parallel_size needs GPUs: Accelerate refuses it for processes on the CPU"
    assert {(folder / "tp" / f"cpu-{rank}.txt").read_text() for rank in (0, 1)} == {sentence}


@pytest.mark.slow
def test_one_process_told_to_stop_in_an_evaluation_stops_both(folder):
    for rank in (0, 1):
        assert "stopped and saved after step 3;" in (folder / "ddp" / f"evaluating-{rank}.txt").read_text()
    assert [one.name for one in complete_checkpoints(folder / "ddp" / "evaluating")] == ["checkpoint-3"]


@pytest.mark.slow
def test_two_processes_make_the_same_steps_as_one(folder, tmp_path):
    """Each of two processes takes half of the batches; that is one process that accumulates two."""
    one = train(experiment(tmp_path / "one", training={**BUDGET, "gradient_accumulation_steps": 2}, **CHANGES))
    two = folder / "budget" / "run"
    assert log_of(two)["global_step"] == log_of(one)["global_step"] > 3
    expected = load_file(one / "model.safetensors")
    for name, weight in load_file(two / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
    assert log_of(folder / "stream" / "run")["global_step"] == 5


@pytest.mark.slow
def test_two_processes_have_one_tokenizer(folder):
    """And where the one that trains it finds a mistake, both end."""
    first, second = (json.loads((folder / f"tokenizer-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["refused"].startswith("tokenizer: vocab_size is 7, but a bpe tokenizer needs at least 261: 5 special")
    assert ">>0<<" in first["vocabulary"]
    assert ">>0<<" in (folder / "unigram" / "run" / "tokenizer.json").read_text()


@pytest.mark.slow
def test_what_fsdp_cannot_train_is_refused(folder):
    """Also where the launch file and not the experiment asks for it, in every process, before anything is written."""
    sentences = {
        "tiny": "training.ema_decay works with whole weights in each process and with FSDP of version 2; leave out "
        "DeepSpeed and FSDP of version 1",
        "recurrent": "a recurrent model has no layers that FSDP could share out among processes; leave out "
        "training.fsdp, or launch with configs/accelerate/ddp.yaml",
        "dropping": "model.layerdrop leaves out other layers in each process, and under FSDP and DeepSpeed's ZeRO-3 "
        "they would wait for each other's; set model.layerdrop=0, or launch with configs/accelerate/ddp.yaml",
    }
    for name, sentence in sentences.items():
        assert {(folder / "fsdp" / f"{name}.{rank}.txt").read_text() for rank in (0, 1)} == {sentence}
    assert list((folder / "refused").iterdir()) == []


def test_ties_under_fsdp_and_tensor_parallelism_at_once_are_refused():
    config = preset(**ranks.MODELS["tied_head"], **ranks.IDS, vocab_size=11)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match="train a model with share_embeddings=False and tie_lm_head=False, or leave"):
        model.maybe_distribute_model(model, DistributedConfig(fsdp_size=2, tp_size=2), None)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_taken(path):
    """By the class that `accelerate launch --config_file` reads them with, which refuses unknown keys."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text())
    assert config.num_processes == written["num_processes"]
    assert path.read_text().startswith(f"# accelerate launch --config_file configs/accelerate/{path.name} ")


@pytest.mark.parametrize("stage", [2, 3])
def test_settings_of_deepspeed(stage):
    """The form, and that the Trainer is to fill in the rest; test_deepspeed.py trains, where DeepSpeed is installed."""
    settings = json.loads((ROOT / "configs" / "accelerate" / f"deepspeed_zero{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    shared = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {settings[name] for name in shared} == {"auto"}
