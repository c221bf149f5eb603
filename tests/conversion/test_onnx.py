"""ONNX graphs and the search over them, against PyTorch: the same logits, the same tokens, and no PyTorch needed."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from conftest import BOS, EOS, FAMILIES, PAD, V, family, make_batch
from dragoman.models.modeling_dragoman_rnn import run_layers


pytest.importorskip("onnxscript", reason="needs the extra [export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
from dragoman.conversion import onnx_rnn  # noqa: E402
from dragoman.conversion.onnx import export_graph, inexpressible, settings_of, write  # noqa: E402
from dragoman.conversion.onnx_generate import OnnxModel  # noqa: E402
from dragoman.conversion.saved_settings import saved_settings  # noqa: E402


# An export takes seconds. In one model: grouped queries, norms of theirs, rotary positions, biases, two vocabularies.
# In the other: layers that are read one by one, both directions, an input for the place.
KINDS = {
    "modern": {
        "encoder_layers": 1, "qk_norm": True, "attention_bias": True, "lm_head_bias": True, "logit_scale": 0.9,
        "source_vocab_size": 31, "share_embeddings": False, "attention_direction": "unidirectional",
    },
    "edm": {"encoder_layers": 1, "decoder_layers": 1, "lm_head_bias": True},
}  # fmt: skip
RECURRENT = [one for one in FAMILIES if not one.is_transformer]


def ending(of_family, **changes):
    """A model in single precision that ends some of its outputs, with biases that are not zero."""
    model = of_family.build(dtype=torch.float32, **changes)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = [EOS, int(model.generate(make_batch()["input_ids"], num_beams=3)[0, 3])]
    return model


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """A model in PyTorch, and its export."""
    model = ending(family(request.param), **KINDS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    assert write(folder, model, None, "float32") == {}
    return model, OnnxModel(folder, threads=1), folder


def arrays(batch):
    return {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_new_tokens": 3},
        {"num_beams": 5},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.6, "early_stopping": True},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    ],
    ids=["greedy", "short", "beam", "n-best", "never"],
)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_same_tokens(both, settings, rows):
    model, exported, _ = both
    batch = make_batch(rows=rows)
    expected = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
    assert exported.generate(**arrays(batch), **settings).tolist() == expected.tolist()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_sources_padded_on_the_left(both, num_beams):
    model, exported, _ = both
    batch = make_batch(rows=5, padding_side="left")
    expected = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=num_beams)
    assert exported.generate(**arrays(batch), num_beams=num_beams).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "saved",
    [
        {"num_beams": 3, "length_penalty": 0.2, "early_stopping": True},
        {"forced_bos_token_id": 7},
        {"forced_bos_token_id": 7, "num_beams": 3},
        {"num_beams": 3, "max_length": 6, "forced_eos_token_id": EOS},
        {"num_beams": 2, "suppress_tokens": [8, 9], "bad_words_ids": [[10], [EOS]], "renormalize_logits": True},
    ],
    ids=lambda saved: "-".join(saved),
)
def test_settings_saved_with_the_model_are_the_defaults(both, saved, monkeypatch):
    model, exported, _ = both
    batch = make_batch(rows=5)
    config = copy.deepcopy(model.generation_config)
    vars(config).update(saved)
    monkeypatch.setattr(model, "generation_config", config)
    monkeypatch.setattr(exported, "settings", settings_of(model))
    expected = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert exported.generate(**arrays(batch)).tolist() == expected.tolist()
    assert saved_settings(model).keys() == saved.keys() - {"max_length"}


def test_a_prompt_is_continued(both):
    model, exported, _ = both
    batch = make_batch()
    prompt = torch.tensor([[BOS, 5, 7, 4]] * 3)
    expected = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=prompt, num_beams=3,
        max_new_tokens=5,
    )  # fmt: skip
    for given in (prompt, prompt[:, 1:]):  # a missing start token is put before it
        found = exported.generate(**arrays(batch), decoder_input_ids=given.numpy(), num_beams=3, max_new_tokens=5)
        assert found.tolist() == expected.tolist()


def test_a_prompt_counts_in_the_saved_length(both, monkeypatch):
    model, exported, _ = both
    batch, prompt = make_batch(), torch.tensor([[BOS, 5, 7, 4]] * 3)
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.max_new_tokens, config.eos_token_id = 6, None, None
    monkeypatch.setattr(model, "generation_config", config)
    monkeypatch.setattr(exported, "settings", {**settings_of(model), "eos_token_id": []})
    expected = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=prompt, eos_token_id=None
    )
    assert expected.shape[1] == 6
    assert exported.generate(**arrays(batch), decoder_input_ids=prompt.numpy()).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="decoder_input_ids have 8 tokens, and the model was saved with max_length=6"):
        exported.generate(**arrays(batch), decoder_input_ids=prompt.repeat(1, 2).numpy())


@pytest.mark.parametrize("both", ["modern"], indirect=True)
def test_the_same_logits(both):
    """Of sizes that the graphs have not seen before: prefill, and steps with two rows for each source."""
    model, exported, _ = both
    batch = make_batch(rows=5)
    target = torch.randint(3, V, (10, 6), generator=torch.Generator().manual_seed(2))
    target[1::2, :2] = target[::2, :2]
    expected = model(
        batch["input_ids"].repeat_interleave(2, dim=0),
        attention_mask=batch["attention_mask"].repeat_interleave(2, dim=0),
        decoder_input_ids=target,
    ).logits.unflatten(0, (5, 2))
    source = arrays(batch)
    (states,) = exported.graphs["encoder"].run(None, source)
    np.testing.assert_allclose(
        states[source["attention_mask"] == 1],
        model.get_encoder()(batch["input_ids"], batch["attention_mask"]).last_hidden_state.detach()[
            batch["attention_mask"].bool()
        ],
        atol=1e-4,
    )
    mask = {"attention_mask": source["attention_mask"]}
    inputs = {"decoder_input_ids": target[::2, :2].numpy(), "encoder_states": states, **mask}
    logits, *past = exported.graphs["decoder_prefill"].run(None, inputs)
    np.testing.assert_allclose(logits, expected[:, 0, 1].detach(), atol=1e-4)
    past, cross = [part[:, :, None].repeat(2, axis=2) for part in past[:2]], past[2:]
    for place in range(2, 6):
        tokens = {"decoder_input_ids": target[:, place].view(5, 2).numpy(), **mask}
        tokens |= dict(zip(("self_keys", "self_values", "cross_keys", "cross_values"), (*past, *cross), strict=True))
        logits, *past = exported.graphs["decoder_step"].run(None, tokens)
        np.testing.assert_allclose(logits, expected[:, :, place].detach(), atol=1e-4)


def test_it_runs_without_pytorch(both):
    _, exported, folder = both
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from onnx_generate import OnnxModel\n"
        "print(OnnxModel(sys.argv[1]).generate([[5, 6, 7, 2], [8, 9, 2, 1]], [[1, 1, 1, 1], [1, 1, 1, 0]]).tolist())\n"
        "assert not {'torch', 'transformers', 'dragoman'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    expected = exported.generate([[5, 6, 7, 2], [8, 9, 2, PAD]], [[1, 1, 1, 1], [1, 1, 1, 0]])
    assert done.stdout == f"{expected.tolist()}\n"


@pytest.mark.parametrize("both", ["modern"], indirect=True)
def test_refusals(both):
    _, exported, _ = both
    with pytest.raises(ValueError, match="num_return_sequences=3 needs as many num_beams, got 2"):
        exported.generate([[5, 2]], num_beams=2, num_return_sequences=3)
    rotary = family("modern").config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    (only,) = inexpressible(rotary)
    assert only.startswith("rope_parameters={")
    assert [one.name for one in RECURRENT if inexpressible(one.config())] == []
    assert inexpressible(family("relative").config()) == []


# ---------------------------------------------------------------- the recurrent family, without an export for each kind


class Cells(torch.nn.Module):
    """One of each, read with different lengths."""

    def __init__(self, rnns):
        super().__init__()
        self.rnns = torch.nn.ModuleList(rnns)

    def forward(self, inputs, lengths):
        found = []
        for rnn in self.rnns:
            outputs, ended = rnn(inputs, None, lengths)
            found += [*outputs, *(ended if isinstance(ended, tuple) else (ended,))]
        return tuple(found)


def test_cells_are_torchs(tmp_path):
    """Both directions, two layers, rows of different lengths."""
    torch.manual_seed(0)
    rnns = [family("edm").build(dtype=torch.float32, cell=cell).model.encoder.rnn for cell in onnx_rnn.CELLS]
    for rnn in rnns:
        for weight in rnn.parameters():
            weight.data = torch.randn_like(weight)
    inputs, lengths = torch.randn(4, 6, 9), torch.tensor([6, 1, 3, 6])
    expected = []
    for rnn in rnns:
        packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        layers, ended = run_layers(rnn, packed)
        expected += [pad_packed_sequence(one, batch_first=True)[0] for one in layers] + list(ended)
    copies = [onnx_rnn.with_onnx_cells(rnn, cell) for rnn, cell in zip(rnns, onnx_rnn.CELLS, strict=True)]
    sample = {"inputs": (inputs[:3, :4], (0, 1)), "lengths": (lengths[:3].to(torch.int32), (0,))}
    export_graph(tmp_path / "cells.onnx", Cells(copies), sample, [f"output_{place}" for place in range(len(expected))])
    session = onnxruntime.InferenceSession(tmp_path / "cells.onnx")
    found = session.run(None, {"inputs": inputs.numpy(), "lengths": lengths.numpy().astype(np.int32)})
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.detach(), atol=1e-5)


class TorchSession:
    """A graph as onnxruntime has it, computed by PyTorch."""

    def __init__(self, module, inputs, outputs):
        self.module, self.inputs, self.outputs = module, inputs, outputs

    def get_inputs(self):
        return [SimpleNamespace(name=name) for name, (sample, _) in self.inputs.items() if sample is not None]

    def get_outputs(self):
        return [SimpleNamespace(name=name) for name in self.outputs]

    @torch.no_grad()
    def run(self, outputs, values):
        values = {name: torch.from_numpy(value) for name, value in values.items()}
        return [one.numpy() for one in self.module(*(values.get(name) for name in self.inputs))]


@pytest.mark.parametrize("of_family", RECURRENT, ids=lambda one: one.name)
def test_every_attention_gives_the_same_tokens(of_family, monkeypatch):
    """What the graphs are made from, with torch in place of ONNX's cells, against the model."""

    def by_torch(rnn, inputs, state, lengths=None):
        if lengths is None:
            return super(onnx_rnn.OnnxCell, rnn).forward(inputs, state)
        packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        plain = copy.copy(rnn)
        plain.__class__ = type(rnn).__mro__[2]
        layers, ended = run_layers(plain, packed)
        layers = [pad_packed_sequence(one, batch_first=True, total_length=inputs.shape[1])[0] for one in layers]
        return layers, ended if len(ended) > 1 else ended[0]

    monkeypatch.setattr(onnx_rnn.OnnxCell, "forward", by_torch)
    model, batch = ending(of_family), make_batch(rows=5)
    exported = OnnxModel.__new__(OnnxModel)
    exported.settings = settings_of(model)
    exported.graphs = {name: TorchSession(*graph) for name, graph in onnx_rnn.graphs(model).items()}
    prompt = torch.tensor([[BOS, 5, 7]] * 5)
    source = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}  # padded on the left
    for settings in ({}, {"num_beams": 4, "num_return_sequences": 3}, {"num_beams": 3, "decoder_input_ids": prompt}):
        expected = model.generate(**source, **settings, max_length=9)
        start = settings.get("decoder_input_ids", prompt[:, :1])
        found = exported.generate(
            **{name: value.numpy() for name, value in source.items()},
            **{**settings, "decoder_input_ids": start.numpy()},
            max_new_tokens=9 - start.shape[1],
        )
        assert found.tolist() == expected.tolist()
