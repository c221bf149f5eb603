"""Models that learned within seconds to copy letters: their cross-attention has to be the diagonal."""

import string

import torch

import dragoman
from dragoman.data.tokenizers import train_tokenizer


SIZES = {
    "transformer": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "position_embedding_type": "sinusoidal",
        "dropout": 0.0,
    },
    "lstm": {
        "embedding_dim": 24,  # a narrow state cannot hold a sentence, so it has to look
        "hidden_size": 24,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "attention": "additive",
        "bidirectional_encoder": False,
        "dropout": 0.0,
    },
}

STEPS = {"transformer": 300, "lstm": 450}
LEARNING_RATES = {"transformer": 5e-3, "lstm": 1.5e-2}


def copying_model(name: str):
    """-> (model in evaluation mode, tokenizer of words): "a b c" gives "a b c"."""
    tokenizer = train_tokenizer([" ".join(string.ascii_lowercase)], "word")
    config_class, model_class = {
        "transformer": (dragoman.DragomanConfig, dragoman.DragomanForConditionalGeneration),
        "lstm": (dragoman.DragomanRnnConfig, dragoman.DragomanRnnForConditionalGeneration),
    }[name]
    torch.manual_seed(0)
    model = model_class(config_class(vocab_size=len(tokenizer), **SIZES[name]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATES[name])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS[name])
    for _ in range(STEPS[name]):
        length = int(torch.randint(3, 10, ()))
        letters = torch.randint(4, len(tokenizer), (48, length))
        ids = torch.cat([letters, torch.full((48, 1), tokenizer.eos_token_id)], dim=1)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.generation_config.max_length = 14
    return model.eval(), tokenizer
