"""Pipelines against `translate`: the same texts and scores, whatever is batched, streamed or listed."""

import json

import pytest
import torch
import transformers

import dragoman
from dragoman import DragomanConfig, DragomanForConditionalGeneration
from dragoman.data.tokenizers import train_tokenizer
from dragoman.inference.translate import translate
from dragoman.models.pipeline_dragoman import TURN_SEPARATOR, join_turns
from inference.tiny import SOURCES, TARGETS, learned_by_heart


@pytest.fixture(scope="module", params=[False, True], ids=["one vocabulary", "two vocabularies"])
def learned(request):
    return learned_by_heart(two_vocabularies=request.param)


@pytest.fixture(scope="module")
def translator(learned):
    model, processing_class = learned
    return dragoman.pipeline("translation", model, tokenizer=processing_class)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_and_batches(translator, batch_size):
    assert translator(SOURCES, batch_size=batch_size) == [{"translation_text": target} for target in TARGETS]


def test_one_input_gives_a_list_as_it_always_did(translator):
    assert translator("the dog") == [{"translation_text": "il cane"}]


@pytest.mark.parametrize(
    ("task", "name"),
    [("summarization", "summary_text"), ("dialogue", "generated_text"), ("seq2seq-generation", "generated_text")],
)
def test_the_task_names_the_outputs(learned, task, name):
    model, processing_class = learned
    assert dragoman.pipeline(task, model, tokenizer=processing_class)("the dog") == [{name: "il cane"}]


def test_generators_are_read_as_they_are_decoded(translator):
    read = []

    def sources():
        for source in SOURCES[:5]:
            read.append(source)
            yield source

    outputs = translator(sources(), batch_size=2)
    assert next(iter(outputs)) == [{"translation_text": TARGETS[0]}]
    assert len(read) < 5


def test_nbest_and_scores_are_those_of_translate(translator, learned):
    settings = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7}
    outputs = translator([*SOURCES, " "], batch_size=4, scores=True, **settings)
    expected = translate(*learned, [*SOURCES, " "], **settings)
    for records, hypotheses in zip(outputs, expected, strict=True):
        for record, hypothesis in zip(records, hypotheses, strict=True):
            assert record["translation_text"] == hypothesis.text
            assert record["score"] == pytest.approx(hypothesis.score, abs=1e-5)
            assert record["log_probability"] == pytest.approx(hypothesis.log_probability, abs=1e-5)
    assert outputs[-1] == [{"translation_text": "", "score": 0.0, "log_probability": 0.0}] * 2


def test_scores_of_outputs_without_an_end(translator, learned):
    settings = {"max_new_tokens": 2, "num_beams": 1}
    (record,) = translator(SOURCES[4], scores=True, **settings)
    ((hypothesis,),) = translate(*learned, [SOURCES[4]], **settings)
    assert len(hypothesis.token_ids) == 2
    assert record["log_probability"] == pytest.approx(hypothesis.log_probability, abs=1e-5)


def test_defaults_are_given_once(learned):
    model, processing_class = learned
    settings = {"num_beams": 2, "num_return_sequences": 2, "batch_size": 3, "scores": True}
    translator = dragoman.pipeline("translation", model, tokenizer=processing_class, **settings)
    assert [len(records) for records in translator(SOURCES[:4])] == [2, 2, 2, 2]
    assert translator("the dog", num_return_sequences=1)[0].keys() == {"translation_text", "score", "log_probability"}


def test_a_row_may_leave_its_prefix_open(translator):
    assert translator({"source": "the dog", "source_prefix": None}) == [{"translation_text": "il cane"}]


def test_contrastive_search(translator):
    assert translator("the dog", penalty_alpha=0.6, top_k=4) == [{"translation_text": "il cane"}]


def test_streaming_gives_the_words_one_by_one(translator):
    pieces = list(translator.stream(SOURCES[4]))
    assert "".join(pieces) == TARGETS[4]
    assert len(pieces) > 3


def test_streaming_reports_what_went_wrong(translator):
    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
        list(translator.stream("the dog", num_beams=2))


@pytest.mark.parametrize(
    ("inputs", "settings", "sentence"),
    [
        (3, {}, "an input has to be a text, or a row with a text as its source, not 3"),
        ({"text": "the dog"}, {}, "not None"),
        ("the dog", {"num_bems": 2}, "num_bems"),
        ("the dog", {"history": ["hello"]}, "this tokenizer has no <sep>, which stands between the turns"),
    ],
)
def test_mistakes(translator, inputs, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        translator(inputs, **settings)


def test_an_unknown_task(learned):
    with pytest.raises(ValueError, match="there is no task 'translating': did you mean 'translation'"):
        dragoman.pipeline("translating", learned[0], tokenizer=learned[1])
    with pytest.raises(ValueError, match="a loaded model needs its tokenizer"):
        dragoman.pipeline("translation", learned[0])


def test_nothing_to_do(translator):
    assert translator([]) == []


@pytest.fixture
def talker():
    """An untrained dialogue model: what it says differs with everything that it hears."""
    texts = ["hello", "hi there", "how are you", "fine and you"]
    tokenizer = train_tokenizer(texts, "word", extra_special_tokens=[TURN_SEPARATOR])
    torch.manual_seed(0)
    sizes = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 17, "decoder_ffn_dim": 19}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = DragomanForConditionalGeneration(DragomanConfig(vocab_size=len(tokenizer), **sizes, **heads)).eval()
    model.generation_config.max_length = 9
    return dragoman.pipeline("dialogue", model, tokenizer=tokenizer)


def test_earlier_turns_stand_before_the_source(talker):
    turns = ["hello", "hi there", "how are you"]
    expected = talker(join_turns(turns), scores=True)
    assert talker.tokenizer(join_turns(turns)).input_ids.count(talker.tokenizer.convert_tokens_to_ids("<sep>")) == 2
    row = {"source": turns[-1], "history": turns[:-1]}
    chat = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant", "user"), turns, strict=True)]
    assert talker(row, scores=True) == expected
    assert talker(turns[-1], history=turns[:-1], scores=True) == expected
    assert talker(chat, scores=True) == expected
    assert talker([row, "hello"], scores=True, batch_size=1)[0] == expected[0]
    assert talker(turns[-1], scores=True) != expected


def test_the_host_builds_it_from_loaded_objects(learned):
    model, processing_class = learned
    name = "processor" if isinstance(processing_class, dragoman.DragomanProcessor) else "tokenizer"
    generator = transformers.pipeline("seq2seq-generation", model=model, **{name: processing_class})
    assert type(generator) is dragoman.Seq2SeqGenerationPipeline
    assert generator("the dog") == [{"generated_text": "il cane"}]


def test_a_folder_without_the_pipeline_works_beside_the_package(learned, tmp_path):
    """An older version saved neither the pipeline's code nor its name in config.json; saved again, it has both."""
    for part in learned:
        part.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert list(config.pop("custom_pipelines")) == ["seq2seq-generation"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pipeline_dragoman.py").unlink()
    generator = transformers.pipeline("seq2seq-generation", model=str(tmp_path), trust_remote_code=True)
    assert generator("the dog") == [{"generated_text": "il cane"}]
    generator.save_pretrained(tmp_path / "again")
    assert "custom_pipelines" in json.loads((tmp_path / "again" / "config.json").read_text())
    assert (tmp_path / "again" / "pipeline_dragoman.py").is_file()


def test_any_encoder_decoder_will_do():
    tokenizer = train_tokenizer(SOURCES, "word")
    settings = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 17, "decoder_ffn_dim": 19}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 1, "decoder_start_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": None}
    config = transformers.MarianConfig(vocab_size=len(tokenizer), **settings, **heads, **ids)
    model = transformers.MarianMTModel(config)
    (record,) = dragoman.pipeline("translation", model, tokenizer=tokenizer)("the dog", max_length=5)
    assert record.keys() == {"translation_text"}
