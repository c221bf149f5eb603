"""Which checkpoints can be converted, and which relatives of theirs cannot, with the reason."""

from typing import Any

from dragoman.conversion.bart import BART, BLENDERBOT, M2M100, MARIAN, MBART, PEGASUS
from dragoman.conversion.family import Family
from dragoman.conversion.t5 import MT5, T5


# By `model_type`. NLLB is an m2m_100, mBART-50 an mbart, T5 v1.1 and FLAN-T5 are t5.
FAMILIES: dict[str, Family] = {
    "marian": MARIAN,
    "bart": BART,
    "mbart": MBART,
    "pegasus": PEGASUS,
    "blenderbot": BLENDERBOT,
    "m2m_100": M2M100,
    "t5": T5,
    "mt5": MT5,
}

REFUSED = {
    "blenderbot-small": "its decoder normalizes the embeddings before it adds the positions, its encoder after",
    "umt5": "every layer has relative biases of its own",
    "longt5": "its encoder attends to neighborhoods and to summaries of blocks",
    "switch_transformers": "its layers are mixtures of experts",
    "nllb-moe": "its layers are mixtures of experts",
    "t5gemma": "it normalizes before and after each sublayer, caps its scores and slides windows over its sequences",
    "t5gemma2": "its decoder attends to source and target at once",
    "led": "its encoder attends through windows and global tokens",
    "pegasus_x": "its encoder attends through blocks and global tokens",
    "bigbird_pegasus": "its encoder attends to random blocks",
    "prophetnet": "it predicts several tokens at once",
}


def family_of(config: dict[str, Any], where: str) -> Family:
    """
    The converter of a checkpoint.

    Args:
        config: content of its `config.json`; where: what to call it in an error.

    Raises:
        ValueError: there is none, or the checkpoint brings code of its own, or its weights are quantized.
    """
    kind = config.get("model_type")
    if kind in ("dragoman", "dragoman_rnn"):
        raise ValueError(f"{where} is a Dragoman checkpoint already.")
    if config.get("auto_map"):
        raise ValueError(
            f"{where} brings modeling code of its own (auto_map in config.json), which is never run here: only "
            "checkpoints of Transformers' own classes can be converted."
        )
    if config.get("quantization_config"):
        raise ValueError(f"{where} holds quantized weights: convert the original, and quantize the result.")
    if kind in REFUSED:
        raise ValueError(f"{where} is of type {kind!r}, which Dragoman cannot express: {REFUSED[kind]}.")
    if kind not in FAMILIES:
        raise ValueError(f"{where} is of type {kind!r}; converters exist for {', '.join(FAMILIES)}.")
    return FAMILIES[kind]
