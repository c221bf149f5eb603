"""
Dragoman: encoder-decoder models for Hugging Face Transformers.

Importing this package registers its models, so that `AutoModelForSeq2SeqLM` and the other Auto classes know them.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from .models.configuration_dragoman import DragomanConfig
from .models.modeling_dragoman import (
    DragomanEncoderModel,
    DragomanForConditionalGeneration,
    DragomanModel,
)


__version__ = "0.1.0"

__all__ = [
    "DragomanConfig",
    "DragomanEncoderModel",
    "DragomanForConditionalGeneration",
    "DragomanModel",
]

AutoConfig.register("dragoman", DragomanConfig, exist_ok=True)
AutoModel.register(DragomanConfig, DragomanModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(DragomanConfig, DragomanForConditionalGeneration, exist_ok=True)

# A saved model carries the code that loads it where this package is not installed.
DragomanConfig.register_for_auto_class()
DragomanModel.register_for_auto_class("AutoModel")
DragomanForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
