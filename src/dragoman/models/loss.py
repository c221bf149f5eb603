"""Next-token loss, written once for both families: from logits, or from decoder states without keeping logits."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled

from .fast_linear import is_plain, linear


# Shapes: B batch, T target length, D width of the decoder states, V target vocabulary, N real targets of the batch.

# Logits held at a time: 16 MiB in single precision, which also suits caches. Rows, because narrow products are slow.
LOGITS_AT_A_TIME = 1 << 22
FEWEST_ROWS_AT_A_TIME = 256


def shift_tokens_right(labels: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """
    Decoder inputs for teacher forcing: the labels one step later, beginning with the start token.

    Args:
        labels: `(B, T)`, with -100 where nothing is to be predicted; those become `pad_token_id`.

    Raises:
        ValueError: one of the two ids is None.
    """
    for name, token in (("pad_token_id", pad_token_id), ("decoder_start_token_id", decoder_start_token_id)):
        if token is None:
            raise ValueError(f"labels cannot become decoder inputs, because the config has {name}=None: set it.")
    shifted = labels.new_full(labels.shape, decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == -100, pad_token_id)


def rotate_labels(labels: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """
    Decoder inputs for teacher forcing: the labels one step later, beginning with the last one of each row, which is a
    language code or `</s>` (mBART, Liu 2020).

    Args:
        labels: `(B, T)`, with -100 or `pad_token_id` after the end; they become `pad_token_id`.
    """
    labels = labels.masked_fill(labels == -100, pad_token_id)
    last = (labels != pad_token_id).sum(dim=1, keepdim=True) - 1
    return torch.cat((labels.gather(1, last.clamp(min=0)), labels[:, :-1]), dim=1)


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Cross-entropy of each target token given the earlier ones, in nats, summed over the labels that are not -100 and
    divided by `num_items_in_batch`, or by their number where that is not given.

    `num_items_in_batch` is the number of real target tokens of the whole optimizer step: with it, micro-batches and
    processes of any size add up to the gradient of the one large batch.

    Args:
        logits: `(B, T, V)`, aligned with the labels (the decoder inputs are shifted, the logits are not).
        labels: `(B, T)`.
        label_smoothing: weight of the uniform distribution in the target (Szegedy 2016, section 7).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    labels = labels.to(logits.device).flatten()
    total = nn.functional.cross_entropy(
        logits, labels, ignore_index=-100, reduction="sum", label_smoothing=label_smoothing
    )
    return _average(total, (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def next_token_loss_of_states(
    states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    vocab_size: int,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    `next_token_loss(lm_head(states), labels, ...)` without the logits of all positions in memory: they are made for the
    real targets only, a few rows at a time, and become gradients at once (the idea of Hsu 2024, Liger Kernel).

    Args:
        states: `(B, T, D)`, what the head takes.
        lm_head: a plain linear layer; any other module (an adapter, a sharded layer, one with hooks) is called chunk by
            chunk under a checkpoint, which bounds memory too and computes the logits twice; under DeepSpeed's ZeRO-3
            it is called once, for all targets.
        labels: `(B, T)`.
        vocab_size: V, by which the rows held at a time are counted.
    """
    labels = labels.to(states.device).flatten()
    real = (labels != -100).nonzero().squeeze(1)
    states, labels = states.flatten(0, 1)[real], labels[real]  # (N, D), (N,)
    if _is_plain_linear(lm_head):
        total = _LinearCrossEntropy.apply(states, lm_head.weight, lm_head.bias, labels, label_smoothing)
    else:

        def chunk_loss(some_states: torch.Tensor, some_labels: torch.Tensor) -> torch.Tensor:
            logits = lm_head(some_states)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return nn.functional.cross_entropy(logits, some_labels, reduction="sum", label_smoothing=label_smoothing)

        # ZeRO-3 gathers the head's weights for each call, and all processes wait for that: as many calls in each.
        rows = len(labels) if is_deepspeed_zero3_enabled() else rows_at_a_time(vocab_size)
        chunks = zip(states.split(rows), labels.split(rows), strict=True)
        total = sum((checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks), states.sum() * 0.0)
    return _average(total, len(labels) if num_items_in_batch is None else num_items_in_batch)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of `states @ weight.T + bias`; the gradients are made on the way forward."""

    @staticmethod
    def forward(ctx, states, weight, bias, labels, label_smoothing):
        """(N, D), (V, D), (V) or None, (N) -> a number"""
        device, vocab_size = states.device.type, weight.shape[0]
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else states.dtype
        precision = torch.promote_types(dtype, torch.float32)
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(device, enabled=False):
            inputs, matrix = states.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=precision, device=states.device)
            states_grad = torch.empty_like(inputs) if needs_states else None
            weight_grad = torch.zeros_like(weight, dtype=precision) if needs_weight else None
            bias_grad = torch.zeros_like(bias, dtype=precision) if needs_bias else None
            for begin in range(0, len(labels), rows_at_a_time(vocab_size)):
                chunk = slice(begin, begin + rows_at_a_time(vocab_size))
                gold = labels[chunk, None]
                logits = linear(inputs[chunk], matrix).to(precision)
                if bias is not None:
                    logits += bias
                target = (1 - label_smoothing) * logits.gather(1, gold)
                if label_smoothing:
                    target = target + label_smoothing * logits.mean(dim=-1, keepdim=True)
                largest = logits.amax(dim=-1, keepdim=True)
                probability = logits.sub_(largest).exp_()  # one exponential for the loss and for its gradient
                normalizer = probability.sum(dim=-1, keepdim=True)
                total += (normalizer.log() + largest - target).sum()
                if not (needs_states or needs_weight or needs_bias):
                    continue
                gradient = probability.div_(normalizer)
                if label_smoothing:
                    gradient.sub_(label_smoothing / vocab_size)
                gradient.scatter_add_(1, gold, gradient.new_full(gold.shape, label_smoothing - 1))
                if bias_grad is not None:
                    bias_grad += gradient.sum(dim=0)
                gradient = gradient.to(dtype)
                if states_grad is not None:
                    states_grad[chunk] = linear(gradient, matrix.t())
                if weight_grad is not None and dtype == precision:
                    weight_grad.addmm_(gradient.t(), inputs[chunk])
                elif weight_grad is not None:
                    weight_grad += gradient.t() @ inputs[chunk]
        ctx.save_for_backward(states_grad, weight_grad, bias_grad)
        ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, total_grad):
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if one is None else (one * total_grad).to(dtype) for one, dtype in gradients), None, None


def rows_at_a_time(vocab_size: int) -> int:
    """Positions whose logits are in memory together."""
    return max(LOGITS_AT_A_TIME // vocab_size, FEWEST_ROWS_AT_A_TIME)


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether its weight may be used without calling it: a hook or a `forward` of its own may do more."""
    return is_plain(module) and not (module._forward_hooks or module._forward_pre_hooks)


def _average(total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    # A batch without a single label has a loss of 0, not of 0 / 0.
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)
