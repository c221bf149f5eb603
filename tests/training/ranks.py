"""What each process does for test_two_processes.py: trains in several ways and writes what came out.

python -m torch.distributed.run --nproc-per-node 2 ranks.py FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, Seq2SeqTrainingArguments
from transformers.distributed import DistributedConfig

import dragoman  # noqa: F401 (registers the models)
from dragoman.data.tokenizers import load_tokenizer
from dragoman.training.trainer import DurableTrainer


PAIRS, STEPS, RATE = 4, 10, 0.1  # pairs of an update, of all processes


def rows(count: int, first: int = 0) -> list[dict[str, list[int]]]:
    """Pairs of unlike lengths."""
    return [
        {
            "input_ids": [3 + (number * step) % 8 for step in range(1, 3 + number % 5)] + [2],
            "labels": [3 + (number + step) % 8 for step in range(1, 2 + number % 4)] + [2],
        }
        for number in range(first, first + count)
    ]


def read_model(folder: Path, name: str = "model", **config):
    return AutoModelForSeq2SeqLM.from_pretrained(folder / name, dtype=torch.float64, **config)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def save(model, path: Path, losses: list[float]) -> None:
    """The whole weights; every process has to call it."""
    weights = {name: whole(weight) for name, weight in model.named_parameters()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file(weights, path, metadata={"losses": json.dumps(losses)})


def with_the_trainer(folder: Path, processes: int) -> DurableTrainer:
    """SGD steps, then an evaluation that generates, of a set that cannot be shared out evenly."""
    tokenizer = load_tokenizer(folder / "model")
    model = read_model(folder)

    def compute_metrics(prediction):
        real = (prediction.predictions != -100) & (prediction.predictions != 1)
        return {"rows": len(prediction.predictions), "tokens": int(np.asarray(real).sum())}

    trainer = DurableTrainer(
        model=model, complete_checkpoint=lambda checkpoint, state: None,
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder / "trainer"), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_steps=STEPS, logging_steps=1,
            per_device_train_batch_size=PAIRS // processes, per_device_eval_batch_size=2, weight_decay=0.0,
            train_sampling_strategy="sequential", predict_with_generate=True,
        ),
        train_dataset=rows(PAIRS * STEPS), eval_dataset=rows(7, first=50), processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model), compute_metrics=compute_metrics,
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (processes > 1)
    scores = trainer.evaluate()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    save(trainer.model, folder / f"trainer-{processes}.safetensors", losses)
    if trainer.is_world_process_zero():
        figures = {name: scores[f"eval_{name}"] for name in ("rows", "tokens")}
        (folder / f"scores-{processes}.json").write_text(json.dumps(figures))
    return trainer


def by_hand(model, folder: Path, name: str, rank: int, shares: int) -> None:
    """SGD steps as the Trainer makes them, with the loss in chunks, on this process's share of each batch."""
    collator = DataCollatorForSeq2Seq(load_tokenizer(folder / "model"), model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    model.train()
    for step in range(STEPS):
        batch = rows(PAIRS, first=PAIRS * step)
        count = sum(len(row["labels"]) for row in batch)
        outputs = model(**collator(batch[rank::shares]), num_items_in_batch=count)
        assert outputs.logits is None
        (outputs.loss * shares).backward()  # the gradients of the shares are averaged
        optimizer.step()
        optimizer.zero_grad()
        total = whole(outputs.loss)
        if shares > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    save(model, folder / f"{name}.safetensors", losses)


def main(folder: Path) -> None:
    with_the_trainer(folder, 2)
    rank = dist.get_rank()
    sharded = read_model(folder, "untied", distributed_config=DistributedConfig(fsdp_size=2))
    assert isinstance(sharded, FSDPModule)
    assert all(isinstance(weight, DTensor) for weight in sharded.parameters())
    assert isinstance(sharded.model.decoder.layers[0], FSDPModule)
    by_hand(sharded, folder, "fsdp", rank, 2)
    dcp.save(get_model_state_dict(sharded), checkpoint_id=folder / "sharded")
    parallel = read_model(folder, distributed_config=DistributedConfig(tp_size=2))
    layer = parallel.model.decoder.layers[0]
    assert isinstance(layer.cross_attn.q_proj.weight, DTensor)
    assert layer.cross_attn.q_proj.weight.to_local().shape[0] == layer.cross_attn.q_proj.weight.shape[0] // 2
    by_hand(parallel, folder, "tp", 0, 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
