"""Attention over real tokens alone (`attn_implementation="varlen"`), with slow kernels in the place of a GPU's."""

import inspect
import itertools

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AttentionInterface,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartModel,
    DynamicCache,
    EncoderDecoderCache,
)

import dragoman
import reference
from conftest import FAMILIES, POST_NORM_2017, B, D, H, S, T, V, family, make_batch, transformer
from dragoman.models import varlen
from dragoman.models.masks import cross_mask, decoder_self_mask, encoder_self_mask


def test_the_twin_takes_what_the_kernel_takes():
    ours, theirs = (inspect.signature(function).parameters for function in (reference.varlen_attn, varlen_attn))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


CAPABLE = [one for one in FAMILIES if one.is_transformer and one.name not in ("relative", "unordered")]
CAPABLE += [
    transformer("grouped", encoder_attention_heads=6, encoder_num_key_value_heads=3, decoder_attention_heads=6,
                decoder_num_key_value_heads=2, qk_norm=True, attention_scaling=0.7),
    transformer("wide heads", encoder_head_dim=8, decoder_head_dim=10, **POST_NORM_2017),
]  # fmt: skip


@pytest.fixture(params=CAPABLE, ids=lambda one: one.name)
def capable(request, varlen_on_cpu):
    return request.param


def outputs_and_gradients(model, implementation, **inputs):
    model.set_attn_implementation(implementation)
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return outputs.logits.detach(), outputs.encoder_last_hidden_state.detach(), outputs.loss.detach(), gradients


def assert_same(model, source_real, target_real, **inputs):
    """Logits, source states, loss and all gradients are those of the eager implementation."""
    logits, states, loss, gradients = outputs_and_gradients(model, "varlen", **inputs)
    expected, expected_states, expected_loss, expected_gradients = outputs_and_gradients(model, "eager", **inputs)
    torch.testing.assert_close(logits[target_real], expected[target_real], rtol=0, atol=1e-12)
    torch.testing.assert_close(states[source_real], expected_states[source_real], rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padded_rows(capable, padding_side):
    model, batch = capable.build(label_smoothing=0.1), make_batch(padding_side=padding_side)
    assert_same(model, batch["attention_mask"].bool(), batch["labels"] != -100, **batch)


def test_no_padding_and_no_masks(capable):
    model, batch = capable.build(), make_batch()
    every = torch.ones(B, S).bool(), torch.ones(B, T).bool()
    assert_same(model, *every, input_ids=batch["input_ids"], labels=batch["labels"].clamp(min=3))


def test_code_of_a_checkpoint_registers_a_function_of_its_own(varlen_on_cpu, monkeypatch):
    """The last one registered counts for the whole process, and is not asked."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "varlen", pytest.fail)
    model, batch = CAPABLE[0].build(), make_batch()
    assert_same(model, batch["attention_mask"].bool(), batch["labels"] != -100, **batch)


def test_masks_of_both_sides(capable):
    model, batch = capable.build(), make_batch()
    target = batch["labels"] != -100
    assert_same(model, batch["attention_mask"].bool(), target, **batch, decoder_attention_mask=target.long())


def packed_batch():
    """Two rows: three pairs and padding on the left of the source, a pair and padding on its right."""
    generator = torch.Generator().manual_seed(2)
    segments = torch.tensor([[9, 9, 0, 0, 0, 0, 1, 1, 1, 4, 4], [3, 3, 3, 3, 3, 3, 3, 7, 7, 7, 7]])
    decoder_segments = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 4, 4], [3, 3, 3, 3, 3, 3, 3, 3, 3]])
    return {
        "input_ids": torch.randint(3, V, (2, 11), generator=generator),
        "labels": torch.randint(3, V, (2, 9), generator=generator),
        "segment_ids": segments,
        "decoder_segment_ids": decoder_segments,
    }


@pytest.mark.parametrize("masked", [False, True])
def test_packed_rows(capable, masked):
    """Padding of the source is a segment of its own, or a mask says what it is."""
    model, batch = capable.build(), packed_batch()
    source = (batch["segment_ids"] != 9) & (batch["segment_ids"] != 7)
    masks = {"attention_mask": source.long()} if masked else {}
    assert_same(model, source, torch.ones_like(batch["labels"]).bool(), **batch, **masks)


def test_gradient_checkpointing(varlen_on_cpu):
    model, batch = family("modern").build(), make_batch()
    expected = outputs_and_gradients(model, "varlen", **batch)[-1]
    model.train().activation_checkpointing_enable()
    for name, gradient in outputs_and_gradients(model, "varlen", **batch)[-1].items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)


def allowed_by(sequences, rows, queries, keys):
    """(rows, queries, keys): who attends to whom, read off the sequences, in their order."""
    allowed = torch.zeros(rows * queries, rows * keys)
    ends = list(zip(sequences.query_starts.tolist(), sequences.key_starts.tolist(), strict=True))
    for (first, first_key), (after, after_key) in itertools.pairwise(ends):
        ours, theirs = sequences.queries[first:after], sequences.keys[first_key:after_key]
        assert (ours.diff() > 0).all()
        assert (theirs.diff() > 0).all()
        allowed[ours[:, None], theirs] += 1
    blocks = allowed.view(rows, queries, rows, keys)
    assert blocks.sum() == sum(blocks[row, :, row].sum() for row in range(rows)), "a row looks into another"
    return torch.stack([blocks[row, :, row] for row in range(rows)])


@pytest.mark.parametrize("seed", range(20))
def test_sequences_are_what_masks_allow(seed):
    """Any segment numbers in any order, with any holes: the pairs of the eager masks, but for those of padding."""
    generator = torch.Generator().manual_seed(seed)
    segments = torch.randint(-2, 3, (B, S), generator=generator)
    decoder_segments = torch.randint(-2, 3, (B, T), generator=generator)
    real = torch.rand(B, S, generator=generator) < 0.7
    decoder_real = torch.rand(B, T, generator=generator) < 0.7
    config, source, target = family("modern").config(), torch.zeros(B, S, D), torch.zeros(B, T, D)
    found = {}
    for implementation in ("eager", "varlen"):
        config._attn_implementation = implementation
        found[implementation] = (
            encoder_self_mask(config, source, real, segments),
            decoder_self_mask(config, target, decoder_real, None, decoder_segments),
            cross_mask(config, target, source, real, None, None, decoder_segments, segments),
        )
    masks = [mask[:, 0] == 0 for mask in found["eager"]]
    masks[0] &= real[:, :, None]
    masks[1] &= decoder_real[:, :, None]
    sizes = (S, S), (T, T), (T, S)
    ours = [allowed_by(one, B, *size) for one, size in zip(found["varlen"], sizes, strict=True)]
    ours[1] = ours[1].tril()  # the kernel sees to the look-ahead
    for mask, one in zip(masks, ours, strict=True):
        assert torch.equal(mask.double(), one.double())


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("pieces", [[T], [1] * T, [2, 1, 2]])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_with_a_cache(varlen_on_cpu, pieces, padded):
    """Targets of one row for each source and of two, in pieces; the prompts may be padded on the left."""
    model, batch = family("modern").build(), make_batch()
    batch.pop("labels")
    for g in (1, 2):
        targets = torch.randint(3, V, (B * g, T), generator=torch.Generator().manual_seed(3))
        real = torch.ones_like(targets)
        if padded:
            real[0, 0] = real[1, 0] = 0
        model.set_attn_implementation("eager")
        encoder_outputs = model.get_encoder()(**batch)
        source = {"encoder_outputs": encoder_outputs, "attention_mask": batch["attention_mask"]}
        expected = model(**source, decoder_input_ids=targets, decoder_attention_mask=real).logits
        model.set_attn_implementation("varlen")
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits, end = [], 0
        for piece in pieces:
            begin, end = end, end + piece
            step = {"decoder_input_ids": targets[:, begin:end], "past_key_values": cache, "use_cache": True}
            if padded:
                step["decoder_attention_mask"] = real[:, :end]
            logits.append(model(**source, **step).logits)
        seen = real.bool()
        torch.testing.assert_close(torch.cat(logits, dim=1)[seen], expected[seen], rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [
    {}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}, {"penalty_alpha": 0.6, "top_k": 3},
    {"output_scores": True, "return_dict_in_generate": True},
])  # fmt: skip
def test_tokens_are_those_of_eager(varlen_on_cpu, settings):
    model, batch = family("modern").build(), make_batch()
    source = {"inputs": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    found = []
    for implementation in ("eager", "varlen"):
        model.set_attn_implementation(implementation)
        outputs = model.generate(**source, **settings)
        found.append(outputs if torch.is_tensor(outputs) else outputs.sequences)
    assert torch.equal(*found)


def test_sentence_vectors(varlen_on_cpu):
    encoder = dragoman.DragomanEncoderModel(family("modern").config()).double().eval()
    batch = make_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    expected = encoder(**inputs).pooler_output
    encoder.set_attn_implementation("varlen")
    torch.testing.assert_close(encoder(**inputs).pooler_output, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- precision and the real kernel


def test_mixed_precision_reaches_the_kernel_as_one(monkeypatch, varlen_on_cpu):
    """Rotated queries and keys, and normalized ones, are in single precision where the values are not."""
    seen = set()

    def record(query, key, value, *args, **kwargs):
        seen.update({query.dtype, key.dtype, value.dtype})
        return reference.varlen_attn(query, key, value, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", record)
    model, batch = family("modern").build(dtype=torch.float32, qk_norm=True), make_batch()
    model.set_attn_implementation("varlen")
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("groups", [6, 2])
def test_the_real_kernel_takes_our_arguments(monkeypatch, groups):
    """On no GPU, as far as shapes and types go: forwards and backwards through the operator of torch."""
    monkeypatch.setattr(varlen, "check_kernel", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # torch has no answer for this device
    sizes = {"d_model": 48, "decoder_attention_heads": 6, "decoder_num_key_value_heads": groups}
    layer = transformer("", **sizes).build(dtype=torch.bfloat16).model.decoder.layers[0]
    real, target = make_batch()["attention_mask"].bool(), torch.ones(B, T).bool()
    for module, length, queries in ((layer.self_attn, S, real), (layer.cross_attn, T, target)):
        sequences = varlen.find_sequences(torch.zeros(B, length), queries, torch.zeros(B, S), real)
        sequences = varlen.Sequences(*(x.to("meta") if torch.is_tensor(x) else x for x in sequences))
        shapes = (B, 6, length, 8), (B, groups, S, 8), (B, groups, S, 8)
        tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
        output, weights = varlen.varlen_attention(module, *tensors, sequences, scaling=0.3)
        assert (output.shape, output.dtype, weights) == ((B, length, 6, 8), torch.bfloat16, None)
        gradients = torch.autograd.grad(output.sum(), tensors)
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("device", "dtype", "width", "sentence"), [
    ("cpu", torch.bfloat16, 64, "needs a GPU and bfloat16 or float16, not bfloat16 on cpu: use 'sdpa'"),
    ("cuda", torch.float32, 64, "needs a GPU and bfloat16 or float16, not float32 on cuda: use 'sdpa'"),
    ("cuda", torch.float16, 36, "needs heads whose width is a multiple of 8 and at most 256, not 36: use 'sdpa'"),
    ("cuda", torch.float16, 264, "a multiple of 8 and at most 256, not 264"),
])  # fmt: skip
def test_tensors_that_the_kernel_does_not_take(device, dtype, width, sentence):
    with pytest.raises(ValueError, match=sentence):
        varlen.check_kernel(device, dtype, width)
    varlen.check_kernel("cuda", torch.bfloat16, 128)


def test_an_older_torch_is_refused(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, *, scale: None)
    with pytest.raises(ValueError, match=r"needs torch 2\.12, not 2"):
        varlen.check_kernel("cuda", torch.bfloat16, 64)


def test_the_kernel_is_not_run_on_a_cpu():
    model = AutoModelForSeq2SeqLM.from_config(family("modern").config(), attn_implementation="varlen")
    with pytest.raises(ValueError, match="'varlen' needs a GPU and bfloat16 or float16, not float32 on cpu"):
        model(**make_batch())


@pytest.mark.parametrize(("name", "settings", "sentence"), [
    ("relative", {}, "cannot do position_embedding_type='relative': use 'sdpa' or 'eager'"),
    ("unordered", {}, "cannot do attention_direction='unidirectional': use"),
    ("modern", {"attention_dropout": 0.1}, r"cannot do attention_dropout=0\.1: use"),
])  # fmt: skip
def test_settings_that_the_kernel_has_not(varlen_on_cpu, name, settings, sentence):
    model, batch = family(name).build(**settings), make_batch()
    model.set_attn_implementation("varlen")
    if settings:
        assert model(**batch).loss.isfinite(), "dropout is off"
    with pytest.raises(ValueError, match=sentence):
        model.train()(**batch)


def test_finished_masks_weights_and_static_caches_are_refused(varlen_on_cpu):
    model, batch = family("modern").build(), make_batch()
    model.set_attn_implementation("varlen")
    square = torch.ones(B, 1, 1, S)
    for name, mask in (
        ("attention_mask", square),
        ("decoder_attention_mask", torch.ones(B, 1, T, T)),
        ("cross_attention_mask", square),
    ):
        with pytest.raises(
            ValueError, match="4-D attention masks need attn_implementation 'eager' or 'sdpa', not 'varlen'"
        ):
            model(**{**batch, name: mask})
    with pytest.raises(ValueError, match="has no attention weights to show: use 'eager'"):
        model(**batch, output_attentions=True)
    with pytest.raises(ValueError, match="needs a cache that can grow, not a static one: use 'sdpa'"):
        model.generate(batch["input_ids"], cache_implementation="static")
    with pytest.raises(ValueError, match="no token has a real token to attend to"):
        model(**{**batch, "attention_mask": torch.zeros(B, S)})


def test_packed_targets_in_steps_are_refused(varlen_on_cpu):
    model, batch = family("modern").build(), packed_batch()
    model.set_attn_implementation("varlen")
    labels = batch.pop("labels")
    cache = model(**batch, decoder_input_ids=labels, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot continue packed targets from a cache"):
        model(**batch, decoder_input_ids=labels, past_key_values=cache)


def test_models_of_others_are_refused():
    config = BartConfig(vocab_size=V, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=H,
                        decoder_attention_heads=H, encoder_ffn_dim=17, decoder_ffn_dim=19)  # fmt: skip
    model = BartModel._from_config(config, attn_implementation="varlen")
    with pytest.raises(ValueError, match="'varlen' is for Dragoman's Transformers"):
        model(make_batch()["input_ids"])


def test_a_row_of_nothing_stays_finite(varlen_on_cpu):
    """And the other rows are as they are without it."""
    model, batch = family("modern").build(), make_batch()
    model.set_attn_implementation("varlen")
    expected = model(**batch).logits
    batch["attention_mask"][1] = 0
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(outputs.logits[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)


def test_it_is_no_property_of_a_checkpoint(varlen_on_cpu, tmp_path):
    model = family("modern").build()
    model.set_attn_implementation("varlen")
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
