"""The few things about training that no public hook of the stock trainer reaches."""

from typing import Any

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from dragoman.models.pipeline_dragoman import language_arguments
from dragoman.models.scheduled_sampling import teacher_forcing_schedule


class LanguagesTrainer(Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` whose evaluation decodes each row into its own language, the one that its labels begin with.

    A subclass, because the arguments of `generate()` are the same for all batches there.

    Args:
        argument: as `language_argument` gives it; None makes it the stock trainer.
    """

    args: Seq2SeqTrainingArguments

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
