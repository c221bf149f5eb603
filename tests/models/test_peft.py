"""LoRA through PEFT, and the other ways in which people load what they fine-tune."""

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSeq2SeqLM

from conftest import FAMILIES, Family


# What torch's fused recurrent layers hold are no linear layers, so these families lend PEFT what stands around them.
LINEAR = {
    True: ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    False: ["q_proj", "k_proj", "v_proj", "combine", "projections.h.0", "projections.h.1"],
}
HAVE_LINEAR_PARTS = [one for one in FAMILIES if one.is_transformer or one.name in ("bahdanau", "luong", "general")]


@pytest.fixture(params=HAVE_LINEAR_PARTS, ids=lambda one: one.name)
def lora_family(request) -> Family:
    return request.param


def lora(model, **settings):
    torch.manual_seed(4)
    return get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=3, lora_alpha=6, **settings))


def train(model, batch, steps: int = 6) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.03)
    losses = []
    for _ in range(steps):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def translations(model, batch) -> list[torch.Tensor]:
    source = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    strategies = ({"num_beams": 1}, {"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 4})
    return [model.generate(**source, **strategy) for strategy in strategies]


def assert_same(model, other, batch):
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, other(**batch).logits, rtol=0, atol=1e-9)
    for ours, theirs in zip(translations(model, batch), translations(other, batch), strict=True):
        assert torch.equal(ours, theirs)


def test_lora_trains_saves_and_merges(lora_family, batch, tmp_path):
    model = lora_family.build()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "base")
    adapted = lora(model, target_modules=LINEAR[lora_family.is_transformer])
    losses = train(adapted, batch)
    assert losses[-1] < losses[0]
    for name, parameter in adapted.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])
        elif "lora_B" in name:  # begins at zero
            assert parameter.abs().max() > 0, name

    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same(again, adapted, batch)

    merged = again.merge_and_unload()
    assert not torch.equal(merged(**batch).logits, lora_family.build()(**batch).logits)
    assert_same(merged, adapted, batch)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert_same(loaded, merged, batch)
    assert (loaded.lm_head.weight is loaded.get_decoder().embed_tokens.weight) == loaded.config.tie_lm_head


def test_lora_on_the_head(any_transformer, batch, tmp_path):
    """PEFT would merge an adapter of a tied table once for each of its names, so it advises to load it untied."""
    any_transformer.build().save_pretrained(tmp_path / "tied")
    tied = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "tied")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "tied", tie_word_embeddings=False)
    model.get_decoder().embed_tokens.weight.data = tied.get_decoder().embed_tokens.weight.data.clone()
    model.lm_head.weight.data = tied.lm_head.weight.data.clone()
    assert_same(model, tied, batch)

    adapted = lora(model, target_modules=["q_proj", "lm_head"])
    losses = train(adapted, batch)
    assert losses[-1] < losses[0]
    expected = adapted(**batch).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-9)
    assert torch.equal(merged.get_encoder().embed_tokens.weight, tied.get_encoder().embed_tokens.weight)
    merged.save_pretrained(tmp_path / "merged")
    assert_same(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged"), merged, batch)


def test_all_linear_layers(any_family, batch):
    """PEFT's own way to say so leaves the output layer out."""
    model = any_family.build()
    adapted = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    if not adapted:
        pytest.skip("this family has no linear layers but the output layer")
    wrapped = lora(model, target_modules="all-linear")
    assert {
        name.removesuffix(".lora_A") for name, _ in wrapped.get_base_model().named_modules() if name.endswith("lora_A")
    } == adapted
    losses = train(wrapped, batch)
    assert losses[-1] < losses[0]


def test_device_map_auto(any_family, batch, tmp_path):
    model = any_family.build()
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForSeq2SeqLM.from_pretrained(tmp_path, device_map="auto"), model, batch)


def test_layers_on_the_disk(any_transformer, batch, tmp_path):
    model = any_transformer.build()
    model.save_pretrained(tmp_path / "model")
    parts = [name for name, _ in model.get_decoder().named_children() if name != "layers"]
    device_map = {"model.encoder": "cpu", "model.decoder.layers": "disk", "lm_head": "cpu"}
    device_map |= {f"model.decoder.{name}": "cpu" for name in parts}
    placed = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    assert {parameter.device.type for parameter in placed.get_decoder().layers.parameters()} == {"meta"}
    assert_same(placed, model, batch)


def test_bfloat16(any_family, batch, tmp_path):
    model = any_family.build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    half = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    loss = half(**batch).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**batch).loss, rtol=0.05, atol=0.05)
    loss.backward()
    for output in translations(half, batch):
        assert output.shape[0] == len(batch["input_ids"])
