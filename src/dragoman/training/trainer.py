"""The few things about training that no public hook of the stock trainer reaches."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler
from transformers import Seq2SeqTrainer, TrainerState
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import HubStrategy

from dragoman.data.batching import TokenBudgetBatches
from dragoman.models.modeling_dragoman_rnn import DragomanRnnForConditionalGeneration
from dragoman.models.pipeline_dragoman import language_arguments
from dragoman.models.scheduled_sampling import teacher_forcing_schedule
from dragoman.training.arguments import TrainingArguments
from dragoman.training.averaging import WeightAverage
from dragoman.training.batches import LengthGroups, StreamedBatches, TokenBudgetSampler, side_lengths
from dragoman.training.checkpoints import COMPLETE_FILE, EXPERIMENT_FILE, checkpoints, load_parts
from dragoman.training.watching import Divergence, Samples, Speed


# While checkpoints are pushed; no checkpoint itself, but named so that nothing takes it for a part of the model.
UPLOADED_FOLDER = "checkpoint-pushed"
# Of a checkpoint under tensor parallelism: each process's part of the optimizer's state.
OPTIMIZER_FOLDER = "optimizer"


@contextmanager
def _taking_a_cut_model(model: Any, arguments: Any) -> Iterator[None]:
    """The Trainer takes a model under tensor parallelism where it saves no optimizer, which `DurableTrainer` does."""
    save_only_model = arguments.save_only_model
    arguments.save_only_model |= bool(model.is_distributed_loading_by_transformers)
    try:
        yield
    finally:
        arguments.save_only_model = save_only_model


class DurableTrainer(Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` that can be killed at any moment: a checkpoint without its marker, `complete.json`, is unfinished,
    and older ones are deleted when the new one has it. It evaluates and saves an average of the weights where there is
    one, and tells what it is doing.

    A subclass, because the Trainer deletes old checkpoints before a callback hears of the new one, makes one step more
    when it resumes a run that had made its last, and shows its batches and gradients to no callback; and because under
    tensor parallelism it neither saves nor loads a checkpoint, and scores every row and counts every token once for
    each process.

    Args:
        complete_checkpoint: writes what belongs into a checkpoint's folder besides, and at last the marker.
        average: of the weights, or None.
        divergence: looks at the gradients of each step, or None.
        samples: of what the model makes of validation sources, or None.
    """

    args: TrainingArguments

    def __init__(
        self,
        *args: Any,
        complete_checkpoint: Callable[[Path, TrainerState], None],
        average: WeightAverage | None = None,
        divergence: Divergence | None = None,
        samples: Samples | None = None,
        **kwargs: Any,
    ) -> None:
        with _taking_a_cut_model(kwargs["model"], kwargs["args"]):
            super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled and isinstance(self.model, DragomanRnnForConditionalGeneration):
            raise ValueError(
                "a recurrent model has no layers that FSDP could share out among processes; leave out training.fsdp, "
                "or launch with configs/accelerate/ddp.yaml"
            )
        model: Any = self.model
        if (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()) and getattr(model.config, "layerdrop", 0):
            raise ValueError(
                "model.layerdrop leaves out other layers in each process, and under FSDP and DeepSpeed's ZeRO-3 they "
                "would wait for each other's; set model.layerdrop=0, or launch with configs/accelerate/ddp.yaml"
            )
        if is_deepspeed_zero3_enabled() and isinstance(self.model, DragomanRnnForConditionalGeneration):
            raise ValueError(
                "a recurrent model makes as many steps as its longest sentence has tokens, and with DeepSpeed's ZeRO-3 "
                "processes would wait for each other's steps; take configs/accelerate/deepspeed_zero2.json"
            )
        if average is not None and (self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self._is_fsdp2())):
            raise ValueError(
                "training.ema_decay works with whole weights in each process and with FSDP of version 2; leave out "
                "DeepSpeed and FSDP of version 1"
            )
        self.complete_checkpoint = complete_checkpoint
        self.average = average
        self.divergence = divergence
        self.samples = samples
        self.shows_samples = False
        self.speed = Speed()
        self.stopped_early = False

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._keeping_checkpoints():
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
        if self.args.should_save:
            folder = self._get_output_dir(trial)
            checkpoint = Path(folder, f"checkpoint-{self.state.global_step}")
            if self.average is not None and not self.is_fsdp_enabled:  # of whose checkpoints the shards are current
                self.average.save_current(checkpoint)
            self.complete_checkpoint(checkpoint, self.state)
            self._delete_checkpoints(folder)
        self.accelerator.wait_for_everyone()  # a process that ends earlier takes the others with it

    def _delete_checkpoints(self, folder: str) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        older = checkpoints(Path(folder))[:-1]
        surplus = len(older) + 1 - limit if limit else 0
        for checkpoint in [one for one in older if best is None or one != Path(best)][: max(surplus, 0)]:
            (checkpoint / COMPLETE_FILE).unlink(missing_ok=True)  # first, lest half a folder look like a whole one
            shutil.rmtree(checkpoint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with self._keeping_checkpoints():
            output = super()._finalize_training(*args, **kwargs)
        if self.is_world_process_zero():
            shutil.rmtree(Path(str(self.args.output_dir), UPLOADED_FOLDER), ignore_errors=True)
        return output

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer puts weights and tokenizer into its folder and uploads all of that, sentences of the validation
        # data and logs among it, but no code. So it gets a folder for this alone.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        output = Path(str(self.args.output_dir))
        folder = output / UPLOADED_FOLDER
        folder.mkdir(exist_ok=True)
        for file in (*Path(checkpoint_folder).glob("*.py"), output / EXPERIMENT_FILE):
            shutil.copy(file, folder)
        self.args.output_dir = str(folder)
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.args.output_dir = str(output)

    @contextmanager
    def _keeping_checkpoints(self) -> Iterator[None]:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.stopped_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.stopped_early or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        if self.average is not None:
            if not self.args.load_best_model_at_end or self.state.best_model_checkpoint is None:
                self.average.keep()
            self.average = None  # the model is the average now
        return output

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        counted = self.state.num_input_tokens_seen - before  # of all processes, some of which have the same batch
        self.state.num_input_tokens_seen = before + counted // self.get_tp_size()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.get_tp_size() == 1:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        save_optimizer_distributed(self.model, optimizer.optimizer, str(Path(output_dir, OPTIMIZER_FOLDER)))
        if self.args.should_save:
            torch.save(scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.get_tp_size() == 1:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        load_optimizer_distributed(self.model, optimizer.optimizer, str(Path(checkpoint, OPTIMIZER_FOLDER)))
        scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.get_tp_size() > 1:
            load_parts(self.model, Path(resume_from_checkpoint))
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            resume = self.average.resume_shared_out if self.is_fsdp_enabled else self.average.resume
            resume(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.get_tp_size() > 1:
            load_parts(self.model, Path(str(self.state.best_model_checkpoint)))
            return
        super()._load_best_model()
        if self.average is not None and self.is_fsdp_enabled:
            self.average.load(Path(str(self.state.best_model_checkpoint)))

    def _is_fsdp2(self) -> bool:
        return self.accelerator.state.fsdp_plugin.fsdp_version == 2

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        with self._averaged():
            super().save_model(output_dir, *args, **kwargs)
            if self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
                # The Trainer writes shards alone, and those into checkpoints alone; a folder is to hold a model, too.
                self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        # Accelerate's FSDP2 makes groups of the tables it asks the model for and leaves out the decoder's, which torch
        # refuses where they are one. Told of none, it leaves all ends of a tie to the group of the whole model.
        model: Any = self.model
        model.get_input_embeddings = model.get_output_embeddings = lambda: None
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            del model.get_input_embeddings, model.get_output_embeddings

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        # A score must count every pair: the Trainer would drop the last batch of an evaluation, too.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and kwargs.get("is_training", False)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Several processes share out equal numbers of rows, the last ones twice; Seq2SeqTrainer would count those.
        self.gather_function = self.accelerator.gather_for_metrics if self.get_tp_size() == 1 else self._rows_here
        with self._averaged(), self._default_attention():
            return super().evaluation_loop(*args, **kwargs)

    def _rows_here(self, rows: torch.Tensor) -> torch.Tensor:
        """As `gather_for_metrics`, but under tensor parallelism, where every process has all rows."""
        batches = self.accelerator.gradient_state
        return rows[: batches.remainder] if batches.end_of_dataloader and batches.remainder > 0 else rows

    @contextmanager
    def _default_attention(self) -> Iterator[None]:
        """What is good for training may be slow at decoding token by token, or refuse its single precision."""
        chosen = self.args.attn_implementation
        if chosen is None:
            yield
            return
        model: Any = self.model
        model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            model.set_attn_implementation(chosen)

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.speed.add(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        scaler_goes_on = self.args.fp16 and not math.isfinite(norm)  # it leaves the step out and scales less
        if self.divergence is not None and not scaler_goes_on:
            self.divergence.check(float(norm), self.state.global_step + 1, self._get_learning_rate())
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.speed.pause()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.speed.go_on()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs and self.state.global_step == self._initial_global_step:
            return  # a resumed run that had made its last step: a loss of 0 and a speed of 0, of no steps
        if "loss" in logs:
            logs |= self.speed.figures(self._gather_counts)
        super().log(logs, *args, **kwargs)

    def _gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Of the processes that have batches of their own."""
        return self.accelerator.gather(counts.to(self.args.device))[:: self.get_tp_size()]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.shows_samples = self.samples is not None and self.args.predict_with_generate
        metrics = super().evaluate(*args, **kwargs)
        self.shows_samples = False
        if self.samples is not None and self.is_world_process_zero():
            folder, step = Path(str(self.args.output_dir)), self.state.global_step
            self.samples.report(folder, step, self.callback_handler.callbacks)
        return metrics

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if prediction_loss_only or self.args.predict_with_generate:  # nothing but the loss is used of the forward pass
            inputs = {**inputs, "output_logits": False}
        loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if self.samples is not None and self.shows_samples and outputs is not None and labels is not None:
            self.samples.add(inputs["input_ids"], outputs, labels)
        return loss, outputs, labels


class BatchingTrainer(DurableTrainer):
    """
    A trainer that makes its training batches under `args.max_tokens_per_batch`, where that is set, and takes
    them from a stream where `train_dataset` is one.

    A subclass, because the Trainer asks no argument for a batch sampler, and Accelerate deals a stream's padded batches
    out as if they had one length. The order depends on the seed and the epoch alone, so that a resumed run goes on with
    the same batches.

    Args:
        train_collator: makes the training batches; `data_collator` makes those of evaluation, which are never packed.
        shuffle_buffer: pairs of a stream that are read ahead, to be shuffled and grouped by length.
    """

    def __init__(self, *args: Any, train_collator: Any, shuffle_buffer: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator
        self.shuffle_buffer = shuffle_buffer
        self.data_seed = self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.args.max_tokens_per_batch is None:
            sampler = super()._get_train_sampler(train_dataset)
            if isinstance(sampler, LengthGroupedSampler):
                return LengthGroups(sampler, self.data_seed, self._epoch)
            return sampler
        processes = self.args.data_processes
        sources, targets = side_lengths(self.train_dataset if train_dataset is None else train_dataset)
        batches = TokenBudgetBatches(
            sources,
            targets,
            self.args.max_tokens_per_batch,
            multiple_of=processes,
            packing=self.args.packing,
        )
        return TokenBudgetSampler(batches, self.data_seed, self._epoch, self.args.data_index, processes)

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, IterableDataset):
            evaluation_collator, self.data_collator = self.data_collator, self.train_collator
            try:
                return super().get_train_dataloader()
            finally:
                self.data_collator = evaluation_collator
        arguments = self.args
        rows = self.train_dataset.shuffle(seed=self.data_seed, buffer_size=self.shuffle_buffer)
        batches = StreamedBatches(
            split_dataset_by_node(rows, arguments.data_index, arguments.data_processes),
            self.data_seed,
            window=self.shuffle_buffer,
            batch_size=self._train_batch_size,
            max_tokens=arguments.max_tokens_per_batch,
            packing=arguments.packing,
        )
        loader = DataLoader(
            batches,
            batch_size=None,
            collate_fn=self.train_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
        )
        # Of one process, since the stream is shared out already.
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )


class LanguagesTrainer(BatchingTrainer):
    """
    A trainer whose evaluation decodes each row into its own language, the one that its labels begin with.

    A subclass, because the arguments of `generate()` are the same for all batches there.

    Args:
        argument: as `language_argument` gives it; where it is None, nothing is different.
    """

    def __init__(self, *args: Any, argument: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.argument = argument

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None, **gen_kwargs: Any
    ) -> Any:
        if self.argument is not None and self.args.predict_with_generate and not prediction_loss_only:
            begins = inputs["decoder_input_ids" if self.argument == "decoder_start_token_id" else "labels"]
            gen_kwargs = {**(gen_kwargs or self._gen_kwargs)}
            processors = gen_kwargs.get("logits_processor")
            gen_kwargs |= language_arguments(self.argument, begins[:, 0].tolist(), processors)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)


class ScheduledSamplingTrainer(LanguagesTrainer):
    """
    A trainer that tells a recurrent model the teacher forcing ratio of each optimizer step (Bengio 2015, section
    2.4), and tosses its coins from the seed, the step and the process, so that a resumed run tosses the same ones.

    A subclass, because no callback can add to the arguments of a forward pass.

    Args:
        schedule: keywords of `teacher_forcing_schedule`: `kind`, `k`, `slope`, `minimum`.
    """

    def __init__(self, *args: Any, schedule: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.schedule = schedule
        self.coins = torch.Generator()
        self.coins_step = -1

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            step = self.state.global_step
            if step != self.coins_step:  # the micro-batches of a step go on with the same generator
                self.coins.manual_seed((self.args.seed * 1_000_003 + step) * 1_009 + self.args.process_index)
                self.coins_step = step
            ratio = teacher_forcing_schedule(step, **self.schedule)
            inputs = {**inputs, "teacher_forcing_ratio": ratio, "teacher_forcing_generator": self.coins}
        return super().compute_loss(model, inputs, *args, **kwargs)
