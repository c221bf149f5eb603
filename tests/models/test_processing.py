import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments

import dragoman
from dragoman.data.collators import Seq2SeqCollator
from dragoman.data.tokenizers import load_tokenizer, train_tokenizer
from dragoman.models.processing_dragoman import DragomanProcessor


SOURCE, TARGET = "I love you", "我 爱 你"


@pytest.fixture(scope="module")
def processor():
    source = train_tokenizer([SOURCE, "I love tea"], "char", 50)
    return DragomanProcessor(source, train_tokenizer([TARGET, "我 爱 茶"], "word", 60))


@pytest.fixture(scope="module")
def model(processor):
    config = dragoman.DragomanConfig(
        source_vocab_size=len(processor.tokenizer),
        vocab_size=len(processor.target_tokenizer),
        share_embeddings=False,
        d_model=12,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_num_key_value_heads=2,
        decoder_num_key_value_heads=2,
        encoder_ffn_dim=18,
        decoder_ffn_dim=22,
    )
    return dragoman.DragomanForConditionalGeneration(config)


def test_two_vocabularies(processor):
    both = processor([SOURCE, "I"], text_target=[TARGET, "我"], padding=True, return_tensors="pt")
    assert set(both) == {"input_ids", "attention_mask", "labels"}
    assert both["input_ids"].shape == both["attention_mask"].shape == (2, len(SOURCE) + 1)
    assert both["labels"].shape == (2, 4)
    assert both["labels"][1].tolist() == [processor.target_tokenizer.convert_tokens_to_ids("我"), 2, 1, 1]
    assert torch.equal(processor(text=[SOURCE, "I"], padding=True, return_tensors="pt")["input_ids"], both["input_ids"])
    assert processor(text_target=TARGET)["input_ids"] == both["labels"][0].tolist()
    assert processor.decode(both["labels"][0], skip_special_tokens=True) == TARGET
    assert processor.batch_decode(both["labels"], skip_special_tokens=True) == [TARGET, "我"]
    padded = processor.pad({"input_ids": [[7, 2], [2]]}, return_tensors="pt")
    assert padded["input_ids"].tolist() == [[7, 2], [2, 1]]
    ids = (processor.bos_token_id, processor.pad_token_id, processor.eos_token_id, processor.unk_token_id)
    assert ids == (0, 1, 2, 3)
    assert processor.model_input_names == ["input_ids", "attention_mask"]
    with pytest.raises(ValueError, match="the processor needs text, text_target or both"):
        processor()


def test_special_ids_must_agree(processor):
    other = train_tokenizer([TARGET], "word", 60)
    other.pad_token = "</s>"
    with pytest.raises(ValueError, match="pad_token_id is 1 in the source tokenizer and 2 in the target tokenizer"):
        DragomanProcessor(processor.tokenizer, other)


def assert_same(loaded, processor):
    assert type(loaded).__name__ == "DragomanProcessor"
    assert dict(loaded(SOURCE, text_target=TARGET)) == dict(processor(SOURCE, text_target=TARGET))
    assert loaded.decode(loaded(text_target=TARGET)["input_ids"], skip_special_tokens=True) == TARGET
    assert len(loaded.tokenizer) == len(processor.tokenizer)
    assert len(loaded.target_tokenizer) == len(processor.target_tokenizer)


def test_save_and_load(processor, model, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "target_tokenizer" / "tokenizer.json").is_file()
    assert_same(AutoProcessor.from_pretrained(tmp_path), processor)
    assert_same(load_tokenizer(tmp_path), processor)
    model.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, DragomanProcessor), "the local class, no trust in the code of the folder needed"
    assert_same(loaded, processor)
    source = AutoTokenizer.from_pretrained(tmp_path)
    assert source(SOURCE).input_ids == processor.tokenizer(SOURCE).input_ids


def test_trainer_checkpoints_hold_the_processor(processor, model, tmp_path):
    rows = [processor(SOURCE, text_target=TARGET)] * 3
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            tmp_path, max_steps=1, report_to="none", predict_with_generate=True, generation_max_length=7, use_cpu=True
        ),
        train_dataset=[{name: row[name] for name in ("input_ids", "labels")} for row in rows],
        eval_dataset=[{name: row[name] for name in ("input_ids", "labels")} for row in rows],
        data_collator=Seq2SeqCollator(processor, model),
        processing_class=processor,
        compute_metrics=lambda outputs: {"rows": len(processor.batch_decode(abs(outputs.label_ids)))},
    )
    trainer.train()
    assert_same(load_tokenizer(tmp_path / "checkpoint-1"), processor)
    assert trainer.evaluate()["eval_rows"] == 3


LOAD_WITHOUT_THE_PACKAGE = """
import json, sys
from transformers import AutoProcessor
try:
    AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("loaded foreign code without being allowed to")
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "dragoman" not in sys.modules
encoded = processor("I love you", text_target="我 爱 你")
print(json.dumps([dict(encoded), processor.decode(encoded["labels"], skip_special_tokens=True)]))
"""


def test_loads_where_the_package_is_not_imported(processor, tmp_path):
    folder, cache = tmp_path / "saved", tmp_path / "modules"
    cache.mkdir()
    processor.save_pretrained(folder)
    assert (folder / "processing_dragoman.py").is_file()
    environment = os.environ | {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, str(folder)]
    loaded = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, cwd=cache)
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout) == [dict(processor(SOURCE, text_target=TARGET)), TARGET]
