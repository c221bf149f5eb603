"""ONNX graphs and the search over them, against PyTorch: the same logits, the same tokens, and no PyTorch needed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import BOS, EOS, PAD, V, family, make_batch


pytest.importorskip("onnxscript", reason="needs the extra [export]")
pytest.importorskip("onnxruntime", reason="needs the extra [export]")
from dragoman.conversion.onnx import inexpressible, write
from dragoman.conversion.onnx_generate import OnnxModel


# An export takes seconds. In one model: grouped queries, norms of theirs, rotary positions, biases, two vocabularies.
KINDS = {
    "modern": {
        "encoder_layers": 1, "qk_norm": True, "attention_bias": True, "lm_head_bias": True, "logit_scale": 0.9,
        "source_vocab_size": 31, "share_embeddings": False, "attention_direction": "unidirectional",
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """A model in PyTorch that ends some of its outputs, and its export."""
    model = family(request.param).build(dtype=torch.float32, **KINDS[request.param])
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    batch = make_batch()
    model.generation_config.eos_token_id = [EOS, int(model.generate(batch["input_ids"], num_beams=3)[0, 3])]
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, model, None, "float32")
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


def test_a_prompt_is_continued(both):
    model, exported, _ = both
    batch = make_batch()
    prompt = torch.tensor([[BOS, 5, 7, 4]] * 3)
    expected = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=prompt, num_beams=3,
        max_new_tokens=5,
    )  # fmt: skip
    found = exported.generate(**arrays(batch), decoder_input_ids=prompt.numpy(), num_beams=3, max_new_tokens=5)
    assert found.tolist() == expected.tolist()


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
    (states,) = exported.encoder.run(None, source)
    np.testing.assert_allclose(
        states[source["attention_mask"] == 1],
        model.get_encoder()(batch["input_ids"], batch["attention_mask"]).last_hidden_state.detach()[
            batch["attention_mask"].bool()
        ],
        atol=1e-4,
    )
    mask = {"attention_mask": source["attention_mask"]}
    inputs = {"decoder_input_ids": target[::2, :2].numpy(), "encoder_states": states, **mask}
    logits, *past = exported.prefill.run(None, inputs)
    np.testing.assert_allclose(logits, expected[:, 0, 1].detach(), atol=1e-4)
    past, cross = [part[:, :, None].repeat(2, axis=2) for part in past[:2]], past[2:]
    for place in range(2, 6):
        tokens = {"decoder_input_ids": target[:, place].view(5, 2).numpy(), **mask}
        tokens |= dict(zip(("self_keys", "self_values", "cross_keys", "cross_values"), (*past, *cross), strict=True))
        logits, *past = exported.step.run(None, tokens)
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


def test_refusals(both):
    _, exported, _ = both
    with pytest.raises(ValueError, match="num_return_sequences=3 needs as many num_beams, got 2"):
        exported.generate([[5, 2]], num_beams=2, num_return_sequences=3)
    rotary = family("modern").config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    (only,) = inexpressible(rotary)
    assert only.startswith("rope_parameters={")
    assert inexpressible(family("relative").config()) == []
