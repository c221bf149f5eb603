"""Two processes end where one does: DDP, FSDP2 and tensor parallelism in float64, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from dragoman import preset
from dragoman.data.tokenizers import train_tokenizer
from training import ranks
from training.experiments import WORDS


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have done what ranks.py says, all in one start."""
    folder = tmp_path_factory.mktemp("two")
    tokenizer = train_tokenizer(WORDS, "word")
    sizes = {"d_model": 12, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 18, "decoder_ffn_dim": 20}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    for name, ties in {"model": True, "untied": False}.items():
        torch.manual_seed(3)
        config = preset("modern", **sizes, **ids, dropout=0.0, share_embeddings=ties, tie_lm_head=ties)
        model = AutoModelForSeq2SeqLM.from_config(config)
        model.generation_config.max_length = 9
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "model")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *sys.path])
    process = subprocess.run(
        [*launch, str(Path(ranks.__file__)), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
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


@pytest.mark.slow
def test_ddp_trains_as_one_process(folder):
    """Ten steps through the Trainer, the tokens of all processes counted."""
    ranks.with_the_trainer(folder, 1)
    assert len(losses(folder / "trainer-2.safetensors")) == 10
    # The Trainer adds the losses that it logs up in single precision.
    assert_same_training(folder / "trainer-2.safetensors", folder / "trainer-1.safetensors", of_losses=1e-6)


@pytest.mark.slow
def test_an_evaluation_that_generates_ends(folder):
    """Seven pairs for two processes, whose outputs end at different lengths."""
    one, two = (json.loads((folder / f"scores-{processes}.json").read_text()) for processes in (1, 2))
    assert one == two
    assert one["rows"] == 7


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start"), [("fsdp", "untied"), ("tp", "model")])
def test_sharded_models_train_as_whole_ones(folder, name, start):
    """
    The loss is made in chunks, and no process has all the weights (ranks.py asserts it). Without ties under FSDP2: the
    plan that Transformers applies leaves the other ends of a tied table behind after the first step.
    """
    ranks.by_hand(ranks.read_model(folder, start), folder, f"whole-{start}", 0, 1)
    assert_same_training(folder / f"{name}.safetensors", folder / f"whole-{start}.safetensors")


@pytest.mark.slow
def test_a_sharded_checkpoint_loads_into_one_process(folder):
    """Resharding from 2 to 1 by torch.distributed.checkpoint."""
    model = ranks.read_model(folder, "untied")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder / "sharded")
    model.load_state_dict(state)
    expected = load_file(folder / "fsdp.safetensors")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected[name]), name
    assert not any(torch.equal(before[name], weight) for name, weight in expected.items() if "k_proj.bias" not in name)


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
    """DeepSpeed is not installed here: what can be tested is the form, and that the Trainer is to fill in the rest."""
    settings = json.loads((ROOT / "configs" / "accelerate" / f"deepspeed_zero{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    shared = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {settings[name] for name in shared} == {"auto"}
