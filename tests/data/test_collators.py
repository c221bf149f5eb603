import pytest
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import BartConfig, BartForConditionalGeneration

import dragoman
from conftest import V
from dragoman.data import collators
from dragoman.data.collators import Seq2SeqCollator, encode_pairs
from dragoman.data.tokenizers import SPECIAL_TOKENS, build_tokenizer, train_tokenizer


# Word tokenizers: a text of n words has n + 1 tokens.
PAIRS = [("one two three", "uno due"), ("one", "uno due tre quattro"), ("two three", "due tre"), ("three", "tre")]


def dataset_of(pairs, streaming=False):
    dataset = Dataset.from_dict(
        {"source": [s for s, _ in pairs], "target": [t for _, t in pairs], "id": [*map(str, pairs)]}
    )
    return dataset.to_iterable_dataset() if streaming else dataset


def build(joint=True):
    return build_tokenizer(dataset_of(PAIRS), kind="word", vocab_size=50, joint=joint)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_encoded_pairs(streaming, joint):
    tokenizer = build(joint)
    encoded, report = encode_pairs(dataset_of(PAIRS, streaming), tokenizer)
    rows = list(encoded)
    assert [set(row) for row in rows] == [{"input_ids", "labels", "length"}] * len(PAIRS)
    for row, (source, target) in zip(rows, PAIRS, strict=True):
        assert row["input_ids"] == tokenizer(source)["input_ids"]
        assert row["labels"] == tokenizer(text_target=target)["input_ids"]
        assert row["input_ids"][-1] == row["labels"][-1] == 2
        assert tokenizer.decode(row["labels"], skip_special_tokens=True) == target
    assert [row["length"] for row in rows] == [4, 5, 3, 2], "tokens of the longer side"
    assert str(report) == "kept 4 of 4 pairs"


def stream_of(rows):
    def part(numbers):
        return (rows[number] for number in numbers)

    return IterableDataset.from_generator(part, gen_kwargs={"numbers": list(range(len(rows)))})


def test_a_stream_of_which_later_rows_have_further_columns():
    """The rows of its files, of those of one process, and of a stream that goes on: token ids and nothing else."""
    pairs = [*PAIRS, ("", "tre"), *PAIRS[::-1]]
    rows = [{"source": source, "target": target} for source, target in pairs]
    rows[1]["note"], rows[6]["id"] = "n", 7
    tokenizer = build()
    expected = list(encode_pairs(dataset_of([pair for pair in pairs if pair[0]]), tokenizer)[0])
    encoded, report = encode_pairs(stream_of(rows), tokenizer, empty="drop")
    assert list(encoded) == expected
    assert str(report) == "kept 8 of 9 pairs; dropped 1: 1 with an empty source"
    shares = [list(split_dataset_by_node(encoded, rank, 3)) for rank in range(3)]
    assert sorted((row for share in shares for row in share), key=str) == sorted(expected, key=str)
    assert [len(share) for share in shares] == [3, 2, 3]
    begun = iter(encoded)
    first = [next(begun) for _ in range(3)]
    encoded.load_state_dict(encoded.state_dict())
    assert first + list(encoded) == expected


@pytest.mark.parametrize("between", [0, 1500])
def test_a_row_of_a_stream_without_the_prefix_of_the_others(between):
    bare, prefixed = {"source": "one", "target": "uno"}, {"source": "one", "target": "uno", "source_prefix": "two "}
    tokenizer = build()
    for rows, number in (([prefixed] * (between + 1) + [bare], between + 2), ([bare] * (between + 1) + [prefixed], 1)):
        encoded, _ = encode_pairs(stream_of(rows), tokenizer)
        with pytest.raises(ValueError, match=f"pair {number} has no source_prefix, which other pairs have"):
            list(encoded)
        assert len(build_tokenizer(stream_of(rows), kind="word")) == len(SPECIAL_TOKENS) + 3, "one, two and uno"


@pytest.mark.parametrize("streaming", [False, True])
def test_dropped_pairs_are_counted(streaming):
    pairs = [*PAIRS, (" ", "tre"), ("three", ""), ("", "\t")]
    limits = {"max_source_length": 3, "max_target_length": 4}
    encoded, report = encode_pairs(dataset_of(pairs, streaming), build(), overlong="drop", empty="drop", **limits)
    rows = list(encoded)
    assert [len(row["input_ids"]) for row in rows] == [3, 2]
    assert report.kept == 2
    assert report.dropped == {
        "with a source longer than 3 tokens": 1,
        "with a target longer than 4 tokens": 1,
        "with an empty source": 2,
        "with an empty target": 1,
    }
    assert str(report) == (
        "kept 2 of 7 pairs; dropped 5: 1 with a source longer than 3 tokens, 1 with a target longer than 4 tokens, "
        "2 with an empty source, 1 with an empty target"
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_truncation_keeps_the_final_token(streaming):
    tokenizer = build()
    limits = {"max_source_length": 3, "max_target_length": 4}
    encoded, report = encode_pairs(dataset_of(PAIRS, streaming), tokenizer, overlong="truncate", **limits)
    rows = list(encoded)
    assert tokenizer.decode(rows[0]["input_ids"]) == "one two </s>"
    assert tokenizer.decode(rows[1]["labels"]) == "uno due tre </s>"
    assert [row["length"] for row in rows] == [3, 4, 3, 2]
    assert str(report) == "kept 4 of 4 pairs; truncated: 1 source, 1 target"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [*PAIRS, ("one two three", "uno due tre quattro tre")],
            r"pair 5 \('one two three' / 'uno due.*the target has 6 tok",
        ),
        ([PAIRS[3], (" ", "tre")], r"pair 2 \(' ' / 'tre'\): the source is empty; set empty=drop to"),
        ([PAIRS[3], ("three", "")], r"pair 2 \('three' / ''\): the target is empty"),
    ],
)
def test_errors_name_the_pair(pairs, message, streaming):
    with pytest.raises(ValueError, match=message):
        list(encode_pairs(dataset_of(pairs, streaming), build(), max_target_length=5)[0])


def test_errors_advise_the_options_as_the_caller_spells_them():
    limit = {"max_target_length": 3}
    for prefix, advice in (
        (None, ""),
        ("data.", "; set data.overlong=drop or data.overlong=truncate, or raise the limit"),
    ):
        with pytest.raises(ValueError, match=r"tokens and max_target_length is 3") as caught:
            encode_pairs(dataset_of([("one", "uno due tre")]), build(), option_prefix=prefix, **limit)
        assert str(caught.value).endswith("max_target_length is 3" + advice)
    with pytest.raises(ValueError, match=r"the source is empty; set data\.empty=drop to leave such pairs out"):
        encode_pairs(dataset_of([(" ", "tre")]), build(), option_prefix="data.")


def test_drops_that_come_late_in_the_data():
    """The outcome columns are typed by their first rows: nothing dropped there must not matter."""
    pairs = [PAIRS[3]] * 2500 + [("", "tre")] + [PAIRS[3]] * 7
    encoded, report = encode_pairs(dataset_of(pairs), build(), empty="drop")
    assert len(encoded) == report.kept == 2507
    assert report.dropped == {"with an empty source": 1}


def test_several_processes():
    encoded, report = encode_pairs(dataset_of([*PAIRS, ("", "tre")]), build(joint=False), empty="drop", num_proc=2)
    assert encoded[:] == encode_pairs(dataset_of(PAIRS), build(joint=False))[0][:]
    assert str(report) == "kept 4 of 5 pairs; dropped 1: 1 with an empty source"
    with pytest.raises(ValueError, match="num_proc is for map-style data"):
        encode_pairs(dataset_of(PAIRS, streaming=True), build(), num_proc=2)


def test_refused_arguments():
    with pytest.raises(ValueError, match="overlong is 'ignore'; it can be error, drop, truncate"):
        encode_pairs(dataset_of(PAIRS), build(), overlong="ignore")
    with pytest.raises(ValueError, match="empty is 'truncate'; it can be error, drop"):
        encode_pairs(dataset_of(PAIRS), build(), empty="truncate")
    with pytest.raises(ValueError, match="max_target_length is 1; it must be at least 2"):
        encode_pairs(dataset_of(PAIRS), build(), max_target_length=1)
    with pytest.raises(ValueError, match=r"no pair is left .*: kept 0 of 1 pairs; dropped 1: 1 with an empty source"):
        encode_pairs(dataset_of([("", "tre")]), build(), empty="drop")
    endless = build()
    endless.backend_tokenizer.post_processor = train_tokenizer(["a"], "char").backend_tokenizer.normalizer
    with pytest.raises(ValueError, match="does not end its output with its end-of-sequence token '</s>'"):
        encode_pairs(dataset_of(PAIRS), endless)


def tiny_dragoman(**settings):
    sizes = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 18, "decoder_ffn_dim": 18}
    heads = dict.fromkeys(
        (
            "encoder_attention_heads",
            "decoder_attention_heads",
            "encoder_num_key_value_heads",
            "decoder_num_key_value_heads",
        ),
        2,
    )
    return dragoman.DragomanForConditionalGeneration(dragoman.DragomanConfig(**sizes, **heads, **settings))


@pytest.mark.parametrize("joint", [False, True])
def test_batch(joint):
    processing_class = build(joint)
    rows = list(encode_pairs(dataset_of(PAIRS), processing_class)[0])
    batch = Seq2SeqCollator(processing_class)(rows[:3])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 4)
    assert batch["labels"].shape == (3, 5)
    for index, row in enumerate(rows[:3]):
        source, target = row["input_ids"], row["labels"]
        assert batch["input_ids"][index].tolist() == source + [1] * (4 - len(source))
        assert batch["attention_mask"][index].tolist() == [1] * len(source) + [0] * (4 - len(source))
        assert batch["labels"][index].tolist() == target + [-100] * (5 - len(target))
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert Seq2SeqCollator(processing_class, pad_to_multiple_of=7)(rows)["labels"].shape == (4, 7)
    assert "labels" not in Seq2SeqCollator(processing_class)([{"input_ids": [5, 2]}, {"input_ids": [2]}])


def test_batch_for_a_model():
    tokenizer = build(joint=False)
    model = tiny_dragoman(source_vocab_size=7, vocab_size=9, share_embeddings=False)
    rows = list(encode_pairs(dataset_of(PAIRS), tokenizer)[0])
    batch = Seq2SeqCollator(tokenizer, model)(rows)
    expected = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    assert torch.equal(batch["decoder_input_ids"], expected)
    assert batch["decoder_input_ids"][:, 0].tolist() == [0] * 4
    assert (batch["decoder_input_ids"] >= 0).all()
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"input_ids": [4, 2], "labels": [8, 2]}, {"input_ids": [7, 2], "labels": [4, 2]}],
            "input_ids of row 2 of the batch hold the token id 7, but the model's source vocabulary has the ids 0 to 6",
        ),
        (
            [{"input_ids": [4, 2], "labels": [4, 9, -100]}],
            "labels of row 1 of the batch hold the token id 9, but the model's target vocabulary has the ids 0 to 8",
        ),
        ([{"input_ids": [-1, 2], "labels": [2]}], "input_ids of row 1 of the batch hold the token id -1"),
    ],
)
def test_ids_outside_the_vocabulary(rows, message):
    model = tiny_dragoman(source_vocab_size=7, vocab_size=9, share_embeddings=False)
    with pytest.raises(ValueError, match=message):
        Seq2SeqCollator(build(joint=False), model)(rows)


def test_models_of_the_library():
    config = BartConfig(
        vocab_size=9,
        d_model=12,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    collator = Seq2SeqCollator(build(), BartForConditionalGeneration(config))
    assert collator([{"input_ids": [8, 2], "labels": [8, 2]}])["decoder_input_ids"].shape == (1, 2)
    with pytest.raises(ValueError, match="source vocabulary has the ids 0 to 8"):
        collator([{"input_ids": [9, 2], "labels": [8, 2]}])


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "varlen"])
@pytest.mark.parametrize("rotate_labels", [False, True])
def test_packed_rows_train_as_separate_rows(any_transformer, varlen_on_cpu, monkeypatch, implementation, rotate_labels):
    """Several pairs in a row: the loss and every gradient of a row for each pair."""
    if implementation == "varlen" and any_transformer.name in ("relative", "unordered"):
        return  # refused, as tests/models/test_varlen.py shows
    monkeypatch.setattr(collators, "PACKED_LENGTH", 11)
    model = any_transformer.build(rotate_labels=rotate_labels, label_smoothing=0.1).train()
    model.set_attn_implementation(implementation)
    generator = torch.Generator().manual_seed(4)
    rows = [
        {name: torch.randint(3, V, (length,), generator=generator).tolist() for name, length in sides.items()}
        for sides in (
            {"input_ids": s, "labels": t} for s, t in ((4, 2), (1, 6), (13, 5), (3, 3), (5, 1), (2, 4), (6, 6))
        )
    ]
    tokenizer = train_tokenizer(["a b c"], kind="word")  # only its padding is used
    found = []
    for collator in (collators.PackingCollator(tokenizer, model=model), Seq2SeqCollator(tokenizer, model=model)):
        batch = collator(rows)
        model.zero_grad()
        outputs = model(**batch, num_items_in_batch=27)
        outputs.loss.backward()
        found.append((batch, outputs.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (packed, loss, gradients), (separate, expected_loss, expected) = found
    assert separate["input_ids"].shape == (7, 13)
    assert packed["input_ids"].shape[0] < 5
    assert packed["segment_ids"].max() > 1
    assert (packed["labels"] != -100).sum() == 27
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)
