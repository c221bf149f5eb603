"""What training needs in memory, estimated before it starts: weights, gradients, optimizer, and the largest batch."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from dragoman.models.loss import rows_at_a_time


# Numbers kept for each trained parameter beside its gradient; every optimizer not named here is taken for an Adam.
OPTIMIZER_STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}


@dataclass
class MemoryEstimate:
    """Bytes that one process needs at the peak of an optimizer step.

    Attributes:
        weights: parameters and buffers.
        gradients, optimizer: of the parameters that are trained.
        average: of these parameters over the steps, if there is one.
        activations: what the forward pass of the batch keeps for the backward pass, and the logits held at a time.
        batch: rows, source length and target length of that batch.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    batch: tuple[int, int, int]

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations

    def __str__(self) -> str:
        rows, source, target = self.batch
        parts = [
            f"{name} {_size(number)}"
            for name, number in (
                ("weights", self.weights),
                ("gradients", self.gradients),
                ("optimizer", self.optimizer),
                ("average", self.average),
                (f"a batch of {rows} x {source} source and {target} target tokens", self.activations),
            )
            if number or name != "average"
        ]
        return f"about {_size(self.total)} at most: {', '.join(parts)}"


def estimate_memory(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    rows: int,
    source_length: int,
    target_length: int,
    averaging: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of training on batches of this size, the longest that can come.

    Under tensor parallelism every process has to call it.

    The activations are measured: forward passes of one and two rows in training mode, as long as the batch, count the
    bytes that autograd keeps, and each further row adds the difference. Added are two times the logits that the loss
    holds at a time, in single precision. Not counted: the Python process and its libraries (0.5 to 1 GB), what the
    allocator leaves between blocks, and evaluation.

    Args:
        model: on the device where it will be trained; its state and the random numbers stay as they are.
        arguments: their optimizer, mixed precision and gradient checkpointing count.
        rows, source_length, target_length: of the batch, in sequences and tokens.
        averaging: whether an average of the trained parameters is kept.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training, checkpointing = model.training, model.is_activation_checkpointing
    model.train()
    if arguments.activation_checkpointing:
        kwargs = dict(cast(dict[str, Any], arguments.activation_checkpointing_kwargs or {}))
        model.activation_checkpointing_enable(
            every_n_layers=kwargs.pop("every_n_layers", 1),  # as the Trainer calls it
            offload=kwargs.pop("offload", False),
            activation_checkpointing_kwargs=kwargs or None,
        )
    one, two = (_kept_bytes(model, arguments, few, source_length, target_length) for few in (1, 2))
    model.train(was_training)
    if arguments.activation_checkpointing and not checkpointing:
        model.activation_checkpointing_disable()
    vocab_size = model.config.vocab_size
    logits = min(rows * target_length, rows_at_a_time(vocab_size)) * vocab_size
    gradients = sum(_held(parameter).nbytes for parameter in trained)
    return MemoryEstimate(
        weights=sum(_held(tensor).nbytes for tensor in (*model.parameters(), *model.buffers())),
        gradients=gradients,
        optimizer=gradients * _states(arguments),
        average=gradients if averaging else 0,
        activations=one + (rows - 1) * (two - one) + 2 * 4 * logits,
        batch=(rows, source_length, target_length),
    )


def _kept_bytes(model: PreTrainedModel, arguments: Any, rows: int, source_length: int, target_length: int) -> int:
    """What autograd keeps of a forward pass as the Trainer calls it, beside the model's own tensors."""
    device = model.device
    own = {_held(tensor).data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = _held(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Of no meaning, but no padding either: a fresh model takes as much memory for one token as for another.
    token = int(model.config.pad_token_id == 0)
    source = torch.full((rows, source_length), token, device=device)
    labels = torch.full((rows, target_length), token, device=device)
    precision = torch.bfloat16 if arguments.bf16 else torch.float16
    autocast = torch.autocast(device.type, precision, enabled=arguments.bf16 or arguments.fp16)
    cuda_devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda_devices), autocast, torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        outputs = model(
            input_ids=source,
            attention_mask=torch.ones_like(source),
            labels=labels,
            num_items_in_batch=torch.tensor(labels.numel(), device=device),
        )
    del outputs  # not before: storages that are freed would be counted again
    return sum(kept.values())


@torch.no_grad()
def _held(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor, all of it but under tensor parallelism."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _states(arguments: Any) -> int:
    name = str(arguments.optim).rpartition(".")[2].lower()  # of the enumeration or as a text
    return next((states for prefix, states in OPTIMIZER_STATES.items() if name.startswith(prefix)), 2)


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
