"""Decoding into a language: the argument of `generate()` that says which, for one batch of several too."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from dragoman.data.languages import languages
from dragoman.data.tokenizers import ProcessingClass, language_token, source_and_target_tokenizer


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
    if type(tokenizer).__name__ == "M2M100Tokenizer":
        return tokenizer.get_lang_id(code)
    ours = "target_languages" in tokenizer.init_kwargs
    return tokenizer.get_vocab()[language_token(code) if ours else code]


def language_arguments(argument: str, token_ids: Sequence[int]) -> dict[str, Any]:
    """What `generate()` has to be told for rows that begin with these tokens.

    Args:
        argument: as `language_argument` gives it.
        token_ids: the token of each row's language, (B,).
    """
    if len(set(token_ids)) == 1:
        return {argument: token_ids[0]}
    if argument == "decoder_start_token_id":
        return {argument: list(token_ids)}
    return {"logits_processor": LogitsProcessorList([ForcedFirstTokens(token_ids)])}


class ForcedFirstTokens(LogitsProcessor):
    """`forced_bos_token_id` with a token for each row of the batch; beams and samples of a row share its token."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = torch.tensor(token_ids)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Decoder ids (N, t), scores (N, V), N a multiple of the rows -> scores (N, V)"""
        if input_ids.shape[1] > 1:
            return scores
        token_ids = self.token_ids.to(scores.device).repeat_interleave(len(scores) // len(self.token_ids))
        return torch.full_like(scores, -torch.inf).scatter_(1, token_ids[:, None], 0.0)
