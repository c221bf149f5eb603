"""Decoding that only the Transformer family has, or that looks at its inputs from another side: drafts and prefixes."""

import pytest
import torch

from conftest import EOS, V, make_batch


@pytest.fixture
def sentence():
    """One source, since drafts are for one at a time."""
    batch = make_batch(rows=1)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@pytest.mark.parametrize("same", [True, False], ids=["itself", "smaller"])
def test_a_draft_model_changes_no_output(any_transformer, sentence, same):
    """Assisted decoding (Leviathan 2023): another model proposes tokens, this one keeps those it would have chosen."""
    model = any_transformer.build()
    assistant = any_transformer.build() if same else any_transformer.build(seed=1, decoder_layers=1, encoder_layers=1)
    alone = model.generate(**sentence, max_length=17)
    assisted = model.generate(**sentence, max_length=17, assistant_model=assistant)
    assert torch.equal(assisted, alone)


def test_drafts_copied_from_the_source_change_no_output(any_transformer, sentence):
    """Prompt lookup: n-grams of the source are proposed."""
    model = any_transformer.build()
    alone = model.generate(**sentence, max_length=17)
    assert torch.equal(model.generate(**sentence, max_length=17, prompt_lookup_num_tokens=3), alone)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True}, {"penalty_alpha": 0.6, "top_k": 4}],
    ids=["greedy", "beam", "sampling", "contrastive"],
)
def test_only_allowed_tokens_are_produced(any_transformer, batch, settings):
    """A rule of each source: an id may be followed by the next even or odd ones only, or by the end."""
    model = any_transformer.build()

    def allowed(row: int, target: torch.Tensor) -> list[int]:
        return [EOS, *range(4 + row % 2, V, 2)] if len(target) > 1 else [4 + row % 2, 8 + row % 2]

    torch.manual_seed(0)
    source = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    outputs = model.generate(**source, prefix_allowed_tokens_fn=allowed, **settings)
    returned = settings.get("num_return_sequences", 1)
    for number, sequence in enumerate(outputs):
        row, length = number // returned, 1
        while length < len(sequence) and sequence[length - 1] != EOS:
            assert sequence[length] in allowed(row, sequence[:length])
            length += 1
    free = model.generate(**source, **settings)
    assert free.shape != outputs.shape or not torch.equal(free, outputs)


def test_a_prefix_that_allows_one_token_at_a_time_dictates_the_output(any_transformer, batch):
    model = any_transformer.build()
    dictated = [[0, 5, 9, EOS], [0, 7, EOS, 1], [0, 8, 6, EOS]]
    found = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=3,
        prefix_allowed_tokens_fn=lambda row, target: [dictated[row][len(target)]],
    )  # fmt: skip
    assert found.tolist() == dictated
