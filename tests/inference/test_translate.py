"""Sentences to sentences: order, n-best, scores, streams, loading, and what is refused."""

import fnmatch
import functools
import itertools
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig, GPT2Config, GPT2LMHeadModel

from dragoman import DragomanConfig, DragomanForConditionalGeneration
from dragoman.data.tokenizers import train_tokenizer
from dragoman.inference import (
    STRATEGIES,
    compare_strategies,
    load,
    score_hypotheses,
    strategy_arguments,
    translate,
    translate_stream,
)
from dragoman.inference.arguments import forced_words
from dragoman.models.generation import OFFLINE_LOOPS
from inference.tiny import SOURCES, TARGETS, learned_by_heart


@pytest.fixture(scope="module", params=[False, True], ids=["one_vocabulary", "two_vocabularies"])
def tiny(request):
    return learned_by_heart(request.param)


def texts(outputs):
    return [[hypothesis.text for hypothesis in found] for found in outputs]


def log_probability_step_by_step(model, source_ids, target_ids):
    """One token at a time, without a cache, without batching."""
    total, prefix = 0.0, [model.config.decoder_start_token_id]
    for token in target_ids:
        logits = model(input_ids=torch.tensor([source_ids]), decoder_input_ids=torch.tensor([prefix])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        prefix.append(token)
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_order_and_empty_lines(tiny, batch_size):
    sentences = ["", *SOURCES[:4], "  ", *SOURCES[4:], ""]
    expected = ["", *TARGETS[:4], "", *TARGETS[4:], ""]
    outputs = translate(*tiny, sentences, batch_size=batch_size)
    assert texts(outputs) == [[text] for text in expected]
    assert (outputs[0][0].score, outputs[0][0].log_probability, outputs[0][0].token_ids) == (0.0, 0.0, [])
    assert all(best.token_ids[-1] == 2 for (best,) in outputs if best.text)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_batches_by_tokens(tiny, monkeypatch, budget):
    """Order is kept, and no batch holds more source tokens than asked for, unless it is of one sentence."""
    shapes, decode = [], type(tiny[0]).generate

    def spy(self, *args, **kwargs):
        shapes.append(kwargs["input_ids"].shape)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(type(tiny[0]), "generate", spy)
    sentences, expected = [*SOURCES, ""] * 3, [*TARGETS, ""] * 3
    outputs = translate(*tiny, sentences, max_tokens_per_batch=budget, scores=False)
    assert texts(outputs) == [[text] for text in expected]
    assert all(rows * length <= budget or rows == 1 for rows, length in shapes)
    assert budget < 10_000 or len(shapes) == 1


def test_only_empty_lines_and_none_at_all(tiny):
    assert texts(translate(*tiny, ["", " "], num_beams=3, num_return_sequences=3)) == [[""] * 3] * 2
    assert translate(*tiny, []) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_beams": 4, "length_penalty": 0.6},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 3.0, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"max_new_tokens": 2},
    ],
)
def test_scores_are_those_of_the_model(tiny, arguments):
    model, processing_class = tiny
    outputs = translate(model, processing_class, SOURCES, batch_size=4, **arguments)
    for source, found in zip(SOURCES, outputs, strict=True):
        assert len(found) == arguments.get("num_return_sequences", 1)
        for hypothesis in found:
            ids = processing_class(text=source)["input_ids"]
            total = log_probability_step_by_step(model, ids, hypothesis.token_ids)
            assert hypothesis.log_probability == pytest.approx(total, abs=1e-4)
            length = len(hypothesis.token_ids) ** arguments.get("length_penalty", 1.0)
            assert hypothesis.score == pytest.approx(total / length, abs=1e-4)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_nbest_has_the_scores_and_the_order_of_beam_search(tiny, length_penalty):
    model, processing_class = tiny
    arguments = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": length_penalty}
    batch = processing_class(SOURCES, padding=True, return_tensors="pt")
    stock = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        return_dict_in_generate=True,
        output_scores=True,
        **arguments,
    )
    outputs = translate(model, processing_class, SOURCES, batch_size=3, **arguments)
    hypotheses = list(itertools.chain(*outputs))
    assert [found[0].text for found in outputs] == TARGETS
    assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx(stock.sequences_scores.tolist(), abs=1e-4)
    for hypothesis, row in zip(hypotheses, stock.sequences.tolist(), strict=True):
        assert hypothesis.token_ids == row[1 : 1 + len(hypothesis.token_ids)]
    for found in outputs:
        assert [hypothesis.score for hypothesis in found] == sorted((h.score for h in found), reverse=True)


def stock_scores(model, tokenizer, **arguments):
    batch = tokenizer(SOURCES, padding=True, return_tensors="pt")
    return model.generate(**batch, return_dict_in_generate=True, output_scores=True, **arguments).sequences_scores


class TestWhereTheDecoderBegins:
    """Scores start from what generate() started from, which may be another token than in training."""

    BEAMS = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 7}

    @pytest.mark.parametrize("where", ["call", "generation_config", "bos"])
    def test_another_start(self, where):
        model, tokenizer = learned_by_heart()
        arguments = dict(self.BEAMS)
        before = translate(model, tokenizer, SOURCES, **arguments)
        if where == "call":
            arguments["decoder_start_token_id"] = 7
        elif where == "generation_config":
            model.generation_config.decoder_start_token_id = 7
        else:
            model.generation_config.decoder_start_token_id, model.generation_config.bos_token_id = None, 7
        outputs = translate(model, tokenizer, SOURCES, **arguments)
        hypotheses = list(itertools.chain(*outputs))
        assert {hypothesis.start_id for hypothesis in hypotheses} == {7}
        expected = stock_scores(model, tokenizer, **arguments).tolist()
        assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx(expected, abs=1e-4)
        assert expected != pytest.approx([h.score for h in itertools.chain(*before)], abs=1e-2)

    def test_labels_that_are_rotated(self):
        """mBART trains from the last label, a language code, which at decoding comes from the generation config."""
        model, tokenizer = learned_by_heart(rotate_labels=True)
        model.generation_config.decoder_start_token_id = 5
        outputs = translate(model, tokenizer, SOURCES, **self.BEAMS)
        expected = stock_scores(model, tokenizer, **self.BEAMS).tolist()
        assert [hypothesis.score for hypothesis in itertools.chain(*outputs)] == pytest.approx(expected, abs=1e-4)

    def test_a_forced_first_token_counts_as_the_model_has_it(self):
        model, tokenizer = learned_by_heart()
        outputs = translate(model, tokenizer, SOURCES, forced_bos_token_id=6, max_new_tokens=5)
        for source, (best,) in zip(SOURCES, outputs, strict=True):
            assert best.token_ids[0] == 6
            total = log_probability_step_by_step(model, tokenizer(source).input_ids, best.token_ids)
            assert best.log_probability == pytest.approx(total, abs=1e-4)


def test_without_an_end_token_outputs_have_the_full_length():
    model, tokenizer = learned_by_heart()
    model.generation_config.eos_token_id = None
    outputs = translate(model, tokenizer, SOURCES[:3], max_new_tokens=9)
    assert [len(best.token_ids) for (best,) in outputs] == [9, 9, 9]


def test_large_vocabularies_are_scored_in_parts(tiny, monkeypatch):
    arguments = {"num_beams": 2, "num_return_sequences": 2}
    at_once = translate(*tiny, SOURCES, **arguments)
    monkeypatch.setattr(sys.modules["dragoman.inference.translate"], "LOGITS_AT_ONCE", 1)
    in_parts = translate(*tiny, SOURCES, **arguments)
    for one, other in zip(itertools.chain(*at_once), itertools.chain(*in_parts), strict=True):
        assert one.token_ids == other.token_ids
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_scores_later(tiny):
    sentences = [SOURCES[0], "", SOURCES[4]]
    arguments = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.3}
    outputs = translate(*tiny, sentences, scores=False, **arguments)
    assert all(hypothesis.score is hypothesis.log_probability is None for found in outputs for hypothesis in found)
    score_hypotheses(*tiny, sentences, outputs, length_penalty=0.3)
    for found, expected in zip(outputs, translate(*tiny, sentences, **arguments), strict=True):
        assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-5)


def test_lengths_given_in_the_call_win():
    model, tokenizer = learned_by_heart()
    longest = SOURCES[4]  # six words and </s>
    model.generation_config.max_length, model.generation_config.max_new_tokens = 11, None
    assert len(translate(model, tokenizer, [longest], max_new_tokens=3)[0][0].token_ids) == 3
    nothing = dict.fromkeys(("max_length", "max_new_tokens", "num_beams"))
    assert translate(model, tokenizer, [longest], **nothing) == translate(model, tokenizer, [longest])
    model.generation_config.max_length, model.generation_config.max_new_tokens = None, 11
    assert len(translate(model, tokenizer, [longest], max_length=3)[0][0].token_ids) == 2  # the start token counts


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram", "char"])
def test_forced_words(kind):
    """Whatever the pieces are, the words are there, at the beginning or after a space."""
    options = {"vocab_size": 300} if kind == "bpe" else {"vocab_size": 60} if kind == "unigram" else {}
    tokenizer = train_tokenizer(SOURCES + TARGETS, kind, **options)
    torch.manual_seed(0)
    sizes = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = DragomanConfig(vocab_size=len(tokenizer), decoder_attention_heads=2, **sizes)
    model = DragomanForConditionalGeneration(config).eval()
    forced = forced_words(tokenizer, ["una casa", "gatto|cane"])
    assert [len(forms) for forms in forced] == ([2, 4] if kind in ("bpe", "char") else [1, 2])
    for (best,) in translate(model, tokenizer, SOURCES[:3], num_beams=4, max_new_tokens=40, force_words_ids=forced):
        assert "una casa" in best.text
        assert "gatto" in best.text or "cane" in best.text
    if kind != "bpe":
        with pytest.raises(ValueError, match="the target vocabulary cannot spell the forced word 'Ω'"):
            forced_words(tokenizer, ["gatto|Ω"])
    with pytest.raises(ValueError, match=r"the forced word 'gatto\|' is empty"):
        forced_words(tokenizer, ["gatto|"])


def test_diverse_beams(tiny):
    outputs = translate(
        *tiny, SOURCES[:4], num_beams=3, num_beam_groups=3, diversity_penalty=50.0, num_return_sequences=3, scores=False
    )
    for found, target in zip(outputs, TARGETS, strict=False):
        assert found[0].text == target
        assert len({hypothesis.text.split()[0] for hypothesis in found}) == 3


@pytest.mark.parametrize("strategy", ["greedy", "beam", "contrastive"])
def test_stop_strings(strategy):
    model, tokenizer = learned_by_heart(kind="char")
    model.generation_config.max_length = 40
    arguments = strategy_arguments(strategy)
    for stop, text in ((None, TARGETS[4]), (["rossa", "x"], "una casa rossa")):
        ((best,),) = translate(model, tokenizer, [SOURCES[4]], stop_strings=stop, **arguments)
        assert best.text == text
        assert len(best.token_ids) == len(text) + (stop is None)


@pytest.mark.parametrize("strategy", ["greedy", "beam", "contrastive"])
def test_stop_strings_of_the_model(strategy):
    model, tokenizer = learned_by_heart(kind="char")
    model.generation_config.max_length, model.generation_config.stop_strings = 40, ["rossa"]
    ((best,),) = translate(model, tokenizer, [SOURCES[4]], **strategy_arguments(strategy))
    assert best.text == "una casa rossa"


def test_dropout_is_off_and_the_mode_is_left_as_it_was():
    model, tokenizer = learned_by_heart()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    model.train()
    outputs = translate(model, tokenizer, SOURCES)
    assert texts(outputs) == [[target] for target in TARGETS]
    assert model.training
    assert outputs[0][0].score == translate(model, tokenizer, SOURCES)[0][0].score


class TestStream:
    def test_endless_input_is_read_a_window_at_a_time(self, tiny):
        read = []

        def endless():
            for number in itertools.count():
                read.append(number)
                yield SOURCES[number % 10] if number % 11 else ""

        stream = translate_stream(*tiny, endless(), window=7, batch_size=3, scores=False)
        assert read == []
        for number, ((best,)) in enumerate(itertools.islice(stream, 30)):
            assert best.text == (TARGETS[number % 10] if number % 11 else "")
            assert len(read) == 7 * (number // 7 + 1)

    def test_a_window_of_one_answers_each_line(self, tiny):
        lines = iter(SOURCES)
        stream = translate_stream(*tiny, lines, window=1)
        assert next(stream)[0].text == TARGETS[0]
        assert next(lines) == SOURCES[1]

    def test_arguments_are_checked_before_the_first_line(self, tiny):
        with pytest.raises(ValueError, match="there is no generation argument 'beams'"):
            translate_stream(*tiny, iter([]), beams=3)
        for name in ("window", "batch_size", "max_tokens_per_batch"):
            with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
                translate_stream(*tiny, iter([]), **{name: 0})

    def test_errors_count_lines_over_all_windows(self, tiny):
        stream = translate_stream(*tiny, [*SOURCES[:5], None], window=2)
        with pytest.raises(ValueError, match="line 6 is None: each has to be a string"):
            list(stream)


def test_progress_goes_to_standard_error(tiny, capsys):
    translate(*tiny, SOURCES, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "translating" in err
    assert "10/10" in err
    translate(*tiny, SOURCES)
    assert capsys.readouterr() == ("", "")


class TestStrategies:
    def test_names_and_changes(self):
        assert strategy_arguments("beam") == STRATEGIES["beam"]
        assert strategy_arguments("beam: num_beams=8, length_penalty=0.8") == {
            "num_beams": 8,
            "num_beam_groups": 1,
            "do_sample": False,
            "length_penalty": 0.8,
        }
        assert strategy_arguments("greedy:suppress_tokens=[5,6]")["suppress_tokens"] == [5, 6]
        assert STRATEGIES["beam"] == {"num_beams": 4, "num_beam_groups": 1, "do_sample": False}
        assert strategy_arguments("default:max_new_tokens=9", use_cache=False) == {
            "use_cache": False,
            "max_new_tokens": 9,
        }
        assert strategy_arguments("beam", num_beams=4, max_length=9)["max_length"] == 9

    def test_mistakes(self):
        with pytest.raises(ValueError, match="there is no decoding strategy 'contrast': did you mean 'contrastive'"):
            strategy_arguments("contrast")
        with pytest.raises(ValueError, match="'beam:8': the option '8' has to be written key=value"):
            strategy_arguments("beam:8")
        with pytest.raises(ValueError) as caught:
            strategy_arguments("beam", num_beams=8)
        assert str(caught.value) == (
            "num_beams=8 is given for every strategy, but 'beam' has num_beams=4: "
            "write the strategy with it, as in beam:num_beams=8, or leave it out."
        )
        with pytest.raises(ValueError, match=r"strategy 'beam:num_beam=8': no such option: --num_beam; .* --num-beams"):
            strategy_arguments("beam:num_beam=8")
        with pytest.raises(ValueError, match=r"strategy 'beam:num_beams=eight': --num_beams.* 'eight'"):
            strategy_arguments("beam:num_beams=eight")

    def test_each_name_is_its_mode_whatever_was_saved(self, monkeypatch):
        model, tokenizer = learned_by_heart()
        model.generation_config.update(num_beams=3, do_sample=True, top_k=7, penalty_alpha=0.6)
        modes = []

        def spied(name, loop):
            @functools.wraps(loop)
            def spy(*args, **kwargs):
                config = next(one for one in (*args, *kwargs.values()) if isinstance(one, GenerationConfig))
                modes.append((name, config.num_beams, config.do_sample))
                return loop(*args, **kwargs)

            return spy

        for name in ("_sample", "_beam_search"):
            monkeypatch.setattr(type(model), name, spied(name, getattr(type(model), name)))
        for mode, loop in OFFLINE_LOOPS.items():
            monkeypatch.setitem(OFFLINE_LOOPS, mode, spied(mode.value, loop))
        outputs = compare_strategies(model, tokenizer, SOURCES[:2], scores=False)
        assert list(outputs) == ["greedy", "beam", "sampling", "contrastive"]
        assert modes == [
            ("_sample", 1, False),
            ("_beam_search", 4, False),
            ("_sample", 1, True),
            ("contrastive_search", 1, False),
        ]
        for found in outputs.values():
            assert [hypothesis.text for hypothesis in found] == TARGETS[:2]
            assert found[0].score is None

    def test_all_are_checked_before_the_first_runs(self, tiny):
        with pytest.raises(ValueError, match=r"strategy 'contrastive:alpha=0.5': no such option: --alpha"):
            compare_strategies(*tiny, SOURCES, ["greedy", "contrastive:alpha=0.5"])


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "nearest"),
        [("num_beam", "num_beams"), ("temprature", "temperature"), ("penaltyalpha", "penalty_alpha")],
    )
    def test_unknown_arguments(self, tiny, name, nearest):
        with pytest.raises(ValueError) as caught:
            translate(*tiny, SOURCES, **{name: 3})
        assert str(caught.value).startswith(
            f"there is no generation argument {name!r}: did you mean {nearest!r}? Valid: "
        )

    @pytest.mark.parametrize("name", ["return_dict_in_generate", "output_scores", "generation_config", "inputs"])
    def test_arguments_that_would_be_lost(self, tiny, name):
        with pytest.raises(ValueError, match=f"there is no generation argument '{name}'"):
            translate(*tiny, SOURCES, **{name: True})

    def test_sources_longer_than_learned_positions(self):
        model, tokenizer = learned_by_heart(position_embedding_type="learned")
        fits, long = " ".join(["the"] * 39), " ".join(["the"] * 40)  # and </s>: 40 positions
        assert len(translate(model, tokenizer, [fits])) == 1
        with pytest.raises(ValueError) as caught:
            translate(model, tokenizer, [SOURCES[0], "", long, fits])
        assert str(caught.value) == (
            "line 3 ('the the the the the the the th…') has 41 tokens, but the model has learned positions for 40: "
            "split it into shorter ones."
        )

    @pytest.mark.parametrize("kind", ["rotary", "sinusoidal", "relative", "none"])
    def test_other_positions_have_no_limit(self, kind):
        model, tokenizer = learned_by_heart(position_embedding_type=kind)
        ((best,),) = translate(model, tokenizer, [" ".join(["the"] * 90)])
        assert math.isfinite(best.score)

    def test_a_tokenizer_of_another_model(self, tiny):
        model, _ = tiny
        larger = train_tokenizer([" ".join(f"word{number}" for number in range(90))], "word")
        with pytest.raises(
            ValueError, match=r"line 2 \('word8 word77'\) has the token id \d+, but the model's source "
        ):
            translate(model, larger, ["", "word8 word77"])

    @pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True}])
    def test_several_outputs_need_beams_or_sampling(self, tiny, arguments):
        with pytest.raises(ValueError) as caught:
            translate(*tiny, SOURCES[:1], num_return_sequences=3, **arguments)
        assert str(caught.value) == (
            "num_return_sequences=3 (--nbest) needs num_beams (--num-beams) of at least 3, or do_sample (--do-sample) "
            f"without beams; num_beams is {arguments.get('num_beams', 1)}."
        )

    @pytest.mark.parametrize(
        ("arguments", "token_id"),
        [
            ({"forced_bos_token_id": 99999}, 99999),
            ({"forced_eos_token_id": [2, 98]}, 98),
            ({"suppress_tokens": [5, -1]}, -1),
            ({"bad_words_ids": [[5], [6, 97]]}, 97),
            ({"sequence_bias": [[[5, 96], -2]]}, 96),
            ({"sequence_bias": {(5, 95): -2.0}}, 95),
            ({"decoder_start_token_id": 94}, 94),
        ],
    )
    def test_ids_outside_the_vocabulary(self, tiny, arguments, token_id):
        ((name, _),) = arguments.items()
        with pytest.raises(ValueError) as caught:
            translate(*tiny, SOURCES[:1], **arguments)
        assert str(caught.value) == (
            f"{name} has the token id {token_id}, but the target vocabulary has the ids 0 to "
            f"{tiny[0].config.vocab_size - 1}"
        )

    def test_a_sequence_bias_without_a_bias(self, tiny):
        with pytest.raises(ValueError, match=r"sequence_bias must be a list of pairs such as \[\[5, 6\], -2.0\], got"):
            translate(*tiny, SOURCES[:1], sequence_bias=[[5, 6, 7]])

    def test_arguments_without_effect(self, tiny):
        model, tokenizer = tiny
        for arguments in ({"top_p": 0.9}, {"top_k": 4}, {"early_stopping": True}, {"num_beams": 2, "temperature": 0.7}):
            with pytest.raises(ValueError, match=f"`{list(arguments)[-1]}`: .* this flag is only used in "):
                translate(model, tokenizer, SOURCES[:1], **arguments)
        translate(model, tokenizer, SOURCES[:1], top_k=3, penalty_alpha=0.5)

    def test_the_mode_saved_with_the_model_counts(self):
        model, tokenizer = learned_by_heart()
        model.generation_config.num_beams = 3
        assert texts(translate(model, tokenizer, SOURCES[:2], length_penalty=0.5)) == [[text] for text in TARGETS[:2]]
        model.generation_config.num_beams, model.generation_config.do_sample = 1, True
        translate(model, tokenizer, SOURCES[:1], top_p=0.9)
        model.generation_config.do_sample, model.generation_config.penalty_alpha = False, 0.6
        translate(model, tokenizer, SOURCES[:1], top_k=3)
        with pytest.raises(ValueError, match=r"`top_k`: .* this flag is only used in "):
            translate(model, tokenizer, SOURCES[:1], top_k=3, penalty_alpha=0.0)


def test_a_stock_model_works_too():
    """Bart has learned positions with an offset, its own start token and one vocabulary."""
    tokenizer = train_tokenizer(SOURCES, "word")
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=12,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=14,
        decoder_ffn_dim=14,
        max_position_embeddings=20,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config).eval()
    outputs = translate(model, tokenizer, SOURCES, num_beams=3, num_return_sequences=2, max_new_tokens=6, batch_size=3)
    for source, found in zip(SOURCES, outputs, strict=True):
        for hypothesis in found:
            total = log_probability_step_by_step(model, tokenizer(source).input_ids, hypothesis.token_ids)
            assert hypothesis.log_probability == pytest.approx(total, abs=1e-4)
    with pytest.raises(ValueError, match=r"line 1 .* has 21 tokens, but the model has learned positions for 20"):
        translate(model, tokenizer, [" ".join(["the"] * 20)])


class TestLoad:
    @pytest.mark.parametrize("two_vocabularies", [False, True])
    def test_a_saved_model(self, two_vocabularies, tmp_path):
        model, processing_class = learned_by_heart(two_vocabularies)
        model.save_pretrained(tmp_path)
        processing_class.save_pretrained(tmp_path)
        loaded, loaded_class = load(tmp_path, device="cpu")
        assert type(loaded) is DragomanForConditionalGeneration
        assert type(loaded_class) is type(processing_class)
        assert not loaded.training
        expected = translate(model, processing_class, SOURCES, num_beams=2, num_return_sequences=2)
        assert translate(loaded, loaded_class, SOURCES, num_beams=2, num_return_sequences=2) == expected
        half, _ = load(str(tmp_path), device="cpu", dtype="bfloat16")
        assert half.dtype == torch.bfloat16
        assert texts(translate(half, loaded_class, SOURCES)) == [[target] for target in TARGETS]

    def test_wrong_folders(self, tmp_path):
        model, _ = learned_by_heart()
        with pytest.raises(FileNotFoundError, match="nowhere/else does not exist: give the folder of a saved model"):
            load(tmp_path / "nowhere" / "else")
        (tmp_path / "file").touch()
        with pytest.raises(FileNotFoundError, match="file is a file: give the folder of a saved model"):
            load(tmp_path / "file")
        with pytest.raises(FileNotFoundError, match=r"holds no model \(config.json is missing\)"):
            load(tmp_path)
        model.config.save_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"holds no weights \(model.safetensors is missing\)"):
            load(tmp_path)
        model.save_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"holds no tokenizer \(tokenizer_config.json is missing\)"):
            load(tmp_path)

    def test_the_nearest_models_are_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        for name in ("runs/quickstart", "runs/dialogue", "runs/mine/checkpoint-7", "runs/mine/checkpoint-14"):
            Path(name).mkdir(parents=True)
            Path(name, "config.json").touch()
        os.utime("runs/mine/checkpoint-7", (1, 1))
        Path("runs/quick").mkdir()
        for wrong, hint in [
            ("runs/quikstart", "; did you mean runs/quickstart?"),
            ("quikstart", "; did you mean runs/quickstart?"),
            ("./run/quickstat", "; did you mean runs/quickstart?"),
            (tmp_path / "runs/dialog", f"; did you mean {tmp_path}/runs/dialogue?"),
            ("./runs/quick", "holds no model (config.json is missing); did you mean runs/quickstart?"),
            ("./runs/mine", "; there are models in it: runs/mine/checkpoint-14, runs/mine/checkpoint-7"),
            ("./elsewhere", "give the folder of a saved model, or its name on the Hub."),
        ]:
            with pytest.raises(FileNotFoundError) as caught:
                load(wrong)
            assert str(caught.value).endswith(hint)

    @pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "not a name"])
    def test_names_that_the_hub_does_not_know(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError) as caught:
            load(name)
        assert str(caught.value).startswith(
            f"{name!r} is no folder here and no model that the Hub or the local cache gives"
        )

    def test_a_folder_without_a_model_does_not_hide_a_name_on_the_hub(self, tmp_path, monkeypatch):
        model, tokenizer = learned_by_heart()
        model.save_pretrained(tmp_path / "cache")
        tokenizer.save_pretrained(tmp_path / "cache")
        asked = {}

        def snapshot_download(name, revision, allow_patterns):
            asked[name] = allow_patterns
            return tmp_path / "cache"

        monkeypatch.setattr(sys.modules["dragoman.inference.loading"], "snapshot_download", snapshot_download)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "name" / "evaluation").mkdir(parents=True)
        assert load("org/name", device="cpu")[0].config.d_model == 32
        assert list(asked) == ["org/name"]
        wanted = ["model.safetensors", "target_tokenizer/tokenizer.json", "source.spm", "bpe.codes.bpe", "spiece.model"]
        for file in wanted:
            assert any(fnmatch.fnmatch(file, pattern) for pattern in asked["org/name"]), file
        assert not any(fnmatch.fnmatch("modeling.py", pattern) for pattern in asked["org/name"])

    def test_a_folder_without_a_model_that_is_no_name_either(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"empty holds no model \(config.json is missing\)"):
            load("empty")

    def test_no_encoder_decoder(self, tmp_path):
        GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=9)).save_pretrained(
            tmp_path
        )
        with pytest.raises(ValueError, match="holds a model of type 'gpt2', which is no encoder-decoder"):
            load(tmp_path)

    def test_devices_and_dtypes(self, tmp_path):
        with pytest.raises(ValueError, match="device 'gpu' cannot be used here: "):
            load(tmp_path, device="gpu")
        with pytest.raises(ValueError, match="device 'cuda:93' cannot be used here: "):
            load(tmp_path, device="cuda:93")
        with pytest.raises(ValueError, match="dtype 'half precision' is unknown: use float32, bfloat16 or float16"):
            load(tmp_path, device="cpu", dtype="half precision")
