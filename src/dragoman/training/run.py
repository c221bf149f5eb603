"""From an experiment to a finished model: read, encode, build, train with the stock Seq2SeqTrainer, test, save."""

import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather
from datasets import Dataset, IterableDataset
from rich.console import Console
from transformers import (
    AutoModelForSeq2SeqLM,
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.distributed import DistributedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from dragoman.data.collators import PackingCollator, Seq2SeqCollator, encode_pairs
from dragoman.data.languages import save_prefix, set_languages
from dragoman.data.reading import Pairs, languages_of, read_pairs, turned_round, with_settings
from dragoman.data.tokenizers import (
    ProcessingClass,
    build_tokenizer,
    load_tokenizer,
    source_and_target_tokenizer,
)
from dragoman.evaluation.scores import build_compute_metrics, compute_scores, headline
from dragoman.files import write_whole
from dragoman.inference.arguments import check_token_ids
from dragoman.inference.languages import language_argument, language_id
from dragoman.inference.loading import model_folder, one_sentence_for_damaged_weights
from dragoman.settings import one_line
from dragoman.training.arguments import SPLITS, Experiment, TrainingArguments
from dragoman.training.averaging import WeightAverage
from dragoman.training.batches import side_lengths
from dragoman.training.card import calls, decoding_name, write_card
from dragoman.training.checkpoints import (
    COMPLETE_FILE,
    EXPERIMENT_FILE,
    PLOT_FILE,
    TEST_FILE,
    last_complete_checkpoint,
    step_of,
    unfinished_checkpoints,
)
from dragoman.training.checks import check_attention
from dragoman.training.memory import MemoryEstimate, estimate_memory
from dragoman.training.push import check_token, one_sentence_for_hub_errors, push
from dragoman.training.run_folder import (
    check_output,
    claim_output,
    is_finished,
    one_sentence_for_disk_errors,
)
from dragoman.training.trainer import LanguagesTrainer, ScheduledSamplingTrainer
from dragoman.training.watching import Divergence, Samples, plot_run


# A new sentence may well be longer than every training target, and one that never ends must still stop.
LENGTH_MARGIN = 1.5


def train(experiment: Experiment, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Run an experiment and return the folder of the finished model, on the Hub too with `training.push_to_hub`.

    The folder holds the weights (safetensors), both configurations, the tokenizer, the modeling code,
    `experiment.yaml`, the test scores and a model card. `complete.json` is written last, there and in every checkpoint:
    a folder without it is unfinished.

    Args:
        resume: continue from the last complete checkpoint in the output folder; from the start if there is none.
        overwrite: delete what an earlier run left in the output folder.

    Raises:
        ValueError: unusable data or settings, or an output folder that is in use.
        OSError: the output folder cannot be written, the disk is full, or the Hub refuses the model.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says how to go on.
    """
    arguments = experiment.training
    output = Path(str(arguments.output_dir))
    say: Callable[..., None] = Console(soft_wrap=True, highlight=False, quiet=arguments.process_index > 0).print
    if arguments.n_gpu > 1:
        raise ValueError(
            f"there are {arguments.n_gpu} GPUs: start one process on each, with `accelerate launch --multi_gpu "
            "-m dragoman train ...`, or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    _check_processes(arguments)
    with one_sentence_for_disk_errors(output):
        check_output(output, experiment, resume, overwrite)
        checkpoint = last_complete_checkpoint(output) if resume else None
        first_step = step_of(checkpoint) if checkpoint else 0
    if arguments.push_to_hub:
        check_token()
    if resume and not arguments.push_to_hub and is_finished(output, experiment):
        say(f"{output} is finished already, after step {step_of(output)}: nothing is left to do")
        recorded = json.loads((output / TEST_FILE).read_text(encoding="utf-8"))
        _say_scores(say, recorded, GenerationConfig.from_pretrained(output))
        return output
    if arguments.attn_implementation is not None:
        check_attention(arguments, experiment.model_config())
    if resume:
        for unfinished in unfinished_checkpoints(output):
            say(f"{unfinished} is skipped: the run ended before it was complete")
        say(f"Resuming from {checkpoint}" if checkpoint else f"{output} holds no complete checkpoint: starting anew")

    if not sys.stderr.isatty():
        arguments.disable_tqdm = True  # a bar in a file or a pipe is noise
    logging.getLogger("transformers.trainer_utils").addFilter(_is_news)
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="reading"):  # the others find what is large in the cache
        pairs = _read(experiment)
    tokenizer = _shared_tokenizer(experiment, pairs["train"], checkpoint)
    compute_metrics = build_compute_metrics(tokenizer, arguments.metrics) if arguments.predict_with_generate else None
    with arguments.main_process_first(desc="encoding"):
        encoded = _encode(experiment, pairs, tokenizer, say)
    longest_target = _longest_target(experiment, encoded["train"])
    model = build_model(experiment, tokenizer, longest_target, languages_of(pairs["train"], "target"))
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    # Under DeepSpeed's ZeRO-3 a parameter is empty here, and knows how many numbers it has.
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    sizes = [f"{len(side):,}" for side in dict.fromkeys(source_and_target_tokenizer(tokenizer))]
    say(f"vocabulary: {f'{sizes[0]} source, {sizes[1]} target' if len(sizes) == 2 else f'{sizes[0]} joint'}")
    say(f"model: {type(model).__name__}, {parameters:,} parameters, on {arguments.device}")

    companion = _Companion(experiment, model, first_step)
    callbacks: list[TrainerCallback] = [companion]
    average = WeightAverage(model, arguments.ema_decay) if arguments.ema_decay is not None else None
    if average is not None:
        callbacks.append(average)
    if arguments.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    collator = Seq2SeqCollator(tokenizer, model=model)
    trainer_class: Callable[..., LanguagesTrainer] = partial(LanguagesTrainer, argument=language_argument(tokenizer))
    if arguments.teacher_forcing_schedule is not None:
        trainer_class = partial(
            ScheduledSamplingTrainer,
            argument=language_argument(tokenizer),
            schedule=arguments.teacher_forcing_schedule,
        )
    with one_sentence_for_hub_errors(arguments.hub_model_id or output.name):
        trainer = trainer_class(
            model=model,
            args=arguments,
            data_collator=collator,
            train_collator=PackingCollator(tokenizer, model=model) if arguments.packing else collator,
            shuffle_buffer=experiment.data.shuffle_buffer,
            train_dataset=encoded["train"],
            eval_dataset=encoded.get("validation"),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            complete_checkpoint=partial(_mark_complete, experiment),
            average=average,
            divergence=Divergence(partial(last_complete_checkpoint, output)) if arguments.stop_on_divergence else None,
            samples=Samples(tokenizer, say, arguments.samples),
        )
    trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
    trainer.add_callback(_Lines(say) if arguments.disable_tqdm else _Progress)
    if not is_deepspeed_zero3_enabled():  # else there are no weights yet to pass a batch through
        say(f"memory: {_memory(model, experiment, encoded['train'])}")
    with one_sentence_for_disk_errors(output), companion.catching_signals():
        if arguments.process_index == 0:
            claim_output(output, experiment, overwrite)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if arguments.process_index == 0:
                plot_run(trainer.state.log_history, output / PLOT_FILE)
    if trainer.state.global_step == 0:
        raise ValueError("data.train: no pair is left of the stream, so that nothing was trained; see data.overlong")
    if trainer.state.global_step == first_step:
        say(f"step {first_step} was the last one: nothing is left to train")
    # Too late to be heard after a step. Without a checkpoint of the last one, the run goes on to its end.
    if companion.hears_stop(arguments) and companion.saved_step == trainer.state.global_step:
        companion.stop(trainer.state)

    with one_sentence_for_disk_errors(output):
        is_pushed, arguments.push_to_hub = arguments.push_to_hub, False  # the Trainer would push its own card
        trainer.save_model(str(output))
        if arguments.process_index == 0:
            (output / "training_args.bin").unlink()  # experiment.yaml says the same and is no pickle
            trainer.state.save_to_json(str(output / "trainer_state.json"))
    scores: dict[str, float] = {}
    if "test" in encoded:
        scores = _test(trainer, arguments, tokenizer, encoded["test"], list(pairs["test"]["target"]))
    with one_sentence_for_disk_errors(output):
        if arguments.process_index == 0:
            (output / TEST_FILE).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
            write_card(output, example=next(iter(pairs["train"]))["source"])
            _mark_complete(experiment, output, trainer.state)
    if is_pushed and arguments.process_index == 0:
        commit = push(output, str(trainer.hub_model_id), revision=arguments.hub_revision, message="End of training")
        say(f"pushed: {commit.repo_url} at revision {commit.oid}")
    _say_scores(say, scores, model.generation_config)
    say(f"\nThe model is in {output}. To use it in Python:\n")
    say(usage(output, next(iter(pairs["train"]))), markup=False)
    return output


def _check_processes(arguments: TrainingArguments) -> None:
    """Refuse tensor parallelism where there is not one process for each part."""
    parts, processes = arguments.tensor_parallel_size, arguments.world_size
    if parts == 1:
        return
    if parts != processes:
        started = "there is 1 process" if processes == 1 else f"there are {processes} processes"
        raise ValueError(
            f"training.tensor_parallel_size is {parts}, but {started}: start {parts} with `accelerate launch "
            f"--multi_gpu --num_processes {parts} -m dragoman train ...`"
        )
    if arguments.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise ValueError("training.tensor_parallel_size needs GPUs: Accelerate refuses it for processes on the CPU")


def build_model(
    experiment: Experiment, tokenizer: ProcessingClass, longest_target: int, target_languages: Sequence[str] = ()
) -> PreTrainedModel:
    """A model, fresh or from a checkpoint, whose `generate()` by default stops well after the longest training target.

    Args:
        longest_target: tokens of the longest training target, `</s>` included.
        target_languages: those of the training pairs; a single one becomes what `generate()` decodes into by default.

    Raises:
        ValueError: the configuration class refuses the sizes, or shares one embedding table between two vocabularies;
            the generation section has an id that the tokenizer does not, or does not go with the checkpoint's settings.
    """
    source, target = source_and_target_tokenizer(tokenizer)
    settings = experiment.generation.given()
    argument = language_argument(tokenizer)
    if argument is not None and len(target_languages) == 1:
        settings.setdefault(argument, language_id(tokenizer, target_languages[0]))
    elif argument == "forced_bos_token_id" and target_languages:
        settings.setdefault(argument, None)  # what a checkpoint has saved is one of them
    parts = experiment.training.tensor_parallel_size
    cut: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=parts)} if parts > 1 else {}
    start = experiment.model.get("from_pretrained")
    if start is not None:
        config = experiment.model_config()
        length = _longest_output(longest_target, config)
        check_token_ids(settings, config.vocab_size, "generation.")
        with one_sentence_for_damaged_weights(folder := model_folder(start)):
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, config=config, dtype=torch.float32, **cut)
        saved = model.generation_config.to_dict()
        if "max_new_tokens" in settings:
            settings["max_length"] = None
        else:
            settings.setdefault("max_length", max(length, saved["max_length"] or (saved["max_new_tokens"] or 0) + 1))
            settings["max_new_tokens"] = None
        model.generation_config = GenerationConfig.from_dict({**saved, **settings})
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            raise ValueError(f"generation, with what {start} has saved: {one_line(error)}") from error
    else:
        check_token_ids(settings, len(target), "generation.")
        model, special_ids = _fresh_model(experiment, source, target)
        if cut:
            model = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), **cut)
        if "max_new_tokens" not in settings:
            settings.setdefault("max_length", _longest_output(longest_target, model.config))
        model.generation_config = GenerationConfig(**special_ids, **settings)
    # Tied weights are saved once. Named here, the Trainer does not take them for missing when it reloads a checkpoint.
    model._keys_to_ignore_on_save.update(model.all_tied_weights_keys)
    return model


def _longest_output(longest_target: int, config: Any) -> int:
    """Where `generate()` gives up by default: well after the longest target, but not beyond learned positions."""
    length = math.ceil(LENGTH_MARGIN * longest_target) + 1  # + 1: the start token
    is_learned = getattr(config, "position_embedding_type", None) == "learned"
    return min(length, config.max_position_embeddings) if is_learned else length


def _fresh_model(experiment: Experiment, source: Any, target: Any) -> tuple[PreTrainedModel, dict[str, int]]:
    """A model with random weights for these tokenizers, and the ids of their special tokens."""
    special_ids = {
        "bos_token_id": target.bos_token_id,
        "pad_token_id": target.pad_token_id,
        "eos_token_id": target.eos_token_id,
        "decoder_start_token_id": target.bos_token_id,
    }
    sizes = {"vocab_size": len(target)}
    if source is not target:
        sizes["source_vocab_size"] = len(source)
    config = experiment.model_config(**sizes, **special_ids)
    if source is not target and config.share_embeddings:
        raise ValueError(
            "two vocabularies cannot share embeddings: set model.share_embeddings=false or tokenizer.joint=true"
        )
    return AutoModelForSeq2SeqLM.from_config(config), special_ids


def usage(output: Path, pair: Mapping[str, str]) -> str:
    """Three lines of Python, of Transformers alone, that load a model folder and translate the source of a pair."""
    call = calls(output, pair)
    auto_model, auto_tokenizer = (
        f"transformers.{auto}.from_pretrained({str(output)!r})" for auto in ("AutoModelForSeq2SeqLM", call.auto_class)
    )
    return (
        "    import dragoman, transformers\n"
        f"    model, tokenizer = {auto_model}, {auto_tokenizer}\n"
        f"    print(tokenizer.decode(model.generate(**tokenizer({call.text}, return_tensors='pt'){call.into})[0], "
        "skip_special_tokens=True))"
    )


def _is_news(record: logging.LogRecord) -> bool:
    # Checkpoints of small models are written within a second; that the Trainer then goes by their numbers is no loss.
    return "mtime may not be reliable" not in record.getMessage()


def _log_line(state: TrainerState, logs: dict[str, float]) -> str:
    hidden = (
        "epoch",
        "total_flos",
        "_runtime",
        "samples_per_second",
        "steps_per_second",
        "padded_target_tokens_per_second",
    )
    shown = [f"{name} {value:.4g}" for name, value in logs.items() if not name.endswith(hidden)]
    epoch, step = f"epoch {state.epoch:.2f} of {state.num_train_epochs:g}", f"step {state.global_step}"
    return f"{epoch}, {step} of {state.max_steps}: {', '.join(shown)}"


class _Progress(ProgressCallback):
    """The Trainer's progress bar, with one short line a log instead of a dictionary."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(_log_line(state, logs))


class _Lines(TrainerCallback):
    """The same lines without the bar."""

    def __init__(self, say: Callable[..., None]) -> None:
        self.say = say

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        self.say(_log_line(state, logs), markup=False)


class _Companion(TrainerCallback):
    """
    Beside the Trainer: keeps the model's generation settings, and stops cleanly on Ctrl-C and SIGTERM.
    """

    def __init__(self, experiment: Experiment, model: PreTrainedModel, first_step: int) -> None:
        self.experiment = experiment
        self.generation_config = deepcopy(model.generation_config)
        self.interrupted = False
        self.saves_at_epoch_end = False
        self.saved_step = first_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.hears_stop(args):
            control.should_save = True
        # A run that resumes after the last step of an epoch begins with the next one: what the end of the epoch brings,
        # an evaluation above all, has to be done before that checkpoint is written.
        is_last = state.global_step >= state.max_steps or float(state.epoch or 0).is_integer()
        if control.should_save and is_last:
            control.should_save, self.saves_at_epoch_end = False, True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save |= self.saves_at_epoch_end
        self.saves_at_epoch_end = False

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_step = state.global_step
        if self.hears_stop(args):  # asked again: a signal in the evaluation of an epoch's end comes to one process
            # Raised rather than control.should_training_stop, which would first run the evaluation of an epoch's end
            # and so make the resumed run differ from an uninterrupted one.
            self.stop(state)

    def hears_stop(self, arguments: Any) -> bool:
        """Whether any process was told to stop: all of them have to, after the same step."""
        if arguments.world_size > 1:
            self.interrupted = bool(gather(torch.tensor([int(self.interrupted)], device=arguments.device)).any())
        return self.interrupted

    def stop(self, state: TrainerState) -> None:
        raise KeyboardInterrupt(
            f"stopped and saved after step {state.global_step}; the same command with --resume goes on from there"
        )

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._restore(kwargs["model"])

    def on_predict(self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any) -> None:
        self._restore(kwargs["model"])

    def _restore(self, model: PreTrainedModel) -> None:
        # Seq2SeqTrainer fills every open setting of the model with a global default (top_k 50, ...), then saves them
        model.generation_config = deepcopy(self.generation_config)

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """
        The first Ctrl-C or SIGTERM saves after the current step and stops; the second stops at once. One of several
        processes does not listen for a second: the launcher passes on the first, which some have heard already.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        alone = self.experiment.training.world_size == 1

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def interrupt(number: int, frame: FrameType | None) -> None:
            self.interrupted = True
            if alone:
                restore()
                os.write(2, b"stopping after this step; once more to stop at once\n")  # print() may be at work itself

        previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            restore()


def _memory(model: PreTrainedModel, experiment: Experiment, encoded: Pairs) -> MemoryEstimate:
    """Of a step on the longest pairs, which a batch grouped by length really is."""
    data, arguments = experiment.data, experiment.training
    if isinstance(encoded, IterableDataset):
        source, target = cast(int, data.max_source_length), cast(int, data.max_target_length)
        rows = arguments.per_device_train_batch_size
    else:
        rows = min(arguments.per_device_train_batch_size, len(encoded))
        sources, targets = side_lengths(encoded)
        longest = np.argsort(np.maximum(sources, targets))[-rows:]
        source, target = int(sources[longest].max()), int(targets[longest].max())
    if arguments.max_tokens_per_batch is not None:
        rows = max(arguments.max_tokens_per_batch // (source + target), 1)
    return estimate_memory(model, arguments, rows, source, target, averaging=arguments.ema_decay is not None)


def _read(experiment: Experiment) -> dict[str, Pairs]:
    data = experiment.data
    specs = {split: getattr(data, split) for split in SPLITS}
    pairs = {
        split: with_settings(
            read_pairs(
                spec,
                streaming=data.streaming and split == "train",
                source_column=data.source_column,
                target_column=data.target_column,
            ),
            f"data.{split}",
            source_lang=data.source_lang,
            target_lang=data.target_lang,
            source_prefix=data.source_prefix,
        )
        for split, spec in specs.items()
        if spec is not None
    }
    if data.both_directions:
        pairs = {split: turned_round(rows, f"data.both_directions: data.{split}") for split, rows in pairs.items()}
    return pairs


def _shared_tokenizer(experiment: Experiment, pairs: Pairs, checkpoint: Path | None) -> ProcessingClass:
    """The tokenizer of the main process for all of them: trained twice, a Unigram may differ."""
    shared: list[Any] = [None]
    if experiment.training.process_index == 0:
        try:
            shared = [_tokenizer(experiment, pairs, checkpoint)]
        except (ValueError, OSError) as error:
            shared = [error]  # the others wait: they have to hear of it too
    (tokenizer,) = broadcast_object_list(shared)
    if isinstance(tokenizer, Exception):
        raise tokenizer
    return tokenizer


def _tokenizer(experiment: Experiment, pairs: Pairs, checkpoint: Path | None) -> ProcessingClass:
    settings = vars(experiment.tokenizer).copy()
    path = settings.pop("path")
    if checkpoint is not None:
        return load_tokenizer(checkpoint)
    if "from_pretrained" in experiment.model:
        path = model_folder(experiment.model["from_pretrained"])
    try:
        tokenizer = load_tokenizer(path) if path is not None else build_tokenizer(pairs, **settings)
        set_languages(tokenizer, pairs)
    except ValueError as error:
        raise ValueError(f"tokenizer: {error}") from error
    save_prefix(tokenizer, experiment.data.source_prefix)
    return tokenizer


def _encode(
    experiment: Experiment, pairs: dict[str, Pairs], tokenizer: ProcessingClass, say: Callable[..., None]
) -> dict[str, Pairs]:
    data = experiment.data
    encoded = {}
    for split, dataset in pairs.items():
        # A score must count every pair, so nothing is left out of the other two.
        limits: dict[str, Any] = {"option_prefix": None, "num_proc": data.num_proc}
        if split == "train":
            limits |= {
                "option_prefix": "data.",
                "max_source_length": data.max_source_length,
                "max_target_length": data.max_target_length,
                "overlong": data.overlong,
                "empty": data.empty,
            }
        try:
            encoded[split], report = encode_pairs(dataset, tokenizer, **limits)
        except ValueError as error:
            raise ValueError(f"data.{split}: {error}") from error
        if isinstance(dataset, IterableDataset):
            say(f"{split}: a stream of {dataset.num_shards} files")
        else:
            say(f"{split}: {report}")
    return encoded


def _longest_target(experiment: Experiment, pairs: Pairs) -> int:
    """Tokens of the longest training target; of a stream, what its targets are limited to."""
    if isinstance(pairs, Dataset):
        return int(side_lengths(pairs)[1].max())
    return cast(int, experiment.data.max_target_length)


def _test(
    trainer: Seq2SeqTrainer,
    arguments: TrainingArguments,
    tokenizer: ProcessingClass,
    dataset: Dataset,
    references: list[str],
) -> dict[str, float]:
    """Score the test set against its texts, decoded as the saved model decodes by default."""
    arguments.predict_with_generate = True
    arguments.train_sampling_strategy = "sequential"  # grouping by length would reorder the predictions too
    trainer.compute_metrics = None  # it would score against decoded labels
    arguments.generation_num_beams = arguments.generation_max_length = None  # those of the validations
    predicted = np.asarray(trainer.predict(dataset).predictions)
    _, target_tokenizer = source_and_target_tokenizer(tokenizer)
    ids = np.where(predicted == -100, target_tokenizer.pad_token_id, predicted)
    texts = target_tokenizer.batch_decode(ids, skip_special_tokens=True)
    return headline(compute_scores(texts, references, arguments.metrics))


def _say_scores(say: Callable[..., None], scores: dict[str, float], generation_config: GenerationConfig) -> None:
    for name, value in scores.items():
        say(f"test {name}: {value:.2f} ({decoding_name(generation_config)})")


def _mark_complete(experiment: Experiment, folder: Path, state: TrainerState) -> None:
    experiment.save(folder / EXPERIMENT_FILE)
    marker = {"step": state.global_step, "epoch": state.epoch, "best_validation": state.best_metric}
    marker["processes"] = experiment.training.data_processes
    write_whole(folder / COMPLETE_FILE, json.dumps(marker) + "\n")
