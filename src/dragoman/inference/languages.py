"""Decoding into a language: the argument of `generate()` that says which, and the token of each."""

from dragoman.data.languages import languages
from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer
from dragoman.models.pipeline_dragoman import language_ids


def language_argument(processing_class: ProcessingClass) -> str | None:
    """The argument of `generate()` for the target's language; None for a model without target languages.

    Its token is the first that must be produced or, in mBART, the one that the decoder begins with.
    """
    _, tokenizer = source_and_target_tokenizer(processing_class)
    if not languages(processing_class, "target"):
        return None
    return "decoder_start_token_id" if type(tokenizer).__name__ == "MBartTokenizer" else "forced_bos_token_id"


def language_id(processing_class: ProcessingClass, code: str) -> int:
    """The id of the token of a target language, which has to be one that the tokenizer knows."""
    _, tokenizer = source_and_target_tokenizer(processing_class)
    return language_ids(tokenizer, "target")[code]
