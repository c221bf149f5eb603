"""
What each process does for test_two_processes.py: trains in several ways and writes what came out.

    python -m torch.distributed.run --nproc-per-node 2 ranks.py FOLDER
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq
from transformers.distributed import DistributedConfig

from dragoman import preset
from dragoman.data.tokenizers import load_tokenizer, train_tokenizer
from dragoman.training import run
from dragoman.training.arguments import Experiment, TrainingArguments, load_experiment
from dragoman.training.run import train
from dragoman.training.trainer import DurableTrainer
from training.experiments import WORDS, shorten_trainings, write_experiment


PAIRS, STEPS, RATE, MOMENTUM = 4, 10, 0.1, 0.7  # pairs of an update, of all processes
OPTIMIZERS = {"sgd": RATE, "adamw_torch": 0.01}  # of the stock trainer, with their learning rates
SAVED = 4  # the step after which a sharded checkpoint is written
STOPPED = 4  # the step in which a process is told to stop; an epoch has three
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
SIZES = {"d_model": 12, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 18, "decoder_ffn_dim": 20}
SIZES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
MODELS = {
    "tied": {"name": "modern", **SIZES, "share_embeddings": True, "tie_lm_head": True},
    "tied_head": {"name": "modern", **SIZES, "share_embeddings": False, "tie_lm_head": True},
    "untied": {"name": "modern", **SIZES, "share_embeddings": False, "tie_lm_head": False},
    "recurrent": {"name": "lstm_bahdanau", "embedding_dim": 12, "hidden_size": 12, "share_embeddings": True}
    | {"tie_lm_head": True},
}


def write_models(folder: Path) -> None:
    tokenizer = train_tokenizer(WORDS, "word")
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, keys in MODELS.items():
        torch.manual_seed(3)
        model = AutoModelForSeq2SeqLM.from_config(preset(**keys, **IDS, dropout=0.0, vocab_size=len(tokenizer)))
        model.generation_config.max_length = 9
        model.save_pretrained(folder / name)


def read_model(folder: Path, name: str, **config):
    return AutoModelForSeq2SeqLM.from_pretrained(folder / name, dtype=torch.float64, **config)


def rows(count: int, first: int = 0) -> list[dict[str, list[int]]]:
    """Pairs of unlike lengths."""
    return [
        {
            "input_ids": [3 + (number * step) % 8 for step in range(1, 3 + number % 5)] + [2],
            "labels": [3 + (number + step) % 8 for step in range(1, 2 + number % 4)] + [2],
        }
        for number in range(first, first + count)
    ]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def save(model, path: Path, losses: list[float]) -> None:
    """The whole weights; every process has to call it."""
    weights = {name: whole(weight) for name, weight in model.named_parameters()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file(weights, path, metadata={"losses": json.dumps(losses)})


def with_the_trainer(folder: Path, processes: int, optimizer: str) -> DurableTrainer:
    """
    Steps, then an evaluation that generates, of a set that cannot be shared out evenly: SGD in float64, AdamW as people
    use it.
    """
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = read_model(folder, "tied")
    if optimizer != "sgd":
        model.float()

    def compute_metrics(prediction):
        real = (prediction.predictions != -100) & (prediction.predictions != 1)
        return {"rows": len(prediction.predictions), "tokens": int(np.asarray(real).sum())}

    trainer = DurableTrainer(
        model=model, complete_checkpoint=lambda checkpoint, state: None,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"), use_cpu=True, disable_tqdm=True, save_strategy="no",
            eval_strategy="no", load_best_model_at_end=False, metric_for_best_model=None,
            optim=optimizer, learning_rate=OPTIMIZERS[optimizer], lr_scheduler_type="constant", max_steps=STEPS,
            logging_steps=1,
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
    save(trainer.model, folder / f"trainer-{optimizer}-{processes}.safetensors", losses)
    if trainer.is_world_process_zero():
        figures = {name: scores[f"eval_{name}"] for name in ("rows", "tokens")}
        (folder / f"scores-{optimizer}-{processes}.json").write_text(json.dumps(figures))
    return trainer


def by_hand(
    model, folder: Path, name: str, rank: int, shares: int, checkpoint: Path | None = None, resume: bool = False
) -> None:
    """
    SGD steps as the Trainer makes them, with the loss in chunks, on this process's share of each batch. With a
    `checkpoint` that is written on the way, or is where the steps go on from.
    """
    collator = DataCollatorForSeq2Seq(load_tokenizer(folder / "tokenizer"), model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    if resume:
        load_sharded(model, optimizer, checkpoint)
    losses = []
    model.train()
    for step in range(SAVED if resume else 0, STEPS):
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
        if checkpoint is not None and not resume and step + 1 == SAVED:
            dcp.save(
                dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)),
                checkpoint_id=checkpoint,
            )
    save(model, folder / f"{name}.safetensors", losses)


def load_sharded(model, optimizer, checkpoint: Path) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def sharded(folder: Path, name: str):
    """Under FSDP2, which is asserted: Accelerate would fall back in silence."""
    model = read_model(folder, name, distributed_config=DistributedConfig(fsdp_size=2))
    assert isinstance(model, FSDPModule)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    assert isinstance(model.model.encoder.rnn if name == "recurrent" else model.model.decoder.layers[0], FSDPModule)
    return model


def prepare(folder: Path) -> None:
    """What one process has to write before several read it."""
    write_models(folder)
    changes = {"max_steps": STOPPED + 1, "logging_steps": 1, "eval_strategy": "epoch", "save_strategy": "epoch"}
    for name in ("ddp", "fsdp"):
        (folder / name).mkdir()
        write_experiment(folder / name, training={**changes, "ema_decay": 0.8})
    sections = yaml.safe_load((folder / "fsdp" / "tiny.yaml").read_text())
    sections["model"]["layerdrop"] = 0.5
    (folder / "fsdp" / "dropping.yaml").write_text(yaml.safe_dump(sections))
    sections["model"] = {"preset": "lstm_bahdanau", "embedding_dim": 12, "hidden_size": 12}
    (folder / "fsdp" / "recurrent.yaml").write_text(yaml.safe_dump(sections))
    (folder / "tp").mkdir()
    even = {"encoder_ffn_dim": 18, "decoder_ffn_dim": 20}
    changes |= {"tensor_parallel_size": 2, "include_num_input_tokens_seen": "all"}
    path = write_experiment(folder / "tp", model=even, training=changes)
    sections = yaml.safe_load(path.read_text())
    sections["model"] = {"from_pretrained": str(folder / "tp" / "whole"), "dropout": 0.0}
    del sections["tokenizer"], sections["training"]["per_device_train_batch_size"]
    sections["training"] |= {"max_tokens_per_batch": 40, "packing": True, "output_dir": str(folder / "tp" / "again")}
    # The highest loss is not that of the last checkpoint, so that the run goes back to another at its end.
    sections["training"] |= {"metric_for_best_model": "loss", "greater_is_better": True, "eval_strategy": "steps"}
    sections["training"]["save_strategy"] = "steps"
    (folder / "tp" / "again.yaml").write_text(yaml.safe_dump(sections))
    (folder / "unigram").mkdir()
    write_experiment(folder / "unigram", training={"max_steps": 1}, tokenizer={"kind": "unigram", "vocab_size": 40})


def stopped_and_resumed(folder: Path, rank: int, is_wrapped: Callable[[Any], bool]) -> None:
    """Trains an experiment without a break, and again with a SIGTERM to one of the processes, and resumes that."""
    original = DurableTrainer.training_step
    stopping = False

    def step(self, model, *args, **kwargs):
        assert is_wrapped(model)
        if stopping and self.state.global_step == STOPPED - 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, *args, **kwargs)

    def load(name: str) -> Experiment:
        return load_experiment(folder / "tiny.yaml", [f"training.output_dir={folder / name}"])

    DurableTrainer.training_step = step
    train(load("whole"))
    stopping = True
    try:
        train(load("stopped"))
    except KeyboardInterrupt as stop:
        (folder / f"stopped-{rank}.txt").write_text(str(stop))
    stopping = False
    train(load("stopped"), resume=True)
    DurableTrainer.training_step = original


def stopped_while_evaluating(folder: Path, rank: int) -> None:
    """A SIGTERM to one of the processes before the checkpoint that follows an evaluation."""
    original = DurableTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    with mock.patch.object(DurableTrainer, "evaluate", evaluate):
        try:
            train(load_experiment(folder / "tiny.yaml", [f"training.output_dir={folder / 'evaluating'}"]))
        except KeyboardInterrupt as stop:
            (folder / f"evaluating-{rank}.txt").write_text(str(stop))


@contextmanager
def taken_for_gpus() -> Iterator[None]:
    """
    Accelerate shares models out among every kind of processes but those of the CPU; told that these are of another
    kind, it does here too.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    originals = PartialState._prepare_backend, PartialState.set_device
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    yield
    PartialState._prepare_backend, PartialState.set_device = originals
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def fsdp_of_accelerate() -> Iterator[None]:
    """What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` sets."""
    settings = yaml.safe_load((Path(__file__).parents[2] / "configs" / "accelerate" / "fsdp2.yaml").read_text())
    os.environ.update({name.upper(): str(value) for name, value in settings["fsdp_config"].items()})
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    with taken_for_gpus():
        yield
    del os.environ["ACCELERATE_USE_FSDP"]


def is_sharded(model) -> bool:
    """By FSDP2, layer by layer, the shared table with the rest."""
    layers = [*model.model.encoder.layers, *model.model.decoder.layers]
    parts = all(isinstance(part, FSDPModule) for part in (model, *layers))
    weights = all(isinstance(weight, DTensor) for weight in model.parameters())
    return parts and weights and model.lm_head.weight is model.model.encoder.embed_tokens.weight


def is_cut(model) -> bool:
    """By tensor parallelism: this process has some of every matrix, and of the table that is one at all its ends."""
    parts = [*model.model.encoder.layers, *model.model.decoder.layers, model.lm_head]
    matrices = [weight for part in parts for weight in part.parameters() if weight.ndim == 2]
    some = all(isinstance(one, DTensor) and one.to_local().numel() < one.numel() for one in matrices)
    return some and model.lm_head.weight is model.model.encoder.embed_tokens.weight


def with_tokenizers_of_their_own(folder: Path, rank: int) -> None:
    """Stands in for a Unigram, of which two processes may train different ones; writes what each goes on with."""
    original_tokenizer, original_model, found = run.build_tokenizer, run.build_model, {}

    def build_tokenizer(pairs, **settings):
        return original_tokenizer(pairs, **{**settings, "extra_special_tokens": [f">>{rank}<<"]})

    def build_model(experiment, tokenizer, *more):
        found["vocabulary"] = tokenizer.get_vocab()
        return original_model(experiment, tokenizer, *more)

    path = folder / "unigram" / "tiny.yaml"
    with mock.patch.multiple(run, build_tokenizer=build_tokenizer, build_model=build_model):
        try:
            train(load_experiment(path, ["tokenizer.kind=bpe", "tokenizer.vocab_size=7"]))
        except ValueError as error:
            found["refused"] = str(error)
        train(load_experiment(path))
    (folder / f"tokenizer-{rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    shorten_trainings()
    for optimizer in OPTIMIZERS:
        with_the_trainer(folder, 2, optimizer)
    stopped_and_resumed(folder / "ddp", dist.get_rank(), lambda model: isinstance(model, DistributedDataParallel))
    stopped_while_evaluating(folder / "ddp", dist.get_rank())
    for name in ("budget", "stream"):
        train(load_experiment(folder / f"{name}.yaml"))
    with_tokenizers_of_their_own(folder, dist.get_rank())
    with fsdp_of_accelerate():
        stopped_and_resumed(folder / "fsdp", dist.get_rank(), is_sharded)
        os.environ["FSDP_VERSION"] = "1"
        for name in ("tiny", "recurrent", "dropping"):
            AcceleratorState._reset_state()
            path = folder / "fsdp" / f"{name}.yaml"
            try:
                train(load_experiment(path, [f"training.output_dir={folder / 'refused'}"]))
            except ValueError as error:
                path.with_suffix(f".{dist.get_rank()}.txt").write_text(str(error))
    try:
        train(load_experiment(folder / "tp" / "tiny.yaml"))
    except ValueError as error:
        (folder / "tp" / f"cpu-{dist.get_rank()}.txt").write_text(str(error))
    with taken_for_gpus():
        stopped_and_resumed(folder / "tp", dist.get_rank(), is_cut)
        train(load_experiment(folder / "tp" / "again.yaml"))
    rank = dist.get_rank()
    for name in MODELS:
        model = sharded(folder, name)
        by_hand(model, folder, f"fsdp-{name}", rank, 2, folder / "sharded" if name == "tied" else None)
        tied_to = {"tied": "encoder", "recurrent": "encoder", "tied_head": "decoder"}
        if name in tied_to:
            table = model.model.get_submodule(tied_to[name]).embed_tokens
            assert model.lm_head.weight is table.weight
    model = sharded(folder, "tied")
    by_hand(model, folder, "fsdp-resumed", rank, 2, folder / "sharded", resume=True)
    model.save_pretrained(folder / "fsdp-saved")
    parallel = read_model(folder, "tied", distributed_config=DistributedConfig(tp_size=2))
    layer = parallel.model.decoder.layers[0]
    assert isinstance(layer.cross_attn.q_proj.weight, DTensor)
    assert layer.cross_attn.q_proj.weight.to_local().shape[0] == layer.cross_attn.q_proj.weight.shape[0] // 2
    by_hand(parallel, folder, "tp-tied", 0, 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
