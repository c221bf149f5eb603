"""`dragoman train` with configs/accelerate/deepspeed_zero*.json, where DeepSpeed is installed: two processes, gloo.

DS_BUILD_OPS=0 pip install deepspeed
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers.integrations import is_deepspeed_available

from dragoman.models import loss
from dragoman.training.arguments import load_experiment
from dragoman.training.run import train
from dragoman.training.trainer import DurableTrainer
from training.experiments import shorten_trainings, write_experiment
from training.test_batches import log_of


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed (pip install deepspeed)"),
]
ROOT = Path(__file__).parents[2]
STOPPED = 3  # the step in which a process is told to stop
REFUSED = {
    "averaged": (["training.ema_decay=0.8"], "leave out DeepSpeed and FSDP of version 1"),
    "dropping": (["model.layerdrop=0.5"], "set model.layerdrop=0, or launch with configs/accelerate/ddp.yaml"),
    "recurrent": (["model.preset=lstm_bahdanau"], "take configs/accelerate/deepspeed_zero2.json"),
}


def train_in_two_processes(path: Path) -> None:
    """
    What each process does: trains without a break; again with a SIGTERM to one of the processes, and resumes that; and
    what is refused. Loss in chunks, of which the processes would have different numbers.
    """
    import deepspeed

    shorten_trainings()
    loss.LOGITS_AT_A_TIME, loss.FEWEST_ROWS_AT_A_TIME = 11, 3
    original, stopping, stage = DurableTrainer.training_step, False, int(path.stem[-1])

    def step(self, model, *args, **kwargs):
        assert isinstance(model, deepspeed.DeepSpeedEngine)
        assert model.zero_optimization_stage() == stage
        if stopping and self.state.global_step == STOPPED - 1 and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, *args, **kwargs)

    def run(name: str, *changes: str, resume: bool = False) -> None:
        AcceleratorState._reset_state()
        train(load_experiment(path, [f"training.output_dir={path.with_suffix('') / name}", *changes]), resume=resume)

    DurableTrainer.training_step = step
    run("whole")
    stopping = True
    with pytest.raises(KeyboardInterrupt, match=f"stopped and saved after step {STOPPED};"):
        run("stopped")
    stopping = False
    run("stopped", resume=True)
    for name, (changes, sentence) in REFUSED.items():
        if stage == 3 or name == "averaged":
            with pytest.raises(ValueError, match=sentence):
                run(name, *changes)


@pytest.fixture(scope="module", params=[2, 3])
def folder(tmp_path_factory, request):
    """Where two processes have trained a model on, with this stage of ZeRO."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    training = {"max_steps": 5, "logging_steps": 1, "per_device_train_batch_size": 2}
    path = write_experiment(folder, training={**training, "gradient_accumulation_steps": 2})
    sections = yaml.safe_load(path.read_text())
    start = train(load_experiment(path, ["training.max_steps=1", f"training.output_dir={folder / 'start'}"]))
    sections["model"] = {"from_pretrained": str(start), "dropout": 0.0}
    del sections["tokenizer"]
    (folder / "one.yaml").write_text(yaml.safe_dump(sections))
    settings = ROOT / "configs" / "accelerate" / f"deepspeed_zero{request.param}.json"
    sections["training"] |= {"deepspeed": str(settings), "gradient_accumulation_steps": 1}
    (folder / f"zero{request.param}.yaml").write_text(yaml.safe_dump(sections))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / "configs" / "accelerate" / "ddp_cpu.yaml"), __file__]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *sys.path])
    process = subprocess.run(
        [*launch, str(folder / f"zero{request.param}.yaml")],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return folder


def test_trains_as_one_process(folder):
    """And scores, in evaluations that generate: the processes decode sentences of unlike lengths."""
    one = train(load_experiment(folder / "one.yaml", [f"training.output_dir={folder / 'one'}"]))
    two = next(folder.glob("zero?")) / "whole"
    weights, expected = (load_file(run / "model.safetensors") for run in (two, one))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    losses, scores = (
        [[log[name] for log in log_of(run)["log_history"] if name in log] for run in (two, one)]
        for name in ("loss", "eval_chrf")
    )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert scores[0] == scores[1]
    assert (len(losses[0]), len(scores[0])) == (5, 3)
    assert (two / "test_results.json").read_text() == (one / "test_results.json").read_text()
    assert json.loads((two / "complete.json").read_text())["processes"] == 2


def test_one_process_told_to_stop_stops_both(folder):
    """Resumed, the run ends as one that was left alone, bit for bit."""
    whole, stopped = (next(folder.glob("zero?")) / name for name in ("whole", "stopped"))
    assert (stopped / f"checkpoint-{STOPPED}" / "complete.json").is_file()
    one, other = (load_file(run / "model.safetensors") for run in (whole, stopped))
    assert [name for name, weight in one.items() if not torch.equal(weight, other[name])] == []


if __name__ == "__main__":
    train_in_two_processes(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
