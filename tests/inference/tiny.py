"""A model that learned ten sentence pairs by heart, within seconds: it ends its outputs, and they differ in length."""

import copy
import functools

import torch

from dragoman import DragomanConfig, DragomanForConditionalGeneration
from dragoman.data.collators import Seq2SeqCollator
from dragoman.data.tokenizers import train_tokenizer
from dragoman.models.processing_dragoman import DragomanProcessor


PAIRS = [
    ("the cat sleeps", "il gatto dorme"),
    ("the dog", "il cane"),
    ("why not", "perché no"),
    ("yes", "sì"),
    ("a red house near the sea", "una casa rossa vicino al mare"),
    ("good morning to all of you", "buongiorno a tutti voi"),
    ("the moon", "la luna"),
    ("two small birds sing", "due piccoli uccelli cantano"),
    ("no", "no"),
    ("where is the station", "dov'è la stazione"),
]
SOURCES = [source for source, _ in PAIRS]
TARGETS = [target for _, target in PAIRS]


def learned_by_heart(two_vocabularies: bool = False, kind: str = "word", **options):
    """-> (model in evaluation mode, tokenizer of that kind, or processor of characters and words), both the caller's"""
    found = copy.deepcopy(_trained(two_vocabularies, kind, **options))
    torch.manual_seed(0)  # whether it was trained now or before
    return found


@functools.cache
def _trained(two_vocabularies: bool, kind: str, **options):
    torch.manual_seed(0)
    if two_vocabularies:
        processing_class = DragomanProcessor(train_tokenizer(SOURCES, "char"), train_tokenizer(TARGETS, "word"))
        sizes = {
            "vocab_size": len(processing_class.target_tokenizer),
            "source_vocab_size": len(processing_class.tokenizer),
            "share_embeddings": False,
        }
    else:
        processing_class = train_tokenizer(SOURCES + TARGETS, kind)
        sizes = {"vocab_size": len(processing_class)}
    config = DragomanConfig(
        **sizes,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=40,
        dropout=0.0,
        **options,
    )
    model = DragomanForConditionalGeneration(config)
    rows = [
        {
            "input_ids": processing_class(text=source)["input_ids"],
            "labels": processing_class(text_target=target)["input_ids"],
        }
        for source, target in PAIRS
    ]
    batch = Seq2SeqCollator(processing_class, model)(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.max_length = 16
    return model.eval(), processing_class
