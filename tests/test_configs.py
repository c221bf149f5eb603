"""Every file of configs/ goes through the real parser and becomes a model that computes a loss."""

import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from dragoman.training.arguments import load_experiment, preset, preset_names


CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(CONFIGS.glob("*.yaml"))
PRESETS = sorted(CONFIGS.glob("models/*.yaml"))
SMALL_RNN = {"embedding_dim": 10, "hidden_size": 14}
SMALL_TRANSFORMER = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 17,
    "decoder_ffn_dim": 19,
}


def assert_it_runs(config):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    ids = torch.tensor([[5, 6, 7, 2], [8, 2, 1, 1]])
    loss = model(input_ids=ids, attention_mask=(ids != 1).long(), labels=torch.tensor([[9, 2], [10, 2]])).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_experiments_parse_and_build(path):
    experiment = load_experiment(path)
    assert_it_runs(experiment.model_config(vocab_size=53))


@pytest.mark.parametrize("path", [*EXPERIMENTS, *PRESETS], ids=lambda path: path.name)
def test_experiments_start_with_their_launch_command(path):
    command = path.read_text().splitlines()[0]
    match = re.fullmatch(r"# dragoman train (\S+)((?: \w+\.\w+=\S+)*)", command)
    assert match, command
    load_experiment(CONFIGS.parent / match[1], match[2].split())


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_key_is_explained_where_it_stands(path):
    for line in path.read_text().splitlines():
        assert "#" in line or not re.match(r" +\w+:", line), f"{path.name}: {line}"


@pytest.mark.parametrize("name", preset_names())
def test_presets_build_small(name):
    recurrent = preset(name).model_type == "dragoman_rnn"
    assert_it_runs(preset(name, vocab_size=53, **(SMALL_RNN if recurrent else SMALL_TRANSFORMER)))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_presets_name_their_family_first(path):
    keys = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert keys[0].startswith("model_type: dragoman")


def test_the_package_holds_the_same_files():
    packaged = resources.files("dragoman") / "configs"
    assert {entry.name for entry in packaged.iterdir()} >= {path.name for path in EXPERIMENTS}
    assert {Path(path.name).stem for path in PRESETS} == set(preset_names())


def test_sizes_of_the_presets():
    # parameter counts with 8,000 joint ids, worked out by hand from the sizes in the files
    table = 8000 * 512
    attention = 4 * 512 * 512
    gated = 3 * 512 * 1408
    plain = 2 * 512 * 2048 + 2048 + 512
    sizes = {
        "modern": table + 6 * (attention + gated + 2 * 512) + 6 * (2 * attention + gated + 3 * 512) + 2 * 512,
        "transformer_2017": table + 6 * (attention + plain + 4 * 512) + 6 * (2 * attention + plain + 6 * 512),
    }
    for name, size in sizes.items():
        with torch.device("meta"):
            model = AutoModelForSeq2SeqLM.from_config(preset(name, vocab_size=8000))
        assert model.num_parameters() == size, name
