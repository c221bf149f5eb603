"""The classes of both families under every suite that fits them. `scripts/conformance.py` runs all of this."""

import random
import unittest
from typing import Unpack
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSeq2SeqLM
from transformers.distributed import DistributedConfig
from transformers.utils import TransformersKwargs

from conformance.suite import test_fsdp_mixin, test_modeling_common
from conformance.suite.test_configuration_common import ConfigTester
from conformance.suite.test_fsdp_mixin import FSDPTesterMixin
from conformance.suite.test_modeling_common import GenerationTesterMixin, ModelTesterMixin
from conformance.suite.test_tensor_parallel_mixin import TensorParallelTesterMixin
from conformance.suite.test_training_mixin import TrainingTesterMixin
from dragoman import (
    DragomanConfig,
    DragomanEncoderModel,
    DragomanForConditionalGeneration,
    DragomanModel,
    DragomanRnnConfig,
    DragomanRnnForConditionalGeneration,
    DragomanRnnModel,
)


class Setup:
    """Where the suite gets configurations and inputs. It compares sizes by these names, and wants both sides alike."""

    batch_size = 13  # the suite fills smaller batches up with random rows
    seq_length = 7
    vocab_size = 99  # odd, so that two processes get unequal parts
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, config_class: type, conditional_generation_class: type, settings: dict):
        self.config_class = config_class
        self.conditional_generation_class = conditional_generation_class
        self.settings = settings

    def get_config(self):
        return self.config_class(**self.settings)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        config = self.get_config()
        inputs = {
            "input_ids": test_modeling_common.ids_tensor(shape, self.vocab_size),
            "attention_mask": test_modeling_common.random_attention_mask(shape),
        }
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = test_modeling_common.ids_tensor(shape, self.vocab_size)
        return config, inputs

    def with_settings(self, **settings):
        return Setup(self.config_class, self.conditional_generation_class, {**self.settings, **settings})


TRANSFORMER = Setup(
    DragomanConfig,
    DragomanForConditionalGeneration,
    {
        "vocab_size": Setup.vocab_size,
        "d_model": Setup.hidden_size,
        "encoder_layers": Setup.num_hidden_layers,
        "decoder_layers": Setup.num_hidden_layers,
        "encoder_attention_heads": Setup.num_attention_heads,
        "decoder_attention_heads": Setup.num_attention_heads,
        "encoder_num_key_value_heads": 2,
        "decoder_num_key_value_heads": 2,
        "encoder_ffn_dim": 38,
        "decoder_ffn_dim": 42,
        "max_position_embeddings": 128,
        "dropout": 0.0,
    },
)
RNN = Setup(
    DragomanRnnConfig,
    DragomanRnnForConditionalGeneration,
    {
        "vocab_size": Setup.vocab_size,
        "embedding_dim": Setup.hidden_size,
        "hidden_size": Setup.hidden_size,
        "encoder_layers": Setup.num_hidden_layers,
        "decoder_layers": Setup.num_hidden_layers,
        "dropout": 0.0,
    },
)


# The suite reads there which outputs can be asked for.
for model_class in (DragomanModel, DragomanForConditionalGeneration, DragomanEncoderModel):
    model_class.forward.__annotations__["kwargs"] = Unpack[TransformersKwargs]


class Transformer:
    model_tester = TRANSFORMER
    is_encoder_decoder = True


class Rnn:
    model_tester = RNN
    is_encoder_decoder = True
    has_attentions = False  # of the layers' own; attention to the source is tested in tests/models


class ModelTests(ModelTesterMixin):
    # The suite leaves this test out for models without a year in their copyright notice.
    test_can_init_all_missing_weights_before_2023 = True

    def with_the_plans_of_the_classes(self, test):
        """The suite looks for a tensor-parallel plan in the configuration; ours belong to the classes."""
        if not any(model_class(self.model_tester.get_config()).tp_plan for model_class in self.all_model_classes):
            self.skipTest("torch's fused recurrent layers cannot be split between processes")
        with mock.patch.object(self.model_tester.config_class, "base_model_tp_plan", {}):
            test()

    def test_tp_plan_matches_params(self):
        self.with_the_plans_of_the_classes(super().test_tp_plan_matches_params)

    def test_tied_head_has_a_tp_plan_entry(self):
        self.with_the_plans_of_the_classes(super().test_tied_head_has_a_tp_plan_entry)

    def test_model_rope_scaling_from_config_0_linear(self):
        self.with_one_configuration(super().test_model_rope_scaling_from_config_0_linear)

    def test_model_rope_scaling_from_config_1_dynamic(self):
        self.with_one_configuration(super().test_model_rope_scaling_from_config_1_dynamic)

    def test_model_rope_scaling_from_config_2_yarn(self):
        self.with_one_configuration(super().test_model_rope_scaling_from_config_2_yarn)

    def with_one_configuration(self, test):
        """The suite changes what `get_text_config` returns, which for a flat configuration of two sides is a copy."""
        settings = self.model_tester.settings
        if self.model_tester.config_class is DragomanRnnConfig or "position_embedding_type" in settings:
            self.skipTest("no rotary positions")
        with mock.patch.object(self.model_tester.config_class, "get_text_config", lambda config, **sides: config):
            test()


class TestDragomanModel(Transformer, ModelTests, unittest.TestCase):
    all_model_classes = (DragomanModel,)


class TestDragomanForConditionalGeneration(Transformer, ModelTests, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (DragomanForConditionalGeneration,)


class TestDragomanEncoderModel(Transformer, ModelTests, unittest.TestCase):
    all_model_classes = (DragomanEncoderModel,)
    model_tester = TRANSFORMER.with_settings(is_encoder_decoder=False)
    is_encoder_decoder = False


class TestDragomanRnnModel(Rnn, ModelTests, unittest.TestCase):
    all_model_classes = (DragomanRnnModel,)


class TestDragomanRnnForConditionalGeneration(Rnn, ModelTests, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (DragomanRnnForConditionalGeneration,)


# The classes above have the default recipe; these have others that take different paths. All share one vocabulary and
# one table, since the suite feeds the same ids and embeddings to both sides.
CLASSIC = {
    "norm_type": "layernorm",
    "norm_position": "post",
    "embedding_norm": True,
    "final_norm": False,
    "activation_function": "gelu",
    "gated_mlp": False,
    "attention_bias": True,
    "mlp_bias": True,
    "position_embedding_type": "learned",
    "scale_embedding": True,
    "tie_lm_head": False,
    "lm_head_bias": True,
}
RELATIVE = {
    "position_embedding_type": "relative",
    "attention_scaling": 1.0,
    "logit_scale": Setup.hidden_size**-0.5,
    "qk_norm": True,
}
CONTEXT = {"attention": "context_as_state", "cell": "gru", "bidirectional_encoder": False}
FEEDING = {"attention": "additive", "input_feeding": True, "tie_lm_head": False}


class TestDragomanModelClassic(TestDragomanModel):
    model_tester = TRANSFORMER.with_settings(**CLASSIC)


class TestDragomanForConditionalGenerationClassic(TestDragomanForConditionalGeneration):
    model_tester = TRANSFORMER.with_settings(**CLASSIC)


class TestDragomanForConditionalGenerationRelative(TestDragomanForConditionalGeneration):
    model_tester = TRANSFORMER.with_settings(**RELATIVE)


class TestDragomanEncoderModelRelative(TestDragomanEncoderModel):
    model_tester = TRANSFORMER.with_settings(**RELATIVE, is_encoder_decoder=False)


class TestDragomanRnnForConditionalGenerationContext(TestDragomanRnnForConditionalGeneration):
    model_tester = RNN.with_settings(**CONTEXT)


class TestDragomanRnnForConditionalGenerationFeeding(TestDragomanRnnForConditionalGeneration):
    model_tester = RNN.with_settings(**FEEDING)


class ConfigTests:
    common_properties: list[str] | None = None

    def test_config(self):
        tester = self.model_tester
        ConfigTester(
            self, tester.config_class, common_properties=self.common_properties, **tester.settings
        ).run_common_tests()


class TestDragomanConfig(Transformer, ConfigTests, unittest.TestCase):
    pass


class TestDragomanRnnConfig(Rnn, ConfigTests, unittest.TestCase):
    common_properties = ["hidden_size", "num_hidden_layers"]


class TrainingTests(TrainingTesterMixin):
    """A model learns a pattern by heart and repeats it."""

    def _get_trainable_model_class(self):
        """The suite continues the first token of the pattern; an encoder-decoder gets the pattern as its source."""
        tests = self

        class Learner(self.model_tester.conditional_generation_class):
            def generate(self, prompt, max_new_tokens, **kwargs):
                length = prompt.shape[1] + max_new_tokens
                source = tests._create_text_training_batch(1, length, self.config.vocab_size)["input_ids"]
                mask = torch.ones_like(source)  # the pad token is a part of the pattern
                output = super().generate(source, attention_mask=mask, max_new_tokens=length, **kwargs)
                return output[:, 1:]

        return Learner


class TestTrainingOfDragoman(Transformer, TrainingTests, unittest.TestCase):
    pass


class TestTrainingOfDragomanRnn(Rnn, TrainingTests, unittest.TestCase):
    training_overfit_learning_rate = 3e-3


class TestTensorParallelDragoman(Transformer, TensorParallelTesterMixin, unittest.TestCase):
    all_model_classes = (DragomanModel, DragomanForConditionalGeneration)

    def _has_tp_plan(self):
        return True


class TestTensorParallelDragomanClassic(TestTensorParallelDragoman):
    model_tester = TRANSFORMER.with_settings(**CLASSIC)


class TestTensorParallelDragomanRelative(TestTensorParallelDragoman):
    model_tester = TRANSFORMER.with_settings(**RELATIVE)


class FsdpTests(FSDPTesterMixin):
    def test_fsdp2_generation(self):
        """The suite trains only."""
        self._run_fsdp2_distributed_test("test_fsdp2_generation", generate_as_one_process_does)


def generate_as_one_process_does(rank: int, config_class, settings: dict):
    config = config_class.from_dict(settings)
    source = test_modeling_common.ids_tensor((3, 7), config.vocab_size, rng=random.Random(rank))
    with test_fsdp_mixin._deterministic_init_model_dir(rank, config, torch.float64) as folder:
        whole = AutoModelForSeq2SeqLM.from_pretrained(folder)
        sharded = AutoModelForSeq2SeqLM.from_pretrained(
            folder, distributed_config=DistributedConfig(fsdp_size=dist.get_world_size())
        )
        dist.barrier()  # the first process takes the folder away
    assert any(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    # generate() calls the encoder by itself; FSDP wants to know where a model is entered.
    register_fsdp_forward_method(sharded, "generate")
    for strategy in ({"num_beams": 1}, {"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 4}):
        expected = whole.generate(source, max_new_tokens=9, **strategy)
        assert torch.equal(sharded.generate(source, max_new_tokens=9, **strategy), expected), strategy


class TestFsdpOfDragoman(Transformer, FsdpTests, unittest.TestCase):
    pass


class TestFsdpOfDragomanRnn(Rnn, FsdpTests, unittest.TestCase):
    def _get_tiny_config(self):
        config_class, settings = super()._get_tiny_config()
        return config_class, {**settings, "embedding_dim": settings["hidden_size"]}
