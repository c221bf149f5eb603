"""Fused training of the recurrent family against bare torch.nn modules with the same head and loss.

    python scripts/benchmark_rnn.py
    python scripts/benchmark_rnn.py --hidden-size 256 --batch-size 64 --repeats 15

Both sides hold the same weights and run forward, loss and backward on the same padded batches in one process, taking
turns; the ratio is that of a pair of neighbors, and its median and quartiles are printed.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Annotated

import torch
import typer
from measuring import spread, take_turns
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dragoman import DragomanRnnConfig, DragomanRnnForConditionalGeneration


CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Bare(nn.Module):
    """Embedding -> RNN -> (dot attention) -> linear, as a person writes it for one purpose."""

    def __init__(self, cell: str, attention: bool, vocab: int, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.source_embedding = nn.Embedding(vocab, hidden)
        self.encoder = CELLS[cell](hidden, hidden, layers, batch_first=True, dropout=dropout)
        self.target_embedding = nn.Embedding(vocab, hidden)
        self.decoder = CELLS[cell](hidden, hidden, layers, batch_first=True, dropout=dropout)
        self.combine = nn.Linear(2 * hidden, hidden, bias=False) if attention else None
        self.head = nn.Linear(hidden, vocab)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids, attention_mask, decoder_input_ids, labels):
        embedded = self.dropout(self.source_embedding(input_ids))
        packed = pack_padded_sequence(embedded, attention_mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, last = self.encoder(packed)
        outputs, _ = self.decoder(self.dropout(self.target_embedding(decoder_input_ids)), last)
        if self.combine is not None:
            memory, _ = pad_packed_sequence(states, batch_first=True, total_length=input_ids.shape[1])
            scores = outputs @ memory.transpose(1, 2)
            scores = scores.masked_fill(attention_mask[:, None] == 0, torch.finfo(scores.dtype).min)
            outputs = self.combine(torch.cat((scores.softmax(-1) @ memory, outputs), dim=-1)).tanh()
        logits = self.head(self.dropout(outputs))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def padded_batch(vocab: int, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Sources and targets of length / 2 to length tokens, in any order."""
    input_ids, labels = torch.randint(3, vocab, (2, rows, length))
    source_lengths, target_lengths = torch.randint(length // 2, length + 1, (2, rows, 1))
    attention_mask = (torch.arange(length) < source_lengths).long()
    attention_mask[0] = 1
    labels = labels.masked_fill(torch.arange(length) >= target_lengths, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def main(
    vocab_size: Annotated[int, typer.Option(help="Of both sides.")] = 8000,
    hidden_size: Annotated[int, typer.Option(help="Also of the embeddings.")] = 512,
    layers: Annotated[int, typer.Option(help="Of both sides.")] = 2,
    batch_size: Annotated[int, typer.Option(help="Sentence pairs.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of the longest sentence.")] = 24,
    repeats: Annotated[int, typer.Option(help="Measured pairs of steps, after one that is not.")] = 11,
    dropout: float = 0.1,
    device: str = "cpu",
) -> None:
    torch.manual_seed(0)
    typer.echo(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; forward + loss + backward, "
        f"batch {batch_size} x {length}, hidden {hidden_size}, {layers} + {layers} layers, vocabulary {vocab_size}"
    )
    typer.echo(f"{'cell':5} {'attention':9} {'bare ms':>8} {'ours ms':>8}   ratio (quartiles)")
    for cell in CELLS:
        for attention in ("none", "dot"):
            bare = Bare(cell, attention == "dot", vocab_size, hidden_size, layers, dropout).to(device)
            ours = DragomanRnnForConditionalGeneration(
                DragomanRnnConfig(
                    vocab_size=vocab_size, source_vocab_size=vocab_size, embedding_dim=hidden_size,
                    hidden_size=hidden_size, encoder_layers=layers, decoder_layers=layers, cell=cell,
                    attention=attention, bidirectional_encoder=False, share_embeddings=False, tie_lm_head=False,
                    lm_head_bias=True, dropout=dropout,
                )
            ).to(device)  # fmt: skip
            with torch.no_grad():
                for parameter, other in zip(bare.parameters(), ours.parameters(), strict=True):
                    parameter.copy_(other)
            batch = {name: value.to(device) for name, value in padded_batch(vocab_size, batch_size, length).items()}
            inputs = ours.prepare_decoder_input_ids_from_labels(batch["labels"])
            sides = (bare, ours)
            losses = [side.eval()(**batch, decoder_input_ids=inputs) for side in sides]
            torch.testing.assert_close(losses[0], losses[1].loss)  # they compute the same thing

            def step(side: nn.Module, batch: dict = batch, inputs: torch.Tensor = inputs) -> None:
                side.train().zero_grad()
                result = side(**batch, decoder_input_ids=inputs)
                (result if torch.is_tensor(result) else result.loss).backward()
                if device != "cpu":
                    torch.accelerator.synchronize()

            times, _ = take_turns([partial(step, side) for side in sides], repeats)
            bare_ms, ours_ms = (1000 * statistics.median(side) for side in times)
            typer.echo(f"{cell:5} {attention:9} {bare_ms:8.1f} {ours_ms:8.1f}  {spread(times[1], times[0])}")


if __name__ == "__main__":
    typer.run(main)
