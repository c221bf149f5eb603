"""What a conversion keeps, what it decides from the weights, what it refuses, and what the result is good for."""

import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartModel,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from typer.testing import CliRunner

import dragoman.cli
from conftest import WITHOUT_THE_PACKAGE
from conversion.stock import case_of, converted, edit_config, parity, save
from dragoman import DragomanForConditionalGeneration
from dragoman.conversion import FAMILIES, checkpoint, convert
from dragoman.conversion.families import REFUSED
from dragoman.training.arguments import preset


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def logits_of(folder: Path, family: str) -> torch.Tensor:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model(**next(parity.batches(parity.FAMILIES[family], model.config))).logits


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("name", parity.FAMILIES)
def test_generation_settings_are_kept(name, tmp_path):
    folder = converted(case_of(name), tmp_path)
    before, after = (GenerationConfig.from_pretrained(path) for path in (tmp_path / "stock", folder))
    for key in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id", "max_length",
                "suppress_tokens", *parity.FAMILIES[name].generation):  # fmt: skip
        assert getattr(after, key) == getattr(before, key), key
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = GenerationConfig.from_pretrained(tmp_path / "again")
    assert again.to_diff_dict() == after.to_diff_dict()


def test_generation_settings_of_old_checkpoints_are_in_the_config(tmp_path):
    save(case_of("marian"), tmp_path / "stock")
    (tmp_path / "stock" / "generation_config.json").unlink()
    edit_config(tmp_path / "stock", num_beams=6, max_length=512, bad_words_ids=[[40]], forced_eos_token_id=0)
    folder = convert(tmp_path / "stock", tmp_path / "converted").folder
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.num_beams, settings.max_length, settings.bad_words_ids) == (6, 512, [[40]])
    assert (settings.forced_eos_token_id, settings.decoder_start_token_id) == (0, 40)


def test_a_model_without_a_length_gets_one(tmp_path):
    for name, length in (("bart", 31), ("t5", 512)):
        model = case_of(name).build()
        model.generation_config.max_length = None
        model.save_pretrained(tmp_path / name)
        folder = convert(tmp_path / name, tmp_path / f"converted {name}").folder
        assert GenerationConfig.from_pretrained(folder).max_length == length


@pytest.mark.parametrize("name", ["marian", "t5"])
def test_shards_are_read_and_written(name, tmp_path, monkeypatch):
    case = case_of(name)
    case.build().save_pretrained(tmp_path / "stock", max_shard_size="3KB")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 3
    whole = convert(tmp_path / "stock", tmp_path / "whole").folder
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "4KB")
    sharded = convert(tmp_path / "stock", tmp_path / "sharded").folder
    assert len(list(whole.glob("*.safetensors"))) == 1
    assert len(list(sharded.glob("*.safetensors"))) > 3
    one, other = (AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict() for folder in (whole, sharded))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(logits_of(whole, name), logits_of(converted(case, tmp_path / "unsharded"), name))


def test_one_shard_at_a_time_is_in_memory(tmp_path, monkeypatch):
    save(case_of("bart"), tmp_path / "stock")
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "4KB")
    sizes, alive = [], []
    write_file = checkpoint.save_file

    def save_and_watch(shard, *rest, **more):
        assert not any(reference() is not None for reference in alive)  # those of earlier shards are gone
        alive.extend(weakref.ref(tensor) for tensor in shard.values())
        sizes.append(sum(tensor.nbytes for tensor in shard.values()))
        write_file(shard, *rest, **more)

    monkeypatch.setattr(checkpoint, "save_file", save_and_watch)
    folder = convert(tmp_path / "stock", tmp_path / "converted", dtype="float32").folder
    assert len(sizes) > 3
    assert max(sizes) <= 4000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_are_stored_as_asked(dtype, tmp_path):
    save(case_of("t5"), tmp_path / "stock")
    folder = convert(tmp_path / "stock", tmp_path / "converted", dtype=dtype).folder
    assert {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()} == {f"torch.{dtype}"}
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert str(model.dtype) == f"torch.{dtype}"
    batch = next(parity.batches(parity.FAMILIES["t5"], model.config))
    assert model(**batch).loss.isfinite()


def test_the_card_names_the_origin(tmp_path):
    folder = converted(case_of("mbart"), tmp_path)
    card = (folder / "README.md").read_text()
    assert "# converted" in card
    assert "Converted with Dragoman from `stock`, a model of type `mbart`" in card
    assert str(tmp_path) not in card
    assert "library_name: transformers" in card


def test_a_checkpoint_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--small" / "snapshots" / "0123"
    save(case_of("pegasus"), snapshot)
    for branch in ("main", "old"):
        reference = snapshot.parents[1] / "refs" / branch
        reference.parent.mkdir(exist_ok=True)
        reference.write_text("0123" if branch == "main" else "4567")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    made = convert("org/small", tmp_path / "converted", revision="main")
    card = (made.folder / "README.md").read_text()
    assert "base_model: org/small" in card
    assert "[org/small](https://huggingface.co/org/small)" in card
    with pytest.raises(FileNotFoundError, match="'org/small' is no folder here and no model that the Hub or"):
        convert("org/small", tmp_path / "other", revision="old")


# ---------------------------------------------------------------- what the weights decide


def test_names_without_the_prefix_of_a_head(tmp_path):
    """As the base class writes them; the output layer is the shared table then."""
    model = case_of("bart").build()
    assert isinstance(model.model, BartModel)
    model.model.save_pretrained(tmp_path / "stock")
    assert "encoder.layers.0.fc1.weight" in load_file(tmp_path / "stock" / "model.safetensors")
    folder = convert(tmp_path / "stock", tmp_path / "converted").folder
    assert torch.equal(logits_of(folder, "bart"), logits_of(converted(case_of("bart"), tmp_path / "whole"), "bart"))


def test_ties_of_t5_come_from_the_weights(tmp_path):
    """The config of v1.1 and FLAN-T5 says tie_word_embeddings=False and means no scaling; the tie is elsewhere."""
    for flag in (True, False):
        for tied in (True, False):
            stock = tmp_path / f"{flag} {tied}"
            save(case_of("t5", head="tied"), stock)
            edit_config(stock, tie_word_embeddings=flag, scale_decoder_outputs=None)  # as they lie on the Hub

            def with_head(weights, tied=tied):
                weights["lm_head.weight"] = weights["shared.weight"] * (1.0 if tied else -1.0)

            edit_weights(stock, with_head)
            folder = convert(stock, tmp_path / f"converted {flag} {tied}").folder
            config = AutoConfig.from_pretrained(folder)
            assert config.logit_scale == (12**-0.5 if flag else None)
            assert config.tie_lm_head == tied
            assert config.share_embeddings
            assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (not tied)
            model = AutoModelForSeq2SeqLM.from_pretrained(stock, dtype=torch.float64).eval()
            batch = next(parity.batches(parity.FAMILIES["t5"], model.config))
            torch.testing.assert_close(logits_of(folder, "t5"), model(**batch).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tables", [("shared",), ("lm_head",), ("encoder.embed_tokens", "decoder.embed_tokens")])
def test_a_tied_table_may_lie_under_any_of_its_names(tables, tmp_path):
    save(case_of("t5"), tmp_path / "stock")

    def rename(weights):
        shared = weights.pop("shared.weight")
        weights.update({f"{name}.weight": shared.clone() for name in tables})

    edit_weights(tmp_path / "stock", rename)
    config = AutoConfig.from_pretrained(convert(tmp_path / "stock", tmp_path / "converted").folder)
    assert config.share_embeddings
    assert config.tie_lm_head


def test_a_bias_of_zeros_is_no_bias(tmp_path):
    for bias in ("no bias", "bias"):
        folder = converted(case_of("bart", bias=bias), tmp_path / bias)
        assert AutoConfig.from_pretrained(folder).lm_head_bias == (bias == "bias")


def test_stored_sinusoids_are_checked(tmp_path):
    stock = save(case_of("marian"), tmp_path / "stock")
    table = parity._sinusoids(31, 12, steps=6).half()
    edit_weights(stock, lambda weights: weights.update({"model.encoder.embed_positions.weight": table}))
    convert(stock, tmp_path / "converted")
    edit_weights(stock, lambda weights: weights.update({"model.encoder.embed_positions.weight": table.roll(1, 0)}))
    sentence = "encoder.embed_positions.weight holds other numbers than the sinusoids"
    with pytest.raises(ValueError, match=sentence):
        convert(stock, tmp_path / "other")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bart", "model.encoder.version"),
        ("m2m_100", "model.decoder.embed_positions.weights"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    ],
)
def test_weights_that_the_stock_class_ignores_are_no_obstacle(family, name, tmp_path):
    stock = save(case_of(family), tmp_path / "stock")
    edit_weights(stock, lambda weights: weights.update({name: torch.ones(3)}))
    assert convert(stock, tmp_path / "converted").parameters > 1000


# ---------------------------------------------------------------- what is refused


def test_all_that_does_not_fit_is_named_at_once(tmp_path):
    stock = save(case_of("bart"), tmp_path / "stock")

    def damage(weights):
        del weights["model.encoder.layers.1.fc2.bias"], weights["model.decoder.layers.0.encoder_attn.q_proj.weight"]
        weights["model.decoder.layers.2.fc1.weight"] = torch.ones(5, 12)
        weights["model.decoder.layers.1.fc1.bias"] = torch.ones(19, dtype=torch.int8)
        weights["classification_head.dense.weight"] = torch.ones(2, 2)
        weights["model.decoder.layers.7.fc1.bias"] = torch.ones(2)

    edit_weights(stock, damage)
    with pytest.raises(ValueError) as error:
        convert(stock, tmp_path / "converted")
    assert str(error.value) == (
        f"{stock} cannot be converted as 'bart': it lacks decoder.layers.0.encoder_attn.q_proj.weight, "
        "encoder.layers.1.fc2.bias; decoder.layers.1.fc1.bias holds torch.int8, which are no weights as trained; "
        "decoder.layers.2.fc1.weight gives a shape of (5, 12) where the configuration wants (19, 12); "
        "nothing in the model corresponds to classification_head.dense.weight, decoder.layers.7.fc1.bias."
    )
    assert {path.name for path in tmp_path.iterdir()} == {"stock"}  # and nothing is left behind


def test_an_encoder_alone_is_refused(tmp_path):
    stock = save(case_of("t5"), tmp_path / "stock")

    def behead(weights):
        for name in [name for name in weights if name.startswith("decoder.")]:
            del weights[name]

    edit_weights(stock, behead)
    with pytest.raises(ValueError, match=r"it lacks decoder\.block\.0\.layer\.0\.SelfAttention\.k\.weight, decoder"):
        convert(stock, tmp_path / "converted")


CONFIGS = {
    "unknown": ({"model_type": "gpt2"}, "is of type 'gpt2'; converters exist for marian, bart, mbart, pegasus"),
    "untyped": ({"model_type": None}, "is of type None; converters exist for"),
    "ours": ({"model_type": "dragoman"}, "is a Dragoman checkpoint already"),
    "quantized": ({"quantization_config": {"bits": 4}}, "holds quantized weights: convert the original"),
    "layerdrop": (
        {"encoder_layerdrop": 0.1},
        "cannot be converted: encoder_layerdrop=0.1 and decoder_layerdrop=0.0 differ, but Dragoman has one rate",
    ),
    "activation": ({"activation_function": "swoosh"}, "cannot be converted: activation_function='swoosh' is unknown"),
    "dropout": ({"dropout": 1.5}, "cannot be converted: dropout=1.5 must be at least 0 and less than 1"),
}


@pytest.mark.parametrize(("changes", "sentence"), CONFIGS.values(), ids=CONFIGS)
def test_configurations_that_cannot_be_expressed(changes, sentence, tmp_path):
    stock = save(case_of("bart"), tmp_path / "stock")
    edit_config(stock, **changes)
    with pytest.raises(ValueError, match=re.escape(f"{stock} {sentence}")) as error:
        convert(stock, tmp_path / "converted")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_relatives_that_cannot_be_expressed(kind, tmp_path):
    assert kind not in FAMILIES
    AutoConfig.for_model(kind)  # it exists
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"type '{kind}', which Dragoman cannot express: {re.escape(REFUSED[kind])}"):
        convert(tmp_path, tmp_path / "converted")


def test_foreign_code_is_not_run(tmp_path):
    stock = save(case_of("bart"), tmp_path / "stock")
    (stock / "configuration_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(stock, auto_map={"AutoConfig": "configuration_evil.EvilConfig"})
    with pytest.raises(ValueError, match=r"brings modeling code of its own .* which is never run here"):
        convert(stock, tmp_path / "converted")
    edit_config(stock, auto_map=None)
    tokenizer = {"auto_map": {"AutoTokenizer": ["configuration_evil.Evil", None]}, "tokenizer_class": "Evil"}
    (stock / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"the tokenizer of .*stock cannot be loaded"):
        convert(stock, tmp_path / "converted")
    assert {path.name for path in tmp_path.iterdir()} == {"stock"}


def test_folders_that_hold_no_checkpoint(tmp_path):
    output = tmp_path / "converted"
    with pytest.raises(FileNotFoundError, match="holds no model"):
        convert(tmp_path, output)
    stock = save(case_of("bart"), tmp_path / "stock")
    for missing in (tmp_path / "nowhere", "./nowhere", stock / "config.json"):
        with pytest.raises(FileNotFoundError, match=r"(does not exist|is a file): give the folder of a saved model"):
            convert(missing, output)
    with pytest.raises(ValueError, match="is for a name on the Hub"):
        convert(stock, output, revision="main")
    (stock / "model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as a safetensors file"):
        convert(stock, output)
    (stock / "model.safetensors").rename(stock / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no weights in safetensors files .* It has pytorch_model.bin; where"):
        convert(stock, output)
    assert not output.exists()


def test_the_output_folder_must_be_free(tmp_path):
    stock = save(case_of("bart"), tmp_path / "stock")
    with pytest.raises(ValueError, match="stock is not empty: choose a new folder"):
        convert(stock, stock)
    with pytest.raises(ValueError, match=r"config\.json is not empty"):
        convert(stock, stock / "config.json")
    (tmp_path / "empty").mkdir()
    assert convert(stock, tmp_path / "empty").folder.is_dir()
    assert convert(stock, tmp_path / "deep" / "er").folder.is_dir()


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    stock = save(case_of("bart"), tmp_path / "stock")

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(stock, tmp_path / "converted")
    assert {path.name for path in tmp_path.iterdir()} == {"stock"}


# ---------------------------------------------------------------- the command


def dragoman_command(*arguments):
    return CliRunner().invoke(dragoman.cli.app, [str(argument) for argument in arguments])


def test_the_command(tmp_path):
    stock = save(case_of("t5"), tmp_path / "stock")
    result = dragoman_command("convert", stock, tmp_path / "converted", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    count = AutoModelForSeq2SeqLM.from_pretrained(stock).num_parameters()
    assert result.stdout == (
        f"{stock} (t5, {count:,} parameters) without a tokenizer, since it has none: now a Dragoman model in "
        f"{tmp_path}/converted\n"
    )
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "converted"), DragomanForConditionalGeneration)
    for arguments, sentence in (
        ((stock, tmp_path / "converted"), f"{tmp_path}/converted is not empty: choose a new folder"),
        ((stock, tmp_path / "x", "--dtype", "fp8"), "dtype 'fp8' is unknown: use float32, bfloat16, float16, float64."),
        (
            (tmp_path / "x", tmp_path / "y"),
            f"{tmp_path}/x does not exist: give the folder of a saved model, or its name",
        ),
    ):
        result = dragoman_command("convert", *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"dragoman convert: {sentence}")
        assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------- what the result is good for


@pytest.mark.parametrize("name", ["mbart", "t5"])
def test_a_converted_model_learns(name, tmp_path):
    """Fine-tuned by the stock trainer, from labels alone; its loss falls, and what it saves loads again."""
    folder = converted(case_of(name), tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    eos = model.config.eos_token_id
    rows = [[5 + number % 7, 9 + number % 5, 20 + number % 3] for number in range(40)]
    data = Dataset.from_list([{"input_ids": [*row, eos], "labels": [*reversed(row), eos]} for row in rows])

    def collate(features):
        return {name: torch.tensor([feature[name] for feature in features]) for name in features[0]}

    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=100, per_device_train_batch_size=8,
            learning_rate=2e-2, logging_steps=20, save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=data,
        data_collator=collate,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "tuned").eval()
    batch = collate([data[0]])
    torch.testing.assert_close(tuned(**batch).loss, model.eval()(**batch).loss)


@pytest.mark.parametrize(
    "case",
    [
        case_of("marian", vocabularies="two", bias="bias"),
        case_of("bart", ties="tied", bias="bias"),
        case_of("mbart", ties="untied"),
        case_of("t5", head="own head"),
    ],
    ids=str,
)
def test_a_converted_vocabulary_grows(case, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(converted(case, tmp_path), dtype=torch.float64).eval()
    batch = next(parity.batches(parity.FAMILIES[case.family], model.config))
    before, size = model(**batch).logits, model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    after = model(**batch).logits
    torch.testing.assert_close(after[..., :size], before, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path / "grown")
    grown = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "grown").eval()
    assert grown(**batch).logits.shape[-1] == size + 3
    torch.testing.assert_close(grown(**batch).logits, after, rtol=0, atol=1e-12)


READER = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from transformers import AutoModelForSeq2SeqLM

for path in sys.argv[1:]:
    model = AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    result = {"logits": model(input_ids=ids, labels=ids).logits, "beams": model.generate(ids, num_beams=3)}
    torch.save(result, path + "/result.pt")
"""
)


def test_converted_checkpoints_load_without_the_package(tmp_path):
    folders = [converted(case_of(name), tmp_path / name) for name in ("m2m_100", "mbart", "t5")]
    (tmp_path / "reader.py").write_text(READER)
    process = subprocess.run(
        [sys.executable, tmp_path / "reader.py", *folders],
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
        | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    ids = torch.tensor([[5, 6, 7, 8]])
    for folder in folders:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        found = torch.load(folder / "result.pt", weights_only=True)
        assert torch.equal(found["logits"], model(input_ids=ids, labels=ids).logits)
        assert torch.equal(found["beams"], model.generate(ids, num_beams=3))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("marian", {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
                    "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048,
                    "activation_function": "swish", "scale_embedding": True, "max_position_embeddings": 512}),
        ("bart", {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12,
                  "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}),
        ("t5", {"d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_the_preset_of_this_name_is_what_a_checkpoint_becomes(name, theirs):
    """opus-mt, bart-base and t5-v1_1-small, as their config.json files say."""
    settings = FAMILIES[name].settings(AutoConfig.for_model(name, **theirs).to_dict())
    written = preset(name, vocab_size=53).to_dict()
    own = {"vocab_size", "init_std", "bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"}
    assert {key: written[key] for key in settings if key not in own} == {
        key: value for key, value in settings.items() if key not in own
    }
