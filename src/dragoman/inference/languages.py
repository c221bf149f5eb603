"""Choosing the languages of a model that has many, by the codes that its tokenizer knows."""

import re

from transformers import PreTrainedTokenizerBase

from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer
from dragoman.settings import did_you_mean


# The tokenizers with languages, and the argument of generate() that says in which to decode: the code is the first
# token that must be produced or, in mBART, the one that the decoder begins with.
TARGET_ARGUMENTS = {
    "M2M100Tokenizer": "forced_bos_token_id",
    "NllbTokenizer": "forced_bos_token_id",
    "MBart50Tokenizer": "forced_bos_token_id",
    "MBartTokenizer": "decoder_start_token_id",
}


def choose_languages(
    processing_class: ProcessingClass, source_lang: str | None = None, target_lang: str | None = None
) -> dict[str, int]:
    """
    Set the languages of a tokenizer of M2M100, NLLB or mBART.

    Args:
        source_lang, target_lang: codes as the tokenizer has them: `it` (M2M100), `ita_Latn` (NLLB), `it_IT` (mBART).

    Returns:
        What `generate()` has to be told about the target language; nothing where that is None.

    Raises:
        ValueError: a tokenizer without languages, or a code that it does not have.
    """
    tokenizer, _ = source_and_target_tokenizer(processing_class)
    argument = TARGET_ARGUMENTS.get(type(tokenizer).__name__)
    if argument is None:
        raise ValueError(
            f"a {type(tokenizer).__name__} has no languages to choose from; tokenizers of M2M100, NLLB and mBART have."
        )
    codes = _codes(tokenizer)
    for code in (source_lang, target_lang):
        if code is not None and code not in codes:
            raise ValueError(f"the tokenizer does not know the language {code!r}: {did_you_mean(code, codes)}")
    if source_lang is not None:
        tokenizer.src_lang = source_lang
    if target_lang is None:
        return {}
    tokenizer.tgt_lang = target_lang
    ids = tokenizer(text_target="a").input_ids  # the code stands before the text or, in mBART, at the very end
    return {argument: ids[0] if ids[-1] == tokenizer.eos_token_id else ids[-1]}


def _codes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if type(tokenizer).__name__ == "M2M100Tokenizer":
        return list(tokenizer.lang_code_to_id)
    return [token for token in tokenizer.all_special_tokens if re.fullmatch(r"[a-z]{2,3}_[A-Z][A-Za-z]+", token)]
