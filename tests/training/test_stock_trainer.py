"""Plain `Seq2SeqTrainer` and `DataCollatorForSeq2Seq`, as a script that knows only Transformers uses them."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from conftest import PAD, make_batch
from dragoman.data.tokenizers import train_tokenizer


@pytest.fixture
def pairs():
    """Eight pairs of ids, without padding, of different lengths."""
    batch = make_batch(rows=8)
    return Dataset.from_list(
        [
            {"input_ids": source[mask.bool()].tolist(), "labels": labels[labels != -100].tolist()}
            for source, mask, labels in zip(*batch.values(), strict=True)
        ]
    )


@pytest.fixture
def tokenizer():
    return train_tokenizer(["a b c"], kind="word")  # only its padding is used


def stock_trainer(model, pairs, tokenizer, folder, **arguments):
    settings = {
        "per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1.0, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False, **arguments,
    }  # fmt: skip
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(output_dir=str(folder), **settings),
        train_dataset=pairs,
        eval_dataset=pairs,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=lambda prediction: {"shape": len(np.asarray(prediction.predictions))},
    )


def test_accumulation_changes_nothing(any_family, pairs, tokenizer, tmp_path):
    """One batch of 8 and four of 2 make the same optimizer step."""
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = any_family.build()
        trainer = stock_trainer(
            model, pairs, tokenizer, tmp_path,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        log = trainer.state.log_history[0]
        found.append((float(log["loss"]), float(log["grad_norm"]), model.state_dict()))
    (loss, norm, weights), (other_loss, other_norm, other_weights) = found
    assert other_loss == pytest.approx(loss, rel=1e-4)  # the log rounds
    assert other_norm == pytest.approx(norm, rel=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=1e-9, atol=1e-10)


def test_decoding_is_the_same_after_an_evaluation(any_family, pairs, tokenizer, tmp_path):
    """The trainer writes defaults such as top_k=50 into the model's generation config; contrastive search stays."""
    model = any_family.build(dtype=torch.float32)
    batch = make_batch()
    source = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    strategies = [{}, {"num_beams": 3}, {"penalty_alpha": 0.6}, {"penalty_alpha": 0.6, "top_k": 4}]
    before = [model.generate(**source, **strategy, max_length=11) for strategy in strategies]
    trainer = stock_trainer(model, pairs, tokenizer, tmp_path, predict_with_generate=True, generation_max_length=9)
    metrics = trainer.evaluate()
    assert metrics["eval_shape"] == 8
    assert metrics["eval_loss"] > 0
    after = [model.generate(**source, **strategy, max_length=11) for strategy in strategies]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_predictions_are_padded_like_labels(any_family, pairs, tokenizer, tmp_path):
    model = any_family.build(dtype=torch.float32)
    trainer = stock_trainer(model, pairs, tokenizer, tmp_path, predict_with_generate=True, generation_max_length=9)
    prediction = trainer.predict(pairs)
    assert prediction.predictions.shape[0] == 8
    assert set(prediction.predictions[:, 9:].flatten().tolist()) <= {-100, PAD}  # the trainer pads to the model's own
    assert prediction.label_ids.shape[0] == 8
    assert set(prediction.predictions.flatten().tolist()) <= {-100, PAD, *range(model.config.vocab_size)}
