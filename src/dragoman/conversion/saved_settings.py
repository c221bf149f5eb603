"""What a model was saved with for decoding, as its exports take it along or name it."""

from typing import Any

from transformers import GenerationConfig


# Which change nothing about the tokens, or are said elsewhere.
_PASSED_OVER = {"max_length", "max_new_tokens", "num_return_sequences", "transformers_version"}
_PASSED_OVER |= {"bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"}
_PASSED_OVER |= {"prefill_chunk_size", "return_dict_in_generate", "target_lookbehind"}
_TECHNICAL = ("_", "assistant", "cache_", "compile", "disable_compile", "max_cache", "num_assistant", "output_", "use_")
_OF_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
_OF_BEAMS = {"length_penalty", "early_stopping"}


def special_ids(model: Any) -> dict[str, Any]:
    """The ids as `generate()` takes them: those of the generation config, else of the config. The ends are a list."""
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(model.generation_config, name) for name in names}
    ids = {name: getattr(model.config, name) if value is None else value for name, value in ids.items()}
    end = ids["eos_token_id"]
    return {**ids, "eos_token_id": [] if end is None else end if isinstance(end, list) else [end]}


def saved_settings(model: Any) -> dict[str, Any]:
    """The settings of decoding, beside ids and lengths, that change what `generate()` gives."""
    neutral = {**GenerationConfig._get_default_generation_params(), "min_new_tokens": 0, "penalty_alpha": 0.0}
    saved = model.generation_config.to_dict()
    ignored = set() if saved["do_sample"] else _OF_SAMPLING
    if (saved["num_beams"] or 1) == 1:
        ignored = ignored | _OF_BEAMS
    return {
        name: value
        for name, value in saved.items()
        if value is not None
        and value is not False
        and value != neutral.get(name)
        and name not in _PASSED_OVER | ignored
        and not name.startswith(_TECHNICAL)
    }
