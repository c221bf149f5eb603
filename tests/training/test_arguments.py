import re

import pytest
import yaml
from transformers import GenerationConfig

import dragoman
from dragoman.inference.arguments import GenerationArguments, parse_generation_options
from dragoman.training.arguments import load_experiment, preset, preset_names
from training.experiments import write_experiment


@pytest.fixture
def experiment_file(tmp_path):
    return write_experiment(tmp_path)


def test_sections_become_typed_objects(experiment_file):
    experiment = load_experiment(experiment_file)
    assert experiment.model["d_model"] == 12
    assert experiment.model["norm_type"] == "rmsnorm"  # from the preset
    assert experiment.data.overlong == "error"
    assert experiment.tokenizer.kind == "word"
    assert experiment.training.max_steps == 6
    assert experiment.training.learning_rate == 0.01
    assert experiment.training.adam_beta2 == 0.98  # our recipe, not the Trainer's
    assert experiment.training.greater_is_better


def test_keys_of_the_file_win_over_its_preset(tmp_path):
    path = write_experiment(tmp_path, model={"preset": "transformer_2017"})
    experiment = load_experiment(path)
    assert experiment.model["norm_position"] == "post"
    assert experiment.model["d_model"] == 12


def test_another_preset_takes_the_place_of_the_model_section(experiment_file):
    experiment = load_experiment(experiment_file, ["model.dropout=0.3", "model.preset=transformer_2017"])
    assert experiment.model["norm_position"] == "post"
    assert experiment.model["d_model"] == 512
    assert experiment.model["dropout"] == 0.3


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.learning_rate=2e-3", "training", "learning_rate", 0.002),
        ("training.learning_rate=3", "training", "learning_rate", 3),
        ("training.eval_strategy=no", "training", "eval_strategy", "no"),
        ("training.bf16=false", "training", "bf16", False),
        ("training.metrics=[chrf, 'bleu:tokenize=zh']", "training", "metrics", ["chrf", "bleu:tokenize=zh"]),
        ("training.report_to=null", "training", "report_to", []),
        ("data.validation=null", "data", "validation", None),
        ("data.train=[a.en, a.no]", "data", "train", ["a.en", "a.no"]),
        ("generation.length_penalty=0.6", "generation", "length_penalty", 0.6),
        ("generation.early_stopping=never", "generation", "early_stopping", "never"),
    ],
)
def test_overrides_are_yaml(experiment_file, override, section, key, value):
    also = ["training.load_best_model_at_end=false", "generation.num_beams=4"]
    if "data.validation" in override:
        also.append("training.eval_strategy=no")
    experiment = load_experiment(experiment_file, [override, *also])
    assert vars(getattr(experiment, section))[key] == value


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "training.lerning_rate=1",
            "unknown key 'training.lerning_rate'; the nearest valid one is 'training.learning_rate'",
        ),
        ("model.d_modl=8", "unknown key 'model.d_modl'; the nearest valid one is 'model.d_model'"),
        ("data.trian=x", "unknown key 'data.trian'; the nearest valid one is 'data.train'"),
        ("tokenizer.vocabsize=9", "the nearest valid one is 'tokenizer.vocab_size'"),
        ("generation.beams=4", "the nearest valid one is 'generation.num_beams'"),
        ("trainer.seed=1", "unknown key 'trainer'; the nearest valid one is 'training'"),
        ("seed=1", "override 'seed=1': expected section.key=value, for example training.seed=1"),
        ("training.seed=[1", "override 'training.seed=[1': not valid YAML"),
        ("training.learning_rate=fast", "training.learning_rate must be a number, got 'fast'"),
        ("training.learning_rate=true", "training.learning_rate must be a number, got True"),
        ("training.max_steps=2.5", "training.max_steps must be a whole number, got 2.5"),
        ("training.bf16=yes", "training.bf16 must be true or false, got 'yes'"),
        ("training.eval_strategy=often", "training.eval_strategy must be one of no, steps, epoch, got 'often'"),
        ("training.metrics=bleu", "training.metrics must be a list (a text each), got 'bleu'"),
        ("training.metrics=[1]", "training.metrics: each entry must be a text, got 1"),
        ("training.label_smoothing_factor=0.1", "is not used here: set model.label_smoothing"),
        ("training.resume_from_checkpoint=x", "is not used here: use the flag --resume"),
        ("training.report_to=tensorbord", "report_to has 'tensorbord', which is unknown; did you mean 'tensorboard'? "),
        (
            "training.report_to=flyte",
            "training: report_to has 'flyte': FlyteCallback requires flytekit to be ",
        ),
        ("training.optim=adamw_foo", "training.optim must be one of adamw_torch, "),
        ("training.optim=galore_adamw", "training: optim galore_adamw: You need to "),
        ("training.optim_args=foo", "training: optim adamw_torch_fused with optim_args 'foo': "),
        ("training.lr_scheduler_type=lineal", "training.lr_scheduler_type must be one of linear, cosine, "),
        (
            "training.lr_scheduler_type=cosine_with_min_lr",
            "training: lr_scheduler_type cosine_with_min_lr with lr_scheduler_kwargs None: One of min_lr or ",
        ),
        (
            "training.lr_scheduler_kwargs={min_lr: 1}",
            "lr_scheduler_type linear with lr_scheduler_kwargs {'min_lr': 1}: get_linear_schedule_with_warmup() got an "
            "unexpected keyword argument 'min_lr'",
        ),
        ("training.logging_steps=-1", "training: logging_steps is -1; it must be greater than 0"),
        ("training.save_total_limit=0", "training: save_total_limit is 0; it must be at least 1"),
        ("training.weight_decay=-0.1", "training: weight_decay is -0.1; it must be at least 0"),
        ("training.adam_beta2=1", "training: adam_beta2 is 1; it must be at least 0 and less than 1"),
        ("training.train_sampling_strategy=foo", "train_sampling_strategy is 'foo'; it must be one of random, seq"),
        ("training.log_level=loud", "log_level is 'loud'; it must be one of "),
        ("training.torch_compile_backend=foo", "torch_compile_backend is 'foo'; it must be one of no, eager, "),
        ("training.include_num_input_tokens_seen=some", "it must be one of all, non_padding, no"),
        ("training.dataloader_persistent_workers=true", "needs dataloader_num_workers of at least 1"),
        ("training.accelerator_config={foo: 1}", "training: AcceleratorConfig.__init__() got an unexpected keyword"),
        ("training.prediction_loss_only=true", "metric_for_best_model must be one of loss, got 'chrf'"),
        ("training.use_liger_kernel=true", "is not used here: Liger has no kernels for these models"),
        ("data.overlong=cut", "data.overlong must be 'error' or 'drop' or 'truncate', got 'cut'"),
        ("data.train=7", "data.train must be a text or a list (a text each), got 7"),
        ("data.validation=null", "training.eval_strategy is 'steps', but there is no data.validation to evaluate on"),
        ("generation.num_beams=0", "generation.num_beams must be greater than 0, got 0"),
        ("generation.top_p=3", "generation.top_p must be greater than 0 and at most 1, got 3"),
        (
            "generation.stop_strings=x",
            "generation.stop_strings is not used here: they need the tokenizer, so give them",
        ),
        ("generation.eos_token_id=3", "generation.eos_token_id is not used here: it comes from the tokenizer"),
        ("generation.top_k=4", "`top_k`: `do_sample` is not set to `True`"),
        ("model.preset=modem", "no preset 'modem'; the nearest is 'modern'"),
        ("model.model_type=dragomann", "unknown model.model_type 'dragomann'; did you mean 'dragoman'?"),
        ("model.vocab_size=9", "model.vocab_size comes from the tokenizer; leave it out"),
        ("model.norm_type=batch", "model.norm_type must be 'layernorm' or 'rmsnorm', got 'batch'"),
        ("model.decoder_attention_heads=5", "decoder_attention_heads=5 does not divide d_model=12"),
        ("model.dropout=1.5", "dropout=1.5 must be at least 0 and less than 1"),
    ],
)
def test_mistakes_are_one_sentence(experiment_file, override, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        load_experiment(experiment_file, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: {train: x}\nmodle: {}", "tiny.yaml: unknown key 'modle'; the nearest valid one is 'model'"),
        ("data: {train: x, trian: y}", "tiny.yaml: unknown key 'data.trian'; the nearest valid one is 'data.train'"),
        ("data: {train: x, train: y}", "tiny.yaml: not valid YAML: key 'train' is given twice"),
        ("model: {d_model: 64}", "tiny.yaml: data.train is missing"),
        ("data: [x]", "tiny.yaml: section 'data' must hold 'key: value' lines, got ['x']"),
        ("", "tiny.yaml: expected 'key: value' lines, but there are none"),
        ("just a text", "tiny.yaml: expected 'key: value' lines, got 'just a text'"),
        ("a: [", "tiny.yaml: not valid YAML"),
    ],
)
def test_mistakes_in_the_file_name_the_file(tmp_path, text, sentence):
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_experiment(path)


def test_an_empty_section_is_one_of_defaults(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("data: {train: pairs.tsv}\ngeneration:\ntokenizer: # all as usual\n")
    experiment = load_experiment(path)
    assert experiment.generation.given() == {}
    assert experiment.tokenizer.vocab_size == 8000


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        load_experiment(tmp_path / "nowhere.yaml")


def test_early_stopping_needs_something_to_watch(experiment_file):
    with pytest.raises(ValueError, match="early_stopping_patience needs load_best_model_at_end"):
        load_experiment(
            experiment_file, ["training.early_stopping_patience=2", "training.load_best_model_at_end=false"]
        )


@pytest.mark.parametrize(
    ("metrics", "best", "greater_is_better"),
    [
        ("[bleu]", "loss", False),
        ("[wer, cer, ter]", "wer", False),
        ("[wer, cer, ter]", "eval_cer", False),
        ("[wer, cer, ter]", "ter", False),
        ("[wer]", "sequence_error_rate", False),
        ("[diversity]", "rep_2", False),
        ("[diversity]", "diversity", True),
        ("['bleu:tokenize=zh']", "bleu", True),
        ("[bleu, 'bleu:tokenize=zh']", "'bleu:tokenize=zh'", True),
        ("[wer, 'ter:asian_support=true,normalized=true', ter]", "'ter:asian_support=true,normalized=true'", False),
    ],
)
def test_the_direction_of_the_best_metric(experiment_file, metrics, best, greater_is_better):
    overrides = [f"training.metrics={metrics}", f"training.metric_for_best_model={best}"]
    assert load_experiment(experiment_file, overrides).training.greater_is_better is greater_is_better


@pytest.mark.parametrize(
    ("metrics", "best", "sentence"),
    [
        ("[bleu, 'bleu:tokenize=zh']", "bleu:tokenize=ja", "must be one of loss, bleu, bleu:tokenize=zh, got"),
        ("['rouge:rouge_types=[rouge1]']", "rougeL", "must be one of loss, rouge1, got 'rougeL'"),
        ("['bleu:tokenize=xx']", "bleu", "training: tokenize='xx' is no tokenizer of sacreBLEU: use none, "),
        ("['chrf:char_order=six']", "chrf", "training: metrics chrf:char_order=six: a value is of the wrong type"),
    ],
)
def test_metrics_that_will_not_come(experiment_file, metrics, best, sentence):
    overrides = [f"training.metrics={metrics}", f"training.metric_for_best_model={best}"]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_experiment(experiment_file, overrides)


def test_without_validation_nothing_is_evaluated(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("data: {train: pairs.tsv}")
    training = load_experiment(path).training
    assert training.eval_strategy == "no"
    assert not training.load_best_model_at_end
    assert training.output_dir == "runs/short"


def test_a_saved_experiment_reads_back(tmp_path, experiment_file):
    experiment = load_experiment(experiment_file, ["training.learning_rate=1e-5", "generation.num_beams=3"])
    copy = tmp_path / "experiment.yaml"
    experiment.save(copy)
    again = load_experiment(copy)
    assert again.given == experiment.given
    assert again.training.to_dict() == experiment.training.to_dict()
    assert (again.model, again.data, again.tokenizer) == (experiment.model, experiment.data, experiment.tokenizer)
    assert again.generation == experiment.generation


@pytest.mark.parametrize("text", ["2e-3", ".5e3", "1_000", "1e5", "on", "no", "null", "12:30:00", "0x1F", "~"])
def test_a_text_stays_a_text(tmp_path, experiment_file, text):
    """Whatever YAML 1.1 or 1.2 would take it for without its quotes."""
    experiment = load_experiment(experiment_file, [f"training.run_name='{text}'"])
    experiment.save(tmp_path / "again.yaml")
    assert load_experiment(tmp_path / "again.yaml").given["training"]["run_name"] == text
    assert yaml.safe_load((tmp_path / "again.yaml").read_text())["training"]["run_name"] == text


def test_presets_by_name():
    config = preset("deep_shallow", vocab_size=23, d_model=64)
    assert isinstance(config, dragoman.DragomanConfig)
    assert (config.encoder_layers, config.decoder_layers, config.d_model) == (10, 2, 64)
    with pytest.raises(ValueError, match="unknown key 'd_modl'; the nearest valid one is 'd_model'"):
        preset("modern", d_modl=64)
    with pytest.raises(ValueError, match="no preset 'moderne'; the nearest is 'modern'"):
        preset("moderne")
    assert {"deep_shallow", "modern", "transformer_2017", "transformer_prenorm"} <= set(preset_names())


def test_generation_options():
    options = [
        "--num-beams",
        "4",
        "--do-sample",
        "--top_p=0.9",
        "--early-stopping",
        "never",
        "--length-penalty",
        "-1.5",
    ]
    assert parse_generation_options(options).given() == {
        "num_beams": 4,
        "do_sample": True,
        "top_p": 0.9,
        "early_stopping": "never",
        "length_penalty": -1.5,
    }
    assert parse_generation_options([]).given() == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--num-beems", "4"], "no such option: --num-beems; the nearest valid one is --num-beams"),
        (["--nbset", "4"], "no such option: --nbset; the nearest valid one is --nbest"),
        (["--num-beams", "four"], "--num-beams must be a whole number or null, got 'four'"),
        (["--num-beams"], "--num-beams must be a whole number or null, got True"),
        (["--num-beams", "0"], "--num-beams must be greater than 0, got 0"),
        (["--top-p", "3"], "--top-p must be greater than 0 and at most 1, got 3"),
        (["--temperature", "0"], "--temperature must be greater than 0, got 0"),
        (["--typical-p", "-0.5"], "--typical-p must be greater than 0 and at most 1, got -0.5"),
        (["--min-p", "2"], "--min-p must be at least 0 and at most 1, got 2"),
        (["--eta-cutoff", "1"], "--eta-cutoff must be at least 0 and less than 1, got 1"),
        (["--penalty-alpha", "1.5"], "--penalty-alpha must be at least 0 and at most 1, got 1.5"),
        (["--top-k", "-1"], "--top-k must be at least 0, got -1"),
        (["4"], "unexpected argument '4'; options start with --"),
        (["--max-length", "9", "--max-new-tokens", "9"], "max_length and max_new_tokens exclude each other"),
    ],
)
def test_wrong_generation_options(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_generation_options(options, ["--nbest"])


# Why a setting of generate() is no option here. One that a new Transformers brings has to be put here, or be offered.
LEFT_OUT = {
    "num_return_sequences": "is --nbest",
    "return_dict_in_generate": "the outputs are texts",
    "output_attentions": "the outputs are texts",
    "output_hidden_states": "the outputs are texts",
    "output_logits": "the outputs are texts",
    "output_scores": "the outputs are texts; --scores gives theirs",
    "pad_token_id": "comes from the tokenizer, and no output depends on it",
    "bos_token_id": "an encoder-decoder begins with decoder_start_token_id",
    "guidance_scale": "doubles the batch of a decoder that has no encoder",
    "token_healing": "mends the end of a prompt; there is none",
    "prefill_chunk_size": "for long prompts; there is none",
    "constraints": "constrained beam search is gone from Transformers' own code",
    "dola_layers": "DoLa is gone from Transformers' own code, and was for decoders",
    "low_memory": "was for the old contrastive search",
    "watermarking_config": "an object, no value of an option; translate() takes it",
    "cache_config": "an object, no value of an option; translate() takes it",
    "compile_config": "an object, no value of an option; translate() takes it",
    "disable_compile": "only static caches compile, and only where one asked for them",
    "max_cache_len": "a static cache takes its length from max_length",
    "continuous_batching_config": "for decoders behind a server",
    "is_assistant": "set by generate() in an assistant model",
    "num_assistant_tokens": "needs an assistant model, which translate() takes",
    "num_assistant_tokens_schedule": "needs an assistant model, which translate() takes",
    "assistant_confidence_threshold": "needs an assistant model, which translate() takes",
    "assistant_ensemble_weight": "needs an assistant model, which translate() takes",
    "assistant_lookbehind": "needs an assistant model, which translate() takes",
    "target_lookbehind": "needs an assistant model, which translate() takes",
    "assistant_early_exit": "needs a decoder with early exits",
    "speculation_type": "needs an assistant model, which translate() takes",
    "use_mtp": "needs a model with heads for several tokens",
    "transformers_version": "says who wrote the file",
    "_from_model_config": "says who wrote the file",
}


def test_every_argument_of_generate_is_an_option_or_left_out_for_a_reason():
    offered, known = set(vars(GenerationArguments())), set(vars(GenerationConfig()))
    assert offered <= known
    assert offered & set(LEFT_OUT) == set()
    assert known - offered == set(LEFT_OUT) & known
    assert set(LEFT_OUT) <= known


def test_saved_experiments_are_plain_yaml(tmp_path, experiment_file):
    load_experiment(experiment_file).save(tmp_path / "experiment.yaml")
    text = (tmp_path / "experiment.yaml").read_text()
    assert text.startswith("# dragoman train experiment.yaml\n")
    assert yaml.safe_load(text)["model"]["model_type"] == "dragoman"


@pytest.mark.parametrize(("overrides", "sentence"), [
    (["training.max_tokens_per_batch=0"], "training: max_tokens_per_batch is 0; it must be at least 1"),
    (["training.per_device_train_batch_size=0"], "training: per_device_train_batch_size is 0; it must be at least 1"),
    (["training.per_device_eval_batch_size=-1"], "per_device_eval_batch_size is -1; it must be at least 1"),
    (["training.num_train_epochs=-1", "training.max_steps=-1"], "num_train_epochs is -1; it must be greater than 0"),
    (["training.learning_rate=-1"], "with the overrides: training: learning_rate is -1; it must be at least 0"),
    (["training.packing=true"], "packing needs max_tokens_per_batch, the tokens of a batch"),
    (["training.max_tokens_per_batch=9", "training.per_device_train_batch_size=3"],
     "training.per_device_train_batch_size and training.max_tokens_per_batch exclude each other"),
    (["model.preset=lstm_luong", "training.max_tokens_per_batch=99", "training.packing=true"],
     "training.packing is for models of type 'dragoman', not 'dragoman_rnn'"),
    (["training.train_sampling_strategy=batch_rebalance"], "batch_rebalance cannot be resumed exactly; group_by_"),
    (["training.tensor_parallel_size=0"], "training: tensor_parallel_size is 0; it must be at least 1"),
    (["training.tensor_parallel_size=2", "training.ema_decay=0.9"],
     "training: tensor_parallel_size and ema_decay exclude each other"),
    (["training.tensor_parallel_size=2", "training.fp16=true"],
     "training: tensor_parallel_size and fp16 exclude each other"),
    (["training.tensor_parallel_size=2", "training.average_tokens_across_devices=false"],
     "training: tensor_parallel_size needs average_tokens_across_devices: true"),
    (["training.tensor_parallel_size=2", "training.optim=adafactor"],
     "tensor_parallel_size goes with optim adamw_torch, adamw_torch_fused, sgd, adagrad, rmsprop, not adafactor"),
    (["training.tensor_parallel_size=2"],
     "training.tensor_parallel_size is 2, which must divide model.encoder_ffn_dim, here 17"),
    (["model.preset=lstm_luong", "training.tensor_parallel_size=2"],
     "training.tensor_parallel_size is for models of type 'dragoman', not 'dragoman_rnn'"),
    (["training.parallelism_config={}"], "set training.tensor_parallel_size, or launch with configs/accelerate/fsdp2"),
    (["data.num_proc=0"], "data: num_proc is 0; it must be at least 1"),
    (["data.streaming=true", "training.max_steps=-1"], "data.streaming needs training.max_steps"),
    (["data.streaming=true"], "data.streaming needs data.max_source_length and data.max_target_length"),
    (["data.streaming=true", "data.max_source_length=9", "data.max_target_length=9", "data.num_proc=2"],
     "use training.dataloader_num_workers, not data.num_proc"),
    (["data.streaming=true", "data.max_source_length=9", "data.max_target_length=9", "training.save_strategy=epoch"],
     "training.save_strategy is 'epoch', which a stream has not; use steps"),
    (["data.streaming=true", "data.max_source_length=9", "data.max_target_length=9", "data.both_directions=true"],
     "data.streaming and data.both_directions exclude each other"),
    (["data.streaming=true", "training.num_train_epochs=3"],
     "training.num_train_epochs is of no use with data.streaming"),
])  # fmt: skip
def test_what_cannot_be_at_once(tmp_path, overrides, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_experiment(write_experiment(tmp_path), overrides)


def test_a_budget_given_on_the_command_line_replaces_the_batch_size(tmp_path):
    training = load_experiment(write_experiment(tmp_path), ["training.max_tokens_per_batch=99"])
    assert training.training.max_tokens_per_batch == 99
    assert "per_device_train_batch_size" not in training.given["training"]


def test_a_stream_is_evaluated_by_steps(tmp_path):
    limits = ["data.max_source_length=9", "data.max_target_length=9"]
    path = write_experiment(tmp_path, training={"max_steps": 5})
    path.write_text(re.sub(r".*(eval|save)_strategy.*\n", "", path.read_text()))
    training = load_experiment(path, ["data.streaming=true", *limits]).training
    assert (training.eval_strategy, training.save_strategy) == ("steps", "steps")
