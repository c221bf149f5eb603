"""The few things about training that no public hook of the stock trainer reaches."""

from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler
from transformers import Seq2SeqTrainer

from dragoman.data.batching import TokenBudgetBatches
from dragoman.models.pipeline_dragoman import language_arguments
from dragoman.models.scheduled_sampling import teacher_forcing_schedule
from dragoman.training.arguments import TrainingArguments
from dragoman.training.batches import StreamedBatches, TokenBudgetSampler, side_lengths


class BatchingTrainer(Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` that makes its training batches under `args.max_tokens_per_batch`, where that is set, and takes
    them from a stream where `train_dataset` is one.

    A subclass, because the Trainer asks no argument for a batch sampler, and Accelerate deals a stream's padded batches
    out as if they had one length. The order depends on the seed and the epoch alone, so that a resumed run goes on with
    the same batches.

    Args:
        train_collator: makes the training batches; `data_collator` makes those of evaluation, which are never packed.
        shuffle_buffer: pairs of a stream that are read ahead, to be shuffled and grouped by length.
    """

    args: TrainingArguments

    def __init__(self, *args: Any, train_collator: Any, shuffle_buffer: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator
        self.shuffle_buffer = shuffle_buffer
        self.data_seed = self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.args.max_tokens_per_batch is None:
            return super()._get_train_sampler(train_dataset)
        processes = self.args.world_size
        sources, targets = side_lengths(self.train_dataset if train_dataset is None else train_dataset)
        batches = TokenBudgetBatches(
            sources,
            targets,
            self.args.max_tokens_per_batch,
            multiple_of=processes,
            packing=self.args.packing,
        )
        return TokenBudgetSampler(
            batches, self.data_seed, lambda: int(self.state.epoch or 0), self.args.process_index, processes
        )

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
            split_dataset_by_node(rows, arguments.process_index, arguments.world_size),
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
            gen_kwargs = {
                **(gen_kwargs or self._gen_kwargs),
                **language_arguments(self.argument, begins[:, 0].tolist()),
            }
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
