import numpy as np
import pytest
import torch

from conftest import EOS, FAMILIES, family, make_batch
from dragoman.data.tokenizers import train_tokenizer
from dragoman.inference.attention_maps import (
    alignment_text,
    alignments,
    attention_map,
    attention_of_generation,
    entropy,
    forced_attention,
    labels,
    pieces,
    sizes,
    words,
)
from dragoman.inference.attention_stages import attention_stages
from dragoman.inference.translate import translate
from inference.copying import copying_model
from inference.tiny import learned_by_heart


ATTENTIVE = [one for one in FAMILIES if one.settings.get("attention") != "none"]
STRATEGIES = {
    "greedy": {"num_beams": 1},
    "beam": {"num_beams": 3},
    "beam, second best": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 0},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "without a cache": {"num_beams": 2, "use_cache": False},
}


def build(one, **options):
    model = one.build(**options)
    if one.is_transformer:
        model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("one", ATTENTIVE, ids=lambda one: one.name)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_rows_of_decoding_are_those_of_a_forced_pass(one, strategy):
    """Through beam_indices, with padded sources; a wrong row would differ wherever beams do."""
    model, batch = build(one, seed=3), make_batch()
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(0)
    outputs = model.generate(
        **source, **STRATEGIES[strategy], output_attentions=True, return_dict_in_generate=True, max_length=9
    )
    per_source = STRATEGIES[strategy].get("num_return_sequences", 1)
    for row in range(0, len(outputs.sequences), per_source):
        row += per_source - 1
        decoded = attention_of_generation(outputs, row)
        steps = decoded["cross"].shape[2]
        fed, predicted = outputs.sequences[row : row + 1, :steps], outputs.sequences[row, 1:]
        ended = (predicted == EOS).nonzero()
        length = int(ended[0]) + 1 if len(ended) else steps  # a row that has ended waits for the others
        at = slice(row // per_source, row // per_source + 1)
        forced = forced_attention(model, source["input_ids"][at], fed, source["attention_mask"][at])
        assert decoded.keys() == forced.keys() - {"encoder"}
        for kind, weights in decoded.items():
            torch.testing.assert_close(weights[:, :, :length], forced[kind][:, 0, :, :length], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("one", "kind"),
    [
        pytest.param(one, kind, id=f"{one.name}-{kind}")
        for one in ATTENTIVE
        for kind in (("cross", "encoder", "decoder") if one.is_transformer else ("cross",))
    ],
)
def test_the_stages_end_in_the_weights_of_the_model(one, kind):
    model = build(one, seed=4)
    batch = make_batch()
    source, target = batch["input_ids"][:1], torch.cat([torch.tensor([[0]]), batch["labels"][:1, :-1]], dim=1)
    expected = forced_attention(model, source, target)[kind]
    layers, heads = sizes(model)[kind]
    assert expected.shape[:3] == (layers, 1, heads)
    for layer in range(layers):
        stages = attention_stages(model, source[0].tolist(), target[0].tolist(), kind, layer)
        torch.testing.assert_close(stages.weights, expected[layer, 0], rtol=0, atol=1e-6)
        torch.testing.assert_close(stages.scaled * stages.divisor, stages.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(stages.output, stages.weights @ stages.values, rtol=0, atol=1e-6)
        bias = 0 if stages.bias is None else stages.bias
        seen = stages.weights > 0
        torch.testing.assert_close((stages.scaled + bias)[seen], stages.masked[seen])
        assert (stages.masked[~seen] == -torch.inf).all()


def test_the_weighted_sum_is_what_the_layer_goes_on_with():
    """The output of all heads, projected, is what the model's own module gives."""
    model, batch = build(family("modern"), seed=5), make_batch()
    module, seen = model.model.decoder.layers[1].cross_attn, []
    handle = module.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    source, target = batch["input_ids"][:1], batch["input_ids"][1:2, :4]
    stages = attention_stages(model, source[0].tolist(), target[0].tolist(), "cross", 1)
    handle.remove()
    together = module.o_proj(stages.output.double().transpose(0, 1).flatten(1)[None])
    torch.testing.assert_close(together, seen[0], rtol=0, atol=1e-5)


SENTENCES = ["q w e r t y", "m n b v c x", "a p f o g i"]


@pytest.fixture(scope="module", params=["transformer", "lstm"])
def copying(request):
    return copying_model(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_map_of_a_copy_is_the_diagonal(copying, num_beams):
    model, tokenizer = copying
    on_the_diagonal, largest = [], []
    for sentence in SENTENCES:
        found = attention_map(model, tokenizer, sentence, num_beams=num_beams)
        assert found.target == sentence
        assert found.rows == found.columns == [*sentence.split(), "</s>"]
        letters = found.matrix[:-1]
        on_the_diagonal += np.diag(letters).tolist()
        largest += (letters.argmax(axis=1) == np.arange(len(letters))).tolist()
        np.testing.assert_allclose(found.matrix.sum(axis=1), 1, atol=1e-5)
    # By chance: one row in seven, and a seventh of the weight.
    assert np.mean(largest) >= 0.9
    assert np.mean(on_the_diagonal) >= 0.5


@pytest.mark.slow
def test_fed_labels_are_one_behind_and_words_align(copying):
    model, tokenizer = copying
    found = attention_map(model, tokenizer, SENTENCES[0], rows="fed")
    assert found.rows == ["<s>", *SENTENCES[0].split()]
    aligned = alignments(attention_map(model, tokenizer, SENTENCES[0], SENTENCES[0]))
    assert np.mean([one.word == one.looked_at for one in aligned[:-1]]) >= 0.8


@pytest.fixture(scope="module")
def by_heart():
    return learned_by_heart(two_vocabularies=True)


def test_a_decoded_and_a_given_target_give_the_same_map(by_heart):
    """With two vocabularies: characters label the columns, words the rows."""
    model, processor = by_heart
    decoded = attention_map(model, processor, "the dog")
    given = attention_map(model, processor, "the dog", "il cane")
    assert decoded.target == given.target == "il cane"
    np.testing.assert_array_equal(decoded.weights, given.weights)
    assert given.rows == ["il", "cane", "</s>"]
    assert given.columns == ["t", "h", "e", "␣", "d", "o", "g", "</s>"]
    assert given.column_words == [("the", [0, 1, 2]), ("dog", [4, 5, 6]), ("</s>", [7])]
    assert given.weights.shape == (2, 2, 3, 8)
    assert attention_map(model, processor, "the dog", "il cane", kind="encoder").weights.shape == (1, 2, 8, 8)
    of_decoder = attention_map(model, processor, "the dog", "il cane", kind="decoder")
    assert of_decoder.weights.shape == (2, 2, 3, 3)
    assert of_decoder.columns == ["<s>", "il", "cane"]
    assert np.triu(of_decoder.weights.sum(axis=(0, 1)), 1).sum() == 0


def test_one_layer_one_head_and_averages(by_heart):
    model, processor = by_heart
    whole = attention_map(model, processor, "the dog", "il cane")
    np.testing.assert_allclose(whole.matrix, whole.weights.mean(axis=(0, 1)), atol=1e-7)
    for layer, head in ((1, 0), (-1, -2)):
        one = attention_map(model, processor, "the dog", "il cane", layer=layer, head=head)
        np.testing.assert_array_equal(one.matrix, whole.weights[1, 0])
    of_layer = attention_map(model, processor, "the dog", "il cane", layer=0)
    np.testing.assert_allclose(of_layer.matrix, whole.weights[0].mean(axis=0), atol=1e-7)


def test_the_implementation_of_attention_is_put_back(by_heart):
    model, processor = by_heart
    model.set_attn_implementation("sdpa")
    model.train()
    attention_map(model, processor, "the dog")
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    model.eval()
    with pytest.raises(ValueError, match="these outputs hold no attention weights"):
        attention_of_generation(model.generate(torch.tensor([[5, 2]]), return_dict_in_generate=True))


def test_entropy_in_bits():
    rows = np.array([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(entropy(rows), [0, 2, 1])


def test_alignment_by_hand(by_heart):
    """Weights of a source word are summed over its characters, rows of a target word averaged."""
    found = attention_map(*by_heart, "the dog", "il cane")
    found.weights = np.zeros((1, 1, 3, 8))
    found.weights[0, 0, 0, [0, 1, 5]] = [0.3, 0.3, 0.4]
    found.weights[0, 0, 1, [0, 6]] = [0.25, 0.75]
    found.weights[0, 0, 2, 7] = 1
    first, second, last = alignments(found)
    assert (first.word, first.looked_at, second.looked_at, last.looked_at) == ("il", "the", "dog", "</s>")
    assert (first.weight, second.weight) == pytest.approx((0.6, 0.75))
    assert first.entropy == pytest.approx(0.971, abs=1e-3)
    assert alignment_text(found).splitlines() == [
        "output  looked at  weight  entropy",
        "il      the          0.60     0.97",
        "cane    dog          0.75     0.81",
        "</s>    </s>         1.00     0.00",
    ]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "char"])
def test_pieces_are_the_text(kind):
    text = "我爱你 naïve users"
    tokenizer = train_tokenizer([text, "naïve users we love"] * 3, kind, vocab_size=300)
    ids = tokenizer(text).input_ids
    cut = pieces(tokenizer, ids)
    assert "".join(cut) == text + "</s>"
    assert len(cut) == len(labels(cut)) == len(ids)
    grouped = [word for word, _ in words(cut)]
    assert grouped[-3:] == ["naïve", "users", "</s>"]
    assert "".join(grouped[:-3]) == "我爱你"


def test_words_of_unfinished_characters():
    assert words(["", "", "我", "", "爱", " ab", "c", " ", "d", "</s>"]) == [
        ("我", [0, 1, 2]),
        ("爱", [3, 4]),
        ("abc", [5, 6]),
        ("d", [8]),
        ("</s>", [9]),
    ]
    assert labels(["", "我", " ", " ab"]) == ["…", "我", "␣", "ab"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"source": "  "}, "the source is empty"),
        ({"target": ""}, "the target is empty"),
        ({"kind": "both"}, "kind='both' is no kind of attention: choose cross, encoder or decoder"),
        ({"layer": 2}, "layer=2: the cross attention of this model has the layers 0 to 1"),
        ({"kind": "encoder", "layer": -2}, "layer=-2: the encoder attention of this model has one layer, 0"),
        ({"head": 5}, "head=5: the cross attention of this model has the heads 0 to 1"),
        ({"rows": "both"}, "rows='both' is unknown"),
        ({"rows": "fed", "kind": "encoder"}, "rows='fed' is for rows of the output"),
        ({"target": "il cane", "num_beams": 2}, "with a target nothing is decoded: leave out num_beams"),
        ({"num_beems": 2}, "there is no generation argument 'num_beems': did you mean 'num_beams'"),
    ],
)
def test_what_cannot_be_is_refused(by_heart, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention_map(*by_heart, **{"source": "the dog", **arguments})


def test_recurrent_models_have_cross_attention_or_none():
    tokenizer = train_tokenizer(["a b c"], "word")
    with pytest.raises(ValueError, match="a recurrent model has no self-attention; its attention is kind='cross'"):
        attention_map(family("bahdanau").build(), tokenizer, "a", kind="encoder")
    with pytest.raises(ValueError, match="this model has no attention: all that its decoder knows of the source"):
        attention_map(family("lstm").build(), tokenizer, "a")


def test_beams_end_where_translate_ends(by_heart):
    model, processor = by_heart
    for beams in (1, 3):
        found = attention_map(model, processor, "two small birds sing", num_beams=beams)
        assert found.target == translate(model, processor, ["two small birds sing"], num_beams=beams)[0][0].text
