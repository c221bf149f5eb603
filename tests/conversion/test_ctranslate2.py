"""CTranslate2 models against the PyTorch models they were made of: the same tokens, and the same scores."""

import json

import pytest
import torch

from conftest import EOS, PAD, B, V, family, make_batch
from dragoman import DragomanForConditionalGeneration, preset
from dragoman.data.tokenizers import train_tokenizer
from dragoman.models.processing_dragoman import DragomanProcessor


ctranslate2 = pytest.importorskip("ctranslate2", reason="needs the extra [export]")
from dragoman.conversion.ctranslate2 import inexpressible, vocabulary, write  # noqa: E402


TOKENIZER = train_tokenizer(["abcdefghijklmnopqrs"], kind="char")
TOKENS = vocabulary(TOKENIZER, V)
SIZES = {
    "vocab_size": V,
    "d_model": 12,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 17,
    "decoder_ffn_dim": 19,
    "max_position_embeddings": 29,
}


def disturbed(model):
    """In a fresh model norms are all ones and biases all zeros, and nobody would see them forgotten."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.generation_config.max_length = 11
    return model.eval()


def translator(model, folder, processing_class=TOKENIZER, quantization="float32"):
    write(folder, model, processing_class, quantization)
    return ctranslate2.Translator(str(folder), intra_threads=1)


def rows_of(ids, tokens):
    return [[tokens[token] for token in row if token != PAD] for row in ids.tolist()]


def assert_equal_outputs(model, folder, processing_class=TOKENIZER, sources=TOKENS, targets=TOKENS):
    batch = make_batch()
    exported = translator(model, folder, processing_class)
    for beams in (1, 5):
        found = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=beams, early_stopping=beams > 1,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        theirs = exported.translate_batch(
            rows_of(batch["input_ids"], sources), beam_size=beams, max_decoding_length=10, min_decoding_length=0,
            return_end_token=True, return_scores=True,
        )  # fmt: skip
        for row, result in zip(found.sequences[:, 1:].tolist(), theirs, strict=True):
            row = row[: row.index(EOS) + 1] if EOS in row else row
            (hypothesis,) = result.hypotheses
            assert [targets[token] for token in row[: len(hypothesis)]] == hypothesis
            assert set(row[len(hypothesis) :]) <= {PAD}
        if beams > 1:
            scores = torch.tensor([result.scores[0] for result in theirs])
            torch.testing.assert_close(scores, found.sequences_scores, rtol=1e-4, atol=1e-4)
    labels = batch["labels"].masked_fill(batch["labels"] == -100, PAD)
    scores = exported.score_batch(rows_of(batch["input_ids"], sources), [row[:-1] for row in rows_of(labels, targets)])
    decoder_inputs = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=decoder_inputs).logits
    expected = logits.log_softmax(-1).gather(2, labels[:, :, None]).squeeze(2)
    for number, score in enumerate(scores):
        length = len(score.log_probs)
        assert length == (labels[number] != PAD).sum()
        torch.testing.assert_close(torch.tensor(score.log_probs), expected[number, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["transformer_2017", "transformer_prenorm", "marian", "bart", "t5", "modern", "deep_shallow"]
)
def test_presets_give_the_same(name, tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "dropout": 0.0}
    if name == "t5":
        sizes |= {"encoder_head_dim": 5, "decoder_head_dim": 4}
    model = DragomanForConditionalGeneration(preset(name, **sizes))
    assert_equal_outputs(disturbed(model), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "lm_head_bias": True, "logit_scale": 0.7},
        {"attention_scaling": 0.9, "scale_embedding": True, "tie_lm_head": False, "share_embeddings": False},
        {"norm_position": "post", "final_norm": True, "embedding_norm": True},
        {"final_norm": False, "norm_type": "layernorm", "gated_mlp": False, "activation_function": "quick_gelu"},
        {"position_embedding_type": "none", "encoder_num_key_value_heads": 1, "decoder_num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"position_embedding_type": "sinusoidal", "sinusoid_endpoint": True, "sinusoid_offset": 2},
        {"activation_function": "tanh", "norm_eps": 0.1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_give_the_same(changes, tmp_path):
    model = family("modern").build(dtype=torch.float32, **changes)
    assert inexpressible(model.config) == []
    assert_equal_outputs(disturbed(model), tmp_path)


def test_two_vocabularies(tmp_path):
    target = train_tokenizer(["zyxwvutsrqponmlkjih"], kind="char")
    source = train_tokenizer(["abcdefghijklmnopqrstuvwxyz"], kind="char")
    model = family("prenorm").build(dtype=torch.float32, source_vocab_size=35)
    sources, targets = vocabulary(source, 35), vocabulary(target, V)
    assert sources[30:] == [f"<unused_{number}>" for number in range(30, 35)]
    assert_equal_outputs(disturbed(model), tmp_path, DragomanProcessor(source, target), sources, targets)
    for name, tokens in (("source", sources), ("target", targets)):
        assert json.loads((tmp_path / f"{name}_vocabulary.json").read_text()) == tokens


@pytest.mark.parametrize("quantization", ["int8", "int8_float32", "int16"])
def test_fewer_bits_give_nearly_the_same(quantization, tmp_path):
    model, batch = family("modern").build(dtype=torch.float32, d_model=32, init_std=0.1), make_batch()
    rows, targets = rows_of(batch["input_ids"], TOKENS), [TOKENS[4:9]] * B
    scores, sizes = [], []
    for kind in ("float32", quantization):
        (tmp_path / kind).mkdir()
        exported = translator(model, tmp_path / kind, quantization=kind)
        scores.append(torch.tensor([score.log_probs for score in exported.score_batch(rows, targets)]))
        sizes.append((tmp_path / kind / "model.bin").stat().st_size)
        assert len(exported.translate_batch(rows, beam_size=5, max_decoding_length=6)) == B
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=0.1)
    assert not torch.equal(scores[1], scores[0])
    assert sizes[1] < 0.7 * sizes[0]


def test_all_that_cannot_be_expressed_is_named():
    config = family("learned").config(attention_direction="unidirectional", activation_function="mish")
    assert inexpressible(config, [2, 5]) == [
        "activation_function='mish'", "attention_direction='unidirectional'", "qk_norm=True", "eos_token_id=[2, 5]",
    ]  # fmt: skip
    rotary = family("modern").config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    (only,) = inexpressible(rotary)
    assert only.startswith("rope_parameters={")


def test_a_tokenizer_of_another_model():
    with pytest.raises(ValueError, match=r"the tokenizer has the id 2\d, but .* has the ids 0 to 19"):
        vocabulary(TOKENIZER, 20)
