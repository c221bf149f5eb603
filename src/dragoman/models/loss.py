"""Next-token loss, written once for both families."""

import torch
from torch import nn


# Shapes: B batch, T target length, V target vocabulary.


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
    if num_items_in_batch is None:
        return total / (labels != -100).sum().clamp(min=1)
    # A batch without a single label has a loss of 0, not of 0 / 0.
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
