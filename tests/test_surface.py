"""The options a user can set. A change here is a decision: add the option's test and its line in the README too."""

import dataclasses

import typer.main
from transformers import PreTrainedConfig, Seq2SeqTrainingArguments

import dragoman
from dragoman.cli import app
from dragoman.inference.arguments import GenerationArguments
from dragoman.training import arguments


def own_fields(config_class, base):
    inherited = {field.name for field in dataclasses.fields(base)}
    return {field.name for field in dataclasses.fields(config_class)} - inherited


def test_command_line():
    commands = typer.main.get_command(app).commands
    surface = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in commands.items()
    }
    assert surface == {
        "train": ["--overwrite", "--resume", "config", "overrides"],
        "generate": [
            "--batch-size",
            "--compare",
            "--device",
            "--force-word",
            "--max-tokens-per-batch",
            "--nbest",
            "--num-return-sequences",
            "--scores",
            "--seed",
            "--source-lang",
            "--source-prefix",
            "--target-lang",
            "model",
        ],
        "evaluate": [
            "--batch-size",
            "--device",
            "--metric",
            "--output",
            "--references-column",
            "--seed",
            "--source-lang",
            "--source-prefix",
            "--strategy",
            "--target",
            "--target-lang",
            "data",
            "model",
        ],
        "attention": [
            "--device",
            "--head",
            "--kind",
            "--layer",
            "--out",
            "--rows",
            "--source-lang",
            "--source-prefix",
            "--target",
            "--target-lang",
            "model",
            "text",
        ],
        "masks": ["--device", "--out", "--target", "model", "texts"],
        "demo": ["--device", "--host", "--port", "models"],
        "serve": [
            "--device",
            "--host",
            "--max-batch-size",
            "--max-batch-tokens",
            "--max-beams",
            "--max-body-bytes",
            "--max-characters",
            "--max-new-tokens",
            "--max-queue",
            "--max-texts",
            "--max-tokens",
            "--max-wait-ms",
            "--port",
            "--timeout",
            "model",
        ],
        "score": [
            "--batch-size",
            "--device",
            "--jsonl",
            "--length-penalty",
            "--source-lang",
            "--source-prefix",
            "--target",
            "--target-lang",
            "model",
            "pairs",
        ],
        "compare": ["--metric", "--references", "--samples", "a", "b"],
        "convert": ["--dtype", "--revision", "output", "source"],
        "average": ["--last", "folders"],
        "push": ["--message", "--private", "--revision", "model", "repository"],
    }


def test_sections_of_an_experiment():
    assert set(vars(arguments.DataArguments(train=""))) == {
        "train",
        "validation",
        "test",
        "max_source_length",
        "max_target_length",
        "overlong",
        "empty",
        "both_directions",
        "source_column",
        "source_lang",
        "source_prefix",
        "target_column",
        "target_lang",
        "num_proc",
        "streaming",
        "shuffle_buffer",
    }
    assert set(vars(arguments.TokenizerArguments())) == {
        "path",
        "kind",
        "vocab_size",
        "joint",
        "target_kind",
        "target_vocab_size",
        "extra_special_tokens",
    }
    assert own_fields(arguments.TrainingArguments, Seq2SeqTrainingArguments) == {
        "early_stopping_patience",
        "ema_decay",
        "max_tokens_per_batch",
        "metrics",
        "packing",
        "samples",
        "stop_on_divergence",
        "teacher_forcing_schedule",
    }


def test_generation_options():
    assert set(vars(GenerationArguments())) == {
        "bad_words_ids",
        "begin_suppress_tokens",
        "cache_implementation",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "eos_token_id",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "force_words_ids",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_matching_ngram_size",
        "max_new_tokens",
        "max_time",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "penalty_alpha",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "sequence_bias",
        "stop_strings",
        "suppress_tokens",
        "temperature",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
        "use_cache",
    }


def test_transformer_configuration():
    assert own_fields(dragoman.DragomanConfig, PreTrainedConfig) == {
        "activation_dropout",
        "activation_function",
        "attention_bias",
        "attention_direction",
        "attention_dropout",
        "attention_scaling",
        "bos_token_id",
        "d_model",
        "decoder_attention_heads",
        "decoder_ffn_dim",
        "decoder_head_dim",
        "decoder_layers",
        "decoder_num_key_value_heads",
        "decoder_start_token_id",
        "dropout",
        "embedding_norm",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "encoder_head_dim",
        "encoder_layers",
        "encoder_num_key_value_heads",
        "eos_token_id",
        "final_dropout",
        "final_norm",
        "gated_mlp",
        "init_std",
        "label_smoothing",
        "layerdrop",
        "lm_head_bias",
        "logit_scale",
        "max_position_embeddings",
        "mlp_bias",
        "norm_eps",
        "norm_position",
        "norm_type",
        "pad_token_id",
        "position_embedding_type",
        "qk_norm",
        "relative_max_distance",
        "relative_num_buckets",
        "rope_parameters",
        "rotate_labels",
        "scale_embedding",
        "share_embeddings",
        "sinusoid_endpoint",
        "sinusoid_layout",
        "sinusoid_offset",
        "source_vocab_size",
        "tie_lm_head",
        "tie_word_embeddings",
        "use_cache",
        "vocab_size",
    }
