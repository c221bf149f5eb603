"""
Dragoman: encoder-decoder models for Hugging Face Transformers.

Importing this package registers its models, so that `AutoModelForSeq2SeqLM` and the other Auto classes know them.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .models.configuration_dragoman import DragomanConfig
from .models.configuration_dragoman_rnn import DragomanRnnConfig
from .models.modeling_dragoman import (
    DragomanEncoderModel,
    DragomanForConditionalGeneration,
    DragomanModel,
)
from .models.modeling_dragoman_rnn import DragomanRnnForConditionalGeneration, DragomanRnnModel
from .models.pipeline_dragoman import TASK, Seq2SeqGenerationPipeline
from .models.processing_dragoman import DragomanProcessor


__version__ = "0.1.0"

__all__ = [
    "DragomanConfig",
    "DragomanEncoderModel",
    "DragomanForConditionalGeneration",
    "DragomanModel",
    "DragomanProcessor",
    "DragomanRnnConfig",
    "DragomanRnnForConditionalGeneration",
    "DragomanRnnModel",
    "Seq2SeqGenerationPipeline",
    "pipeline",
    "preset",
]

AutoConfig.register("dragoman", DragomanConfig, exist_ok=True)
AutoModel.register(DragomanConfig, DragomanModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(DragomanConfig, DragomanForConditionalGeneration, exist_ok=True)
AutoConfig.register("dragoman_rnn", DragomanRnnConfig, exist_ok=True)
AutoModel.register(DragomanRnnConfig, DragomanRnnModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(DragomanRnnConfig, DragomanRnnForConditionalGeneration, exist_ok=True)
AutoProcessor.register(DragomanConfig, DragomanProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, Seq2SeqGenerationPipeline, pt_model=AutoModelForSeq2SeqLM, type="text")

# A saved model carries the code that loads it where this package is not installed.
DragomanConfig.register_for_auto_class()
DragomanModel.register_for_auto_class("AutoModel")
DragomanEncoderModel.register_for_auto_class("AutoModel")
DragomanForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
DragomanRnnConfig.register_for_auto_class()
DragomanRnnModel.register_for_auto_class("AutoModel")
DragomanRnnForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
DragomanProcessor.register_for_auto_class("AutoProcessor")


def preset(name: str, **overrides):
    """
    The configuration of a preset of `configs/models`, for example `preset("transformer_2017", vocab_size=8000)`.

    Args:
        overrides: fields of the configuration class.

    Raises:
        ValueError: no such preset or field, or a combination that makes no model.
    """
    from .training.arguments import preset as read  # here, because it imports what only training needs

    return read(name, **overrides)


def pipeline(task: str, model, **settings) -> Seq2SeqGenerationPipeline:
    """
    A pipeline for `"translation"`, `"summarization"`, `"dialogue"` or `"seq2seq-generation"`, for example
    `pipeline("translation", model="runs/quickstart")("Delete the selected files")`.

    Args:
        task: decides what the outputs are called: `translation_text`, `summary_text`, else `generated_text`.
        model: folder of a saved model, its name on the Hub, or a loaded model.
        settings: those of `dragoman.inference.pipelines.pipeline`.

    Raises:
        FileNotFoundError: no such model.
        ValueError: no such task, or a setting that the pipeline does not have.
    """
    from .inference.pipelines import pipeline as build  # here, because it imports what only inference needs

    return build(task, model, **settings)
