"""Values that the Trainer would take, and stumble over only when the data are encoded and the model is built."""

import dataclasses
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import Seq2SeqTrainer, get_scheduler
from transformers.integrations import INTEGRATION_TO_CALLBACK

from dragoman.models.varlen import check_kernel, check_settings
from dragoman.settings import did_you_mean, one_line


_AT_LEAST_1 = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "max_tokens_per_batch",
    "gradient_accumulation_steps",
    "tensor_parallel_size",
    "eval_accumulation_steps",
    "save_total_limit",
    "early_stopping_patience",
    "generation_num_beams",
    "generation_max_length",
    "ddp_timeout",
)
_AT_LEAST_0 = (
    "learning_rate",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "warmup_steps",
    "eval_delay",
    "seed",
    "data_seed",
    "dataloader_num_workers",
    "samples",
)
_ABOVE_0 = ("logging_steps", "eval_steps", "save_steps")


def check_ranges(arguments: Any) -> None:
    """Look at each value by itself.

    Raises:
        ValueError: a number that is out of its range, the name of a choice that there is not.
    """
    for names, allowed, is_allowed in (
        (_AT_LEAST_1, "at least 1", lambda value: value >= 1),
        (_AT_LEAST_0, "at least 0", lambda value: value >= 0),
        (_ABOVE_0, "greater than 0", lambda value: value > 0),
        (("adam_beta1", "adam_beta2"), "at least 0 and less than 1", lambda value: 0 <= value < 1),
    ):
        for name in names:
            value = getattr(arguments, name)
            if value is not None and not is_allowed(value):
                raise ValueError(f"{name} is {value}; it must be {allowed}")
    fields = dataclasses.fields(arguments)
    choices = {field.name: list(field.metadata["choices"]) for field in fields if "choices" in field.metadata}
    choices["include_num_input_tokens_seen"] = ["all", "non_padding", "no"]
    choices["torch_compile_backend"] = [backend.value.lower() for backend in DynamoBackend]
    for name, valid in choices.items():
        value = getattr(arguments, name)
        if not (value is None or isinstance(value, bool) or value in valid):
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(valid)}")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(arguments, name) and arguments.dataloader_num_workers == 0:
            raise ValueError(f"{name} needs dataloader_num_workers of at least 1")


def check_libraries(arguments: Any) -> None:
    """Make what other libraries have to make of these arguments, for a model of one weight.

    Raises:
        ValueError: a tracker, an optimizer or a schedule that there is not, or that lacks something.
    """
    for name in arguments.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(str(name), ["all", "none", *INTEGRATION_TO_CALLBACK])
            raise ValueError(f"report_to has {name!r}, which is unknown; {hint}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"report_to has {name!r}: {one_line(error)}") from error
    weight: Any = torch.nn.Linear(1, 1, bias=False)
    if arguments.optim_target_modules is None:  # else it looks for layers of these names
        try:
            Seq2SeqTrainer.get_optimizer_cls_and_kwargs(arguments, weight)
        except (ImportError, ValueError) as error:
            given = f" with optim_args {arguments.optim_args!r}" if arguments.optim_args else ""
            raise ValueError(f"optim {arguments.optim.value}{given}: {one_line(error)}") from error
    schedule = arguments.lr_scheduler_type
    try:
        get_scheduler(
            schedule,
            optimizer=torch.optim.SGD(weight.parameters(), lr=arguments.learning_rate),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type {schedule.value} with lr_scheduler_kwargs {arguments.lr_scheduler_kwargs}: "
            f"{one_line(error)}"
        ) from error


def check_attention(arguments: Any, config: Any) -> None:
    """Ask the kernels of `attn_implementation` whether they can train such a model on this device.

    Raises:
        ValueError: they cannot.
    """
    name, device = arguments.attn_implementation, arguments.device.type
    if name == "flex_attention" and device in ("cpu", "mps"):
        raise ValueError(f"training.attn_implementation '{name}' has no gradients on {device}: use 'sdpa' or 'eager'")
    if name == "flex_attention" and config.attention_dropout > 0:
        raise ValueError(
            f"training.attn_implementation '{name}' cannot do attention_dropout={config.attention_dropout}: use 'sdpa' "
            "or 'eager'"
        )
    if name == "varlen":
        dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
        try:
            check_settings(config, training=True)
            for head_dim in (config.encoder_head_dim, config.decoder_head_dim):
                check_kernel(device, dtype, head_dim)
        except ValueError as error:
            raise ValueError(f"training.{error}") from error
