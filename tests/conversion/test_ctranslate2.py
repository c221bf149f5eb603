"""CTranslate2 models against the PyTorch models they were made of: the same tokens, and the same scores."""

import json
from importlib import import_module

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from conftest import EOS, PAD, B, V, family, make_batch
from dragoman import DragomanForConditionalGeneration, preset
from dragoman.data.tokenizers import train_tokenizer
from dragoman.models.processing_dragoman import DragomanProcessor


ctranslate2 = pytest.importorskip("ctranslate2", reason="needs the extra [export]")
from dragoman.conversion.ctranslate2 import ACTIVATIONS, inexpressible, vocabulary, write  # noqa: E402


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


def assert_equal_outputs(model, folder, processing_class=TOKENIZER, sources=TOKENS, targets=TOKENS, ends=(EOS,)):
    batch = make_batch()
    exported = translator(model, folder, processing_class)
    for beams in (1, 5):
        found = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=beams, early_stopping=beams > 1,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        theirs = exported.translate_batch(
            rows_of(batch["input_ids"], sources), beam_size=beams, max_decoding_length=10, min_decoding_length=0,
            return_end_token=True, return_scores=True, end_token=list(ends),
        )  # fmt: skip
        for row, result in zip(found.sequences[:, 1:].tolist(), theirs, strict=True):
            row = row[: next((place for place, token in enumerate(row, 1) if token in ends), len(row))]
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
        {"position_embedding_type": "sinusoidal", "sinusoid_endpoint": True, "sinusoid_offset": 2},
        {"norm_eps": 0.1, "activation_function": "tanh"},
        {"qk_norm": True, "encoder_attention_heads": 3, "decoder_attention_heads": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_give_the_same(changes, tmp_path):
    model = family("modern").build(dtype=torch.float32, **changes)
    assert inexpressible(model.config) == []
    assert_equal_outputs(disturbed(model), tmp_path)


@pytest.mark.parametrize("kind", sorted(set(ACTIVATIONS.values())), ids=lambda kind: kind.name)
def test_activations_give_the_same(kind, tmp_path):
    name, *others = [name for name, known in ACTIVATIONS.items() if known == kind]
    model = family("modern").build(dtype=torch.float32, activation_function=name, init_std=0.6)
    assert_equal_outputs(disturbed(model), tmp_path)
    numbers = torch.linspace(-9, 9, 101)
    for other in others:
        torch.testing.assert_close(ACT2FN[other](numbers), ACT2FN[name](numbers), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "proportional", "factor": 2.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 0.2, "high_freq_factor": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 0.1},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 0.1, "attention_factor": 0.6},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotations_give_the_same(rope, tmp_path):
    rope = {**rope, "rope_theta": 50.0}
    if rope["rope_type"] in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = 8
    model = family("modern").build(
        dtype=torch.float32, init_std=0.6, encoder_head_dim=10, decoder_head_dim=8, max_position_embeddings=32,
        rope_parameters=rope,
    )  # fmt: skip
    if rope["rope_type"] in ("llama3", "yarn"):  # some frequencies are left, some between, some divided by the factor
        rotary = model.model.encoder.rotary_emb
        factors = (rotary.compute_default_rope_parameters(rotary.config)[0] / rotary.inv_freq).tolist()
        assert factors[0] == 1 < factors[1] < factors[-1] == pytest.approx(4)
    assert_equal_outputs(disturbed(model), tmp_path)


def test_several_ends(tmp_path):
    model = disturbed(family("modern").build(dtype=torch.float32, init_std=0.5))
    ends = [EOS, 5, 9, 11]
    model.generation_config.eos_token_id = ends
    (tmp_path / "first").mkdir()
    assert write(tmp_path / "first", model, TOKENIZER, "float32")["eos_token_id"] == ends
    (tmp_path / "second").mkdir()
    assert_equal_outputs(model, tmp_path / "second", ends=ends)


class NormOfAllHeads(nn.Module):
    """RMSNorm over the queries of all heads (B, H, T, d) as one vector, with a weight of its own for each head."""

    def __init__(self, norm, heads):
        super().__init__()
        self.weight, self.eps = nn.Parameter(norm.weight.data.repeat(heads)), norm.eps

    def forward(self, query):
        together = query.transpose(1, 2).flatten(2)
        normed = nn.functional.rms_norm(together, self.weight.shape, self.weight, self.eps)
        return normed.view(query.transpose(1, 2).shape).transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_why_norms_of_queries_and_keys_need_a_decoder_of_one_head(groups, tmp_path, monkeypatch):
    model = family("modern").build(
        dtype=torch.float32, qk_norm=True, decoder_attention_heads=4, decoder_num_key_value_heads=groups,
        decoder_head_dim=6,
    )  # fmt: skip
    assert inexpressible(model.config) == ["qk_norm=True with decoder_attention_heads=4"]
    monkeypatch.setattr(import_module(write.__module__), "inexpressible", lambda config: [])
    for layer in model.model.decoder.layers:
        layer.cross_attn.q_norm = NormOfAllHeads(layer.cross_attn.q_norm, 4)
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
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
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
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_all_that_cannot_be_expressed_is_named():
    config = family("learned").config(attention_direction="unidirectional", activation_function="mish")
    assert inexpressible(config) == [
        "activation_function='mish'", "attention_direction='unidirectional'",
        "qk_norm=True with decoder_attention_heads=2",
    ]  # fmt: skip
    long = {"long_factor": [3.0] * 3, "short_factor": [1.0] * 3, "original_max_position_embeddings": 8}
    for rope in ({"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "factor": 2.0, **long}):
        (only,) = inexpressible(family("modern").config(rope_parameters={**rope, "rope_theta": 1e4}))
        assert only.startswith("rope_parameters={")
        assert rope["rope_type"] in only


def test_a_tokenizer_of_another_model():
    with pytest.raises(ValueError, match=r"the tokenizer has the id 2\d, but .* has the ids 0 to 19"):
        vocabulary(TOKENIZER, 20)
