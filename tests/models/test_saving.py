"""Checkpoints: what is in them, and that they load with the package, and without it where code may be run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

import dragoman
from conftest import WITHOUT_THE_PACKAGE, B, S, T, V, make_batch, transformer


MODELS = Path(dragoman.__file__).parent / "models"


def test_save_and_load_is_exact(any_family, batch, tmp_path):
    model = any_family.build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(again) is any_family.model_class
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    for (name, one), (other_name, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    # Loaded weights may lie at other addresses, from which some kernels add up in another order.
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)
    assert again.generation_config.max_length == 11
    assert isinstance(AutoConfig.from_pretrained(tmp_path), any_family.config_class)
    assert AutoModel.from_pretrained(tmp_path).config.model_type == model.config.model_type


def test_tied_weights_are_saved_once(any_family, tmp_path):
    model = any_family.build()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    parameters = {name for name, _ in model.named_parameters()}  # each tied table once
    buffers = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    assert saved == parameters | buffers
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors"}


@pytest.mark.parametrize("share_embeddings", [True, False])
@pytest.mark.parametrize("tie_lm_head", [True, False])
@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_the_ties_are_independent(share_embeddings, tie_lm_head, tie_word_embeddings, tmp_path):
    settings = {"share_embeddings": share_embeddings, "tie_lm_head": tie_lm_head}
    one = transformer("ties", **settings, tie_word_embeddings=tie_word_embeddings)
    model = one.build()
    model.save_pretrained(tmp_path)
    for candidate in (model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path)):
        encoder, decoder = candidate.model.encoder.embed_tokens.weight, candidate.model.decoder.embed_tokens.weight
        assert (encoder is decoder) == (share_embeddings and tie_word_embeddings)
        assert (candidate.lm_head.weight is decoder) == (tie_lm_head and tie_word_embeddings)


def test_vocabularies_grow(any_family, batch):
    model = any_family.build()
    before = model(**batch).logits
    model.resize_token_embeddings(V + 4)
    assert model.config.vocab_size == V + 4
    assert model.get_output_embeddings().weight.shape[0] == V + 4
    after = model(**batch).logits
    assert after.shape == (B, T, V + 4)
    torch.testing.assert_close(after[..., :V], before, rtol=0, atol=1e-12)
    labels = batch["labels"].clone()
    labels[0, 0] = V + 3
    assert model(**{**batch, "labels": labels}).loss.isfinite()
    sources = model.config.source_vocab_size or model.config.vocab_size
    assert model.get_input_embeddings().weight.shape[0] == sources


def test_vocabularies_of_sources_grow(any_family, batch, tmp_path):
    model = any_family.build()
    if model.config.source_vocab_size is None:
        with pytest.raises(ValueError, match="share one vocabulary: use resize_token_embeddings, which resizes both"):
            model.resize_source_token_embeddings(V + 4)
        return
    before, size = model(**batch).logits, model.config.source_vocab_size
    model.resize_source_token_embeddings(size + 4)
    assert (model.config.source_vocab_size, model.config.vocab_size) == (size + 4, V)
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path)
    grown = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    torch.testing.assert_close(grown(**batch).logits, before, rtol=0, atol=1e-12)
    batch["input_ids"][0, 0] = size + 3
    assert grown.generate(batch["input_ids"]).shape[0] == len(batch["input_ids"])


def test_import_lines_survive_the_trip():
    """Files travel flat: they may import siblings by one dot, and otherwise what every reader of a checkpoint has."""
    for path in MODELS.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from \.\.|from \. import|from dragoman|import dragoman|from \.\w+\.)", text, re.M)
        for module in re.findall(r"^\s*(?:from|import) (\w+)", text, re.M):
            allowed = {"torch", "transformers", "huggingface_hub", "safetensors"} | set(sys.stdlib_module_names)
            assert module in allowed, f"{path.name} imports {module}"
        for sibling in re.findall(r"^\s*from \.(\w+) import", text, re.M):
            assert (MODELS / f"{sibling}.py").exists()


STRATEGIES = [
    {"num_beams": 1},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 5},
    {"penalty_alpha": 0.6, "top_k": 4},
]

READER = (
    WITHOUT_THE_PACKAGE
    + """
import json
import torch
from transformers import AutoModelForSeq2SeqLM

for path, batch, strategies in json.load(open(sys.argv[1])):
    try:
        AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("loaded foreign code without being allowed to")
    model = AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    batch = {name: torch.tensor(value) for name, value in batch.items()}
    result = {"logits": model(**batch).logits}
    for number, strategy in enumerate(strategies):
        torch.manual_seed(3)
        result[str(number)] = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **strategy)
    torch.save(result, f"{path}/result.pt")
    model.save_pretrained(f"{path}/again")  # and it can be passed on
"""
)


def test_checkpoints_load_without_the_package(tmp_path):
    """In one process for all families, because importing Transformers takes seconds."""
    from conftest import FAMILIES

    work = []
    for one in FAMILIES:
        path = tmp_path / one.name.replace(" ", "_")
        one.build(dtype=torch.float32).save_pretrained(path)
        work.append([str(path), {name: value.tolist() for name, value in make_batch().items()}, STRATEGIES])
    (tmp_path / "work.json").write_text(json.dumps(work))
    (tmp_path / "reader.py").write_text(READER)
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    process = subprocess.run(
        [sys.executable, str(tmp_path / "reader.py"), str(tmp_path / "work.json")],
        env={**environment, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    for path, batch, strategies in work:
        model = AutoModelForSeq2SeqLM.from_pretrained(path)
        batch = {name: torch.tensor(value) for name, value in batch.items()}
        found = torch.load(f"{path}/result.pt", weights_only=True)
        assert torch.equal(found["logits"], model(**batch).logits)
        for number, strategy in enumerate(strategies):
            torch.manual_seed(3)
            sequences = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **strategy)
            assert torch.equal(found[str(number)], sequences)
        assert {file.name for file in Path(path, "again").glob("*.py")} == {
            file.name for file in Path(path).glob("*.py")
        }


def test_only_the_files_of_the_family_travel(any_family, tmp_path):
    any_family.build().save_pretrained(tmp_path)
    shipped = {path.name for path in tmp_path.glob("*.py")}
    recurrent = {path.name for path in MODELS.glob("*.py") if "rnn" in path.name or "recurrent" in path.name}
    if any_family.is_transformer:
        assert "modeling_dragoman.py" in shipped
        assert not shipped & recurrent
    else:
        assert "modeling_dragoman_rnn.py" in shipped
        assert not shipped & {"modeling_dragoman.py", "attention.py", "masks.py", "positions.py"}


def test_importing_is_light():
    """The package imports none of the libraries that it only works with."""
    code = """
import sys
import dragoman
heavy = {"datasets", "matplotlib", "gradio", "evaluate", "sacrebleu", "typer"} & set(sys.modules)
assert not heavy, heavy
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]


def test_sizes_of_the_tests_differ():
    """What these tests rely on."""
    from conftest import D, H

    assert len({B, S, T, D, H, V}) == 6
