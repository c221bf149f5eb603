"""Decoding that only the Transformer family has: drafts, prefixes, graphs."""

import pytest
import torch
from transformers import CompileConfig

from conftest import EOS, PAD, B, V, family, make_batch
from dragoman.models.modeling_dragoman import DragomanEncoder


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


def source_of(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, V, (B, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    ids[1, -2:], mask[1, -2:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


class Compiler:
    """A backend of `torch.compile` that counts what it is given, and runs it as it is."""

    def __init__(self):
        self.graphs = 0
        self.config = CompileConfig(backend=self.compile, fullgraph=True)
        self.config._compile_all_devices = True

    def compile(self, graph, inputs, **_):
        self.graphs += 1
        return graph.forward

    def __deepcopy__(self, memo):
        return self


STATIC = {"cache_implementation": "static", "max_new_tokens": 6}


@pytest.mark.parametrize("name", ["modern", "relative"])
def test_compiled_once_for_sources_of_many_lengths(name):
    torch.compiler.reset()
    model, compiler = family(name).build(eos_token_id=None), Compiler()
    for length in (5, 32, 7):
        source = source_of(length)
        expected = model.generate(**source, max_new_tokens=6)
        assert torch.equal(model.generate(**source, **STATIC, compile_config=compiler.config), expected)
        torch.manual_seed(0)
        sampled = model.generate(**source, **STATIC, compile_config=compiler.config, do_sample=True)
        torch.manual_seed(0)
        assert torch.equal(sampled, model.generate(**source, max_new_tokens=6, do_sample=True))
    assert compiler.graphs == 1
    longer = source_of(33)
    found = model.generate(**longer, **STATIC, compile_config=compiler.config)
    assert torch.equal(found, model.generate(**longer, max_new_tokens=6))
    assert compiler.graphs == 2


def test_sources_beside_a_static_cache_are_lengthened_within_reason(monkeypatch):
    """To powers of two, but not beyond learned positions; embeddings too; nothing else is touched."""
    lengths = []
    inner = DragomanEncoder.forward

    def spy(self, *args, **kwargs):
        lengths.append(args[0].shape[1] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds")).shape[1])
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(DragomanEncoder, "forward", spy)
    for name, expected in (("modern", [32, 32, 64]), ("learned", [29, 29, 29])):
        model = family(name).build(eos_token_id=None)
        for length in (3, 28, 33 if name == "modern" else 29):
            source = source_of(length)
            assert torch.equal(model.generate(**source, **STATIC), model.generate(**source, max_new_tokens=6))
        assert lengths[::2] == expected
        assert lengths[1:4:2] == [3, 28]
        lengths.clear()
    embeds = model.get_input_embeddings()(source_of(5)["input_ids"])
    mask = source_of(5)["attention_mask"]
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, **STATIC)
    assert torch.equal(found, model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6))
    assert lengths == [29, 5]
