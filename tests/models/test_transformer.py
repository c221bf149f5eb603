"""The Transformer family against independent versions of itself, and the options that only it has."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, DynamicCache

import dragoman
import reference
from conftest import BOS, EOS, FAMILIES, PAD, POST_NORM_2017, B, D, H, S, T, V, family, make_batch, transformer
from dragoman import DragomanConfig, DragomanEncoderModel, DragomanForConditionalGeneration, DragomanModel
from dragoman.models.positions import RelativePositionBias


def assert_equal(ours, theirs):
    """The parity bound of this project: 1e-9 of the largest value, in float64."""
    assert ours.dtype == theirs.dtype == torch.float64
    bound = 1e-9 * max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


# ---------------------------------------------------------------- against loops and plain classes

VARIANTS = {
    "halves": {"position_embedding_type": "sinusoidal", "sinusoid_layout": "halves"},
    "sinusoids of M2M100": {"position_embedding_type": "sinusoidal", "sinusoid_layout": "halves",
                            "sinusoid_endpoint": True, "sinusoid_offset": 2},
    "wide heads": {"encoder_head_dim": 8, "decoder_head_dim": 10, "attention_bias": True, "qk_norm": True},
    "grouped": {"encoder_attention_heads": 6, "encoder_num_key_value_heads": 3, "decoder_attention_heads": 6,
                "decoder_num_key_value_heads": 2},
    "gated with biases": {"mlp_bias": True, "activation_function": "gelu", "norm_type": "layernorm"},
    "post, final norm": {"norm_position": "post", "embedding_norm": True, "attention_scaling": 0.7},
    "one vocabulary, two tables": {"share_embeddings": False, "source_vocab_size": V},
    "shared tables, free head": {"tie_lm_head": False, "lm_head_bias": True, "logit_scale": 0.3},
}  # fmt: skip


ALL_VARIANTS = [one for one in FAMILIES if one.is_transformer]
ALL_VARIANTS += [transformer(name, **settings) for name, settings in VARIANTS.items()]


@pytest.mark.parametrize("one", ALL_VARIANTS, ids=lambda one: one.name)
def test_logits_and_gradients_equal_the_loops(one, batch):
    model = one.build()
    ours = model(**batch)
    target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    theirs = torch.zeros_like(ours.logits)
    for row in range(B):
        source = batch["input_ids"][row, batch["attention_mask"][row].bool()].tolist()
        length = (batch["labels"][row] != -100).sum()
        theirs[row, :length] = reference.transformer_logits(model, source, target[row, :length].tolist())
        assert_equal(ours.logits[row, :length], theirs[row, :length])
    parameters = dict(model.named_parameters())
    our_gradients = torch.autograd.grad(ours.loss, parameters.values(), allow_unused=True)
    their_loss = reference.next_token_loss(theirs, batch["labels"])
    their_gradients = torch.autograd.grad(their_loss, parameters.values(), allow_unused=True)
    for name, our_gradient, their_gradient in zip(parameters, our_gradients, their_gradients, strict=True):
        assert our_gradient is not None, name
        assert_equal(our_gradient, their_gradient)


def copy_into_plain(model, plain, pre_norm):
    """Our weights into the names of `reference.PlainTransformer`."""
    weights = model.state_dict()
    pairs = {"source_embedding": "model.encoder.embed_tokens", "target_embedding": "model.decoder.embed_tokens"}
    if pre_norm:
        pairs |= {"encoder_norm": "model.encoder.norm", "decoder_norm": "model.decoder.norm", "output": "lm_head"}
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    for side, count in (("encoder", len(plain.encoder)), ("decoder", len(plain.decoder))):
        for index in range(count):
            theirs, ours = f"{side}.{index}", f"model.{side}.layers.{index}"
            pairs |= {f"{theirs}.self_attention.{a}": f"{ours}.self_attn.{b}" for a, b in attention.items()}
            pairs |= {f"{theirs}.feed_forward.0": f"{ours}.mlp.up_proj"}
            pairs |= {f"{theirs}.feed_forward.2": f"{ours}.mlp.down_proj"}
            norms = ["self_attn_norm", "mlp_norm"]
            if side == "decoder":
                pairs |= {f"{theirs}.cross_attention.{a}": f"{ours}.cross_attn.{b}" for a, b in attention.items()}
                norms.insert(1, "cross_attn_norm")
            pairs |= {f"{theirs}.norms.{i}": f"{ours}.{norm}" for i, norm in enumerate(norms)}
    state = {f"{a}.{kind}": weights[f"{b}.{kind}"] for a, b in pairs.items() for kind in ("weight", "bias")
             if f"{b}.{kind}" in weights}  # fmt: skip
    plain.load_state_dict(state)


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm of 2017", "pre-norm"])
def test_the_plain_class_is_equal(pre_norm, batch):
    model = family("prenorm" if pre_norm else "2017").build()
    config = model.config
    plain = reference.PlainTransformer(config.source_vocab_size or V, V, D, H, (3, 2), (17, 19), pre_norm).double()
    copy_into_plain(model, plain, pre_norm)
    ours = model(**batch)
    target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    theirs = plain(batch["input_ids"], target, batch["attention_mask"])
    real = batch["labels"] != -100
    assert_equal(ours.logits[real], theirs[real])
    our_gradient = torch.autograd.grad(ours.loss, model.model.encoder.layers[0].self_attn.q_proj.weight)[0]
    their_loss = nn.functional.cross_entropy(theirs.flatten(0, 1), batch["labels"].flatten())
    their_gradient = torch.autograd.grad(their_loss, plain.encoder[0].self_attention.query.weight)[0]
    assert_equal(our_gradient, their_gradient)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torch_nn_transformer_is_equal(norm_first, activation, batch):
    settings = {**POST_NORM_2017, "norm_position": "pre" if norm_first else "post", "final_norm": True,
                "activation_function": activation, "encoder_ffn_dim": 17, "decoder_ffn_dim": 17}  # fmt: skip
    model = transformer("torch", **settings).build()
    theirs = nn.Transformer(D, H, 3, 2, 17, 0.0, activation, layer_norm_eps=1e-6, batch_first=True,
                            norm_first=norm_first, dtype=torch.float64).eval()  # fmt: skip
    weights, state = model.model.state_dict(), {}

    def put(name, source):
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = weights[f"{source}.{kind}"]

    for side, count in (("encoder", 3), ("decoder", 2)):
        put(f"{side}.norm", f"{side}.norm")
        for i in range(count):
            there, here = f"{side}.layers.{i}", f"{side}.layers.{i}"
            blocks = {"self_attn": "self_attn"} | ({"multihead_attn": "cross_attn"} if side == "decoder" else {})
            for block, ours in blocks.items():
                for kind in ("weight", "bias"):
                    joined = torch.cat([weights[f"{here}.{ours}.{p}_proj.{kind}"] for p in "qkv"])
                    state[f"{there}.{block}.in_proj_{kind}"] = joined
                put(f"{there}.{block}.out_proj", f"{here}.{ours}.o_proj")
            put(f"{there}.linear1", f"{here}.mlp.up_proj")
            put(f"{there}.linear2", f"{here}.mlp.down_proj")
            norms = ["self_attn_norm"] + (["cross_attn_norm"] if side == "decoder" else []) + ["mlp_norm"]
            for number, norm in enumerate(norms, start=1):
                put(f"{there}.norm{number}", f"{here}.{norm}")
    theirs.load_state_dict(state)

    target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    table = reference.sinusoids(S, D, "interleaved")
    embedding = model.model.encoder.embed_tokens
    padding = ~batch["attention_mask"].bool()
    states = theirs(
        embedding(batch["input_ids"]) + table,
        embedding(target) + table[:T],
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    ours = model.model(batch["input_ids"], batch["attention_mask"], decoder_input_ids=target).last_hidden_state
    real = batch["labels"] != -100
    assert_equal(ours[real], states[real])


def test_relative_buckets_equal_the_loop():
    for bidirectional in (False, True):
        bias = RelativePositionBias(H, 32, 128, bidirectional)
        distances = torch.arange(-300, 301)
        expected = [reference.relative_bucket(int(d), bidirectional, 32, 128) for d in distances]
        assert bias.buckets(distances).tolist() == expected


# ---------------------------------------------------------------- attention implementations and masks


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_every_attention_implementation_is_equal(any_transformer, batch, implementation):
    model = any_transformer.build(dtype=torch.float32)
    # On a CPU flex attention has no backward pass, and compiling it takes half a minute.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.set_attn_implementation("eager")
        eager = model(**batch).logits
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(**batch).logits, eager, rtol=1e-4, atol=1e-5)
        if implementation == "sdpa":
            source = {"attention_mask": batch["attention_mask"], "num_beams": 3}
            sequences = model.double().generate(batch["input_ids"], **source)
            model.set_attn_implementation("eager")
            assert torch.equal(model.generate(batch["input_ids"], **source), sequences)


def test_flash_attention_is_refused():
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        AutoModelForSeq2SeqLM.from_config(family("modern").config(), attn_implementation="flash_attention_2")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["boolean", "integer", "additive", "minus infinity"])
def test_four_dimensional_masks(any_transformer, batch, implementation, kind):
    model = any_transformer.build()
    model.set_attn_implementation(implementation)
    source, target = batch["attention_mask"].bool(), batch["labels"] != -100
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    look_ahead = torch.ones(T, T).tril().bool()
    direction = torch.ones(B, 1, T, S).bool()
    if model.config.attention_direction == "unidirectional":
        direction = direction.tril()
    masks = {
        "attention_mask": source[:, None, None, :],
        "decoder_attention_mask": look_ahead & target[:, None, None, :],
        "cross_attention_mask": source[:, None, None, :] & direction,
    }
    forms = {
        "boolean": lambda mask: mask,
        "integer": lambda mask: mask.long(),
        "additive": lambda mask: (~mask).double() * -1e30,
        "minus infinity": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),
    }
    masks = {name: forms[kind](mask) for name, mask in masks.items()}
    expected = model(**batch).logits
    ours = model(input_ids=batch["input_ids"], decoder_input_ids=decoder_input_ids, **masks).logits
    torch.testing.assert_close(ours[target], expected[target], rtol=0, atol=1e-12)


def test_a_four_dimensional_source_mask_is_enough(any_transformer):
    model, batch = any_transformer.build(), make_batch()
    square = batch["attention_mask"].bool()[:, None, None, :].expand(-1, -1, S, -1)
    logits = model(input_ids=batch["input_ids"], attention_mask=square, labels=batch["labels"]).logits
    torch.testing.assert_close(logits, model(**batch).logits, rtol=0, atol=1e-12)


def test_finished_masks_do_not_open_what_the_direction_closes():
    model, batch = family("unordered").build(), make_batch()
    open_wide = {**batch, "cross_attention_mask": batch["attention_mask"].bool()[:, None, None]}
    torch.testing.assert_close(model(**open_wide).logits, model(**batch).logits, rtol=0, atol=1e-12)


def test_a_cross_mask_cuts_the_source_off(batch):
    model = family("modern").build()
    nothing = torch.zeros(B, 1, 1, S).bool()
    nothing[..., 0] = True
    short = {**batch, "cross_attention_mask": nothing}
    changed = {**short, "input_ids": batch["input_ids"].clone()}
    model.model.encoder.layers = nn.ModuleList()  # so that the first state depends on the first token alone
    changed["input_ids"][:, 1:] = 9
    assert torch.equal(model(**short).logits, model(**changed).logits)
    assert not torch.allclose(model(**batch).logits, model(**short).logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cross_mask_of_one_row_holds_for_every_beam(batch, use_cache):
    """A prompt of two tokens, and without a cache all tokens so far, have more rows than the mask."""
    model = family("modern").build()
    arguments = {"num_beams": 3, "use_cache": use_cache, "decoder_input_ids": torch.tensor([[BOS, 5]] * B)}
    expected = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **arguments)
    mask = batch["attention_mask"].bool()
    masks = {"attention_mask": mask, "cross_attention_mask": mask[:, None, None]}
    assert torch.equal(model.generate(batch["input_ids"], **masks, **arguments), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_that_see_nothing_stay_finite(any_transformer, batch, implementation):
    model = any_transformer.build()
    model.set_attn_implementation(implementation)
    nothing = torch.zeros(B, 1, 1, S).bool()
    outputs = model(
        **{**batch, "attention_mask": nothing},
        cross_attention_mask=nothing,
        decoder_attention_mask=torch.zeros(B, 1, T, T).bool(),
    )
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_flex_attention_refuses_finished_masks(batch):
    model = family("modern").build()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="4-D attention masks need attn_implementation 'eager' or 'sdpa'"):
        model(**{**batch, "attention_mask": torch.ones(B, 1, 1, S)})


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_pairs_equal_separate_pairs(any_transformer, implementation):
    model = any_transformer.build()
    model.set_attn_implementation(implementation)
    generator = torch.Generator().manual_seed(2)
    sources = [torch.randint(3, V, (length,), generator=generator) for length in (4, 7, 3)]
    targets = [torch.randint(3, V, (length,), generator=generator) for length in (5, 2, 6)]

    def numbers(parts):
        return torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])[None]

    packed = model(
        input_ids=torch.cat(sources)[None],
        decoder_input_ids=torch.cat(targets)[None],
        segment_ids=numbers(sources),
        decoder_segment_ids=numbers(targets),
    ).logits[0]
    separate = [
        model(input_ids=source[None], decoder_input_ids=target[None]).logits[0]
        for source, target in zip(sources, targets, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(separate), rtol=0, atol=1e-12)

    # Finished masks say who is there, the segments still keep the pairs apart; and padding may stand on the left.
    source, target = torch.cat(sources)[None], torch.cat(targets)[None]
    length = target.shape[1]
    with_masks = model(
        input_ids=nn.functional.pad(source, (2, 0), value=1),
        attention_mask=nn.functional.pad(torch.ones_like(source), (2, 0)),
        decoder_input_ids=target,
        decoder_attention_mask=torch.ones(length, length).tril().bool()[None, None],
        segment_ids=nn.functional.pad(numbers(sources), (2, 0)),
        decoder_segment_ids=numbers(targets),
    ).logits[0]
    torch.testing.assert_close(with_masks, torch.cat(separate), rtol=0, atol=1e-12)

    with pytest.raises(ValueError, match="packed targets need packed sources"):
        model(input_ids=sources[0][None], decoder_input_ids=targets[0][None], decoder_segment_ids=numbers(targets[:1]))
    with pytest.raises(ValueError, match="packed sources need packed targets"):
        model(input_ids=source, decoder_input_ids=target, segment_ids=numbers(sources))


@pytest.mark.parametrize("name", ["modern", "relative"])
def test_packing_with_flex_attention(name, monkeypatch):
    """
    Loss and gradients. torch refuses gradients of flex attention on a CPU, because the compiled form has none there;
    the other form has them, but for relative biases, once nobody asks for the device.
    """
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)
    model = family(name).build(dtype=torch.float32)
    model.set_attn_implementation("flex_attention")
    generator = torch.Generator().manual_seed(2)
    sources = [torch.randint(3, V, (length,), generator=generator) for length in (4, 7, 3)]
    targets = [torch.randint(3, V, (length,), generator=generator) for length in (5, 2, 6)]
    starts = [torch.cat((torch.tensor([0]), target[:-1])) for target in targets]

    def gradients(rows):
        model.zero_grad()
        with torch.compiler.set_stance("force_eager"):
            loss = sum(model(**row, num_items_in_batch=sum(map(len, targets))).loss for row in rows)
            loss.backward()
        trained = {key: weight for key, weight in model.named_parameters() if "relative_bias" not in key}
        return float(loss.detach()), {key: weight.grad.clone() for key, weight in trained.items()}

    def row(*parts):
        names = ("input_ids", "decoder_input_ids", "labels")
        return {name: torch.cat(part)[None] for name, part in zip(names, parts, strict=True)}

    numbers = [torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])[None]
               for parts in (sources, targets)]  # fmt: skip
    packed = row(sources, starts, targets) | dict(zip(("segment_ids", "decoder_segment_ids"), numbers, strict=True))
    loss, found = gradients([packed])
    separate_loss, expected = gradients([row([s], [b], [t]) for s, b, t in zip(sources, starts, targets, strict=True)])
    assert loss == pytest.approx(separate_loss, rel=1e-5)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_cross_attention_weights(any_transformer, batch):
    model = any_transformer.build()
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_attentions=True)
    assert len(outputs.cross_attentions) == len(outputs.decoder_attentions) == 2
    assert len(outputs.encoder_attentions) == 3
    for weights in outputs.cross_attentions:
        assert weights.shape == (B, H, T, S)
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
        assert (weights.masked_select(~batch["attention_mask"].bool()[:, None, None, :]) == 0).all()
    assert outputs.decoder_attentions[0].triu(1).abs().max() == 0
    beams = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=4, output_attentions=True,
        return_dict_in_generate=True, max_new_tokens=3,
    )  # fmt: skip
    assert beams.cross_attentions[1][0].shape == (4 * B, H, 1, S)


# ---------------------------------------------------------------- training


def test_gradient_checkpointing_changes_nothing(any_transformer, batch):
    plain, saving = any_transformer.build().train(), any_transformer.build().train()
    saving.activation_checkpointing_enable()
    plain(**batch).loss.backward()
    saving(**batch).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12, msg=name)


def test_it_compiles_as_one_graph(any_transformer, batch):
    model = any_transformer.build()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=0, atol=1e-12)


def test_layerdrop_leaves_layers_out_in_training_only(batch):
    model = transformer("drop", layerdrop=0.5).build()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    torch.manual_seed(0)
    losses = {model.train()(**batch).loss.item() for _ in range(20)}
    assert 1 < len(losses) <= 2 ** (3 + 2)


def test_every_dropout_drops(batch):
    for name in ("dropout", "attention_dropout", "activation_dropout", "final_dropout"):
        model = transformer(name, **{name: 0.5}).build().train()
        torch.manual_seed(0)
        assert model(**batch).loss != model(**batch).loss
        assert model.eval()(**batch).loss == model(**batch).loss


@pytest.mark.parametrize("width", [64, 256])
def test_initialization_scales_with_the_width(width):
    torch.manual_seed(0)
    model = DragomanForConditionalGeneration(DragomanConfig(vocab_size=500, d_model=width, encoder_layers=1,
                                                            decoder_layers=1, encoder_ffn_dim=4 * width))  # fmt: skip
    layer = model.model.encoder.layers[0]
    for weight, std in (
        (layer.self_attn.q_proj.weight, width**-0.5),
        (layer.mlp.down_proj.weight, (4 * width) ** -0.5),
        (model.model.encoder.embed_tokens.weight, width**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    scaled = DragomanForConditionalGeneration(
        DragomanConfig(
            vocab_size=500,
            d_model=width,
            encoder_layers=1,
            decoder_layers=1,
            attention_scaling=1.0,
            logit_scale=width**-0.5,
        )
    ).model.decoder  # as T5: Raffel 2020 folds both scales into the initial weights
    head_dim = width // 8
    assert scaled.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.05)
    for attention in (scaled.layers[0].self_attn, scaled.layers[0].cross_attn):
        assert attention.q_proj.weight.std().item() == pytest.approx((width * head_dim) ** -0.5, rel=0.05)
        assert attention.k_proj.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
    fixed = DragomanForConditionalGeneration(
        DragomanConfig(vocab_size=500, d_model=width, encoder_layers=1, decoder_layers=1, init_std=0.02)
    )
    assert fixed.model.encoder.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_last_label_may_come_first():
    """mBART's convention: labels alone, and the decoder begins with the code or `</s>` that ends them."""
    model = transformer("rotating", rotate_labels=True, decoder_start_token_id=None).build()
    labels = torch.tensor([[5, 6, 7, EOS, 20], [8, EOS, 21, -100, -100], [9, EOS, 22, PAD, PAD]])
    begun = torch.tensor([[20, 5, 6, 7, EOS], [21, 8, EOS, 21, PAD], [22, 9, EOS, 22, PAD]])
    assert model.prepare_decoder_input_ids_from_labels(labels).tolist() == begun.tolist()
    source = torch.tensor([[4, 5, EOS]] * 3)
    given = model(input_ids=source, labels=labels, decoder_input_ids=begun).loss
    assert model(input_ids=source, labels=labels).loss == given
    assert labels[1, 3] == -100  # not written over


# ---------------------------------------------------------------- other doors


def test_learned_positions_end_somewhere(batch):
    model = transformer("short", position_embedding_type="learned", max_position_embeddings=6).build()
    with pytest.raises(ValueError, match=r"a sequence of 7 tokens, but it has learned 6 positions"):
        model(**batch)


def test_only_learned_positions_end_somewhere(any_transformer):
    if any_transformer.name == "learned":
        pytest.skip("tested above")
    long = torch.randint(3, V, (1, 100))
    assert any_transformer.build()(input_ids=long, labels=long).logits.isfinite().all()


def test_sentence_vectors(batch, tmp_path):
    model = family("modern").build()
    model.save_pretrained(tmp_path)
    encoder = DragomanEncoderModel.from_pretrained(tmp_path, dtype=torch.float64)
    outputs = encoder(batch["input_ids"], batch["attention_mask"])
    states = model.get_encoder()(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(outputs.last_hidden_state, states, rtol=0, atol=1e-12)
    for row in range(B):
        expected = states[row, batch["attention_mask"][row].bool()].mean(0)
        torch.testing.assert_close(outputs.pooler_output[row], expected, rtol=0, atol=1e-12)
    continued = model(encoder_outputs=outputs, attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert_equal(continued.logits, model(**batch).logits)


def test_sentence_vectors_have_a_vocabulary_of_their_own(batch, tmp_path):
    encoder = DragomanEncoderModel(family("prenorm").config()).double().eval()
    before = encoder(batch["input_ids"]).pooler_output
    encoder.resize_token_embeddings(37)
    assert (encoder.config.source_vocab_size, encoder.config.vocab_size) == (37, V)
    encoder.save_pretrained(tmp_path)
    again = DragomanEncoderModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert_equal(again(batch["input_ids"]).pooler_output, before)
    assert (tmp_path / "modeling_dragoman.py").exists()
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        encoder(batch["input_ids"], torch.ones(B, 1, 1, S))


def test_a_cache_for_one_sequence_is_refused(batch):
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache, but this decoder keeps source and target"):
        family("modern").build()(**batch, past_key_values=DynamicCache())


def test_beams_of_packed_sources(batch):
    """The segments belong to the source and are not copied for its beams."""
    model = family("unordered").build()
    one = torch.zeros_like(batch["input_ids"])
    expected = model.generate(batch["input_ids"], num_beams=3)
    assert torch.equal(model.generate(batch["input_ids"], segment_ids=one, num_beams=3), expected)


def test_the_headless_model_loads_from_the_whole(batch, tmp_path):
    model = family("2017").build()
    model.save_pretrained(tmp_path)
    headless = dragoman.DragomanModel.from_pretrained(tmp_path, dtype=torch.float64)
    target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    inputs = {"input_ids": batch["input_ids"], "decoder_input_ids": target}
    assert isinstance(headless, DragomanModel)
    assert_equal(headless(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_static_cache_equals_dynamic_cache(any_transformer, batch):
    model = any_transformer.build()
    source = {"attention_mask": batch["attention_mask"]}
    for settings in ({}, {"num_beams": 3}):
        dynamic = model.generate(batch["input_ids"], **source, **settings)
        static = model.generate(batch["input_ids"], **source, **settings, cache_implementation="static")
        assert torch.equal(static, dynamic)
    with pytest.raises(ValueError, match="a cache that can grow"):
        model.generate(batch["input_ids"], **source, penalty_alpha=0.6, cache_implementation="static")


def test_a_static_cache_reads_sources_of_few_lengths(batch):
    """With a mask or without; but what is asked for beside tokens has the positions of the source."""
    model, read = family("modern").build(), []
    model.model.encoder.register_forward_pre_hook(
        lambda encoder, args, arguments: read.append(arguments["input_ids"].shape[1]), with_kwargs=True
    )
    sources = batch["input_ids"][:1]
    expected = model.generate(sources)
    assert read.pop() == sources.shape[1]
    for mask in ({}, {"attention_mask": torch.ones_like(sources)}):
        assert torch.equal(model.generate(sources, **mask, cache_implementation="static"), expected)
        assert read.pop() > sources.shape[1]
    model.set_attn_implementation("eager")
    seen = model.generate(sources, cache_implementation="static", return_dict_in_generate=True, output_attentions=True)
    assert torch.equal(seen.sequences, expected)
    assert seen.cross_attentions[0][0].shape[-1] == sources.shape[1]


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}])
def test_left_padded_prompts(any_transformer, batch, settings):
    """Prompts of different lengths in one batch, padded on the left."""
    model = any_transformer.build()
    prompts = [[BOS, 5, 7], [BOS], [BOS, 9]]
    padded = torch.tensor([[1] * (3 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (3 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    together = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=padded,
        decoder_attention_mask=mask, max_length=8, eos_token_id=None, **settings,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        alone = model.generate(
            batch["input_ids"][row : row + 1], attention_mask=batch["attention_mask"][row : row + 1],
            decoder_input_ids=torch.tensor([prompt]), max_length=5 + len(prompt), eos_token_id=None, **settings,
        )  # fmt: skip
        assert together[row, 3 - len(prompt) :].tolist() == alone[0].tolist()
