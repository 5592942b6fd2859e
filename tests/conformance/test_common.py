"""CAStream under transformers' own tests for its models: ModelTesterMixin and ConfigTester."""

import json
import unittest
from functools import partial
from unittest.mock import patch

import pytest
import torch
from transformers import Dinov2Config, TimmBackboneConfig, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, MODEL_MAPPING_NAMES

from modeling_castream import CAStreamConfig, CAStreamForImageClassification, CAStreamModel
from tests.conformance.common_tests import import_common_tests
from tests.modeling_castream.tiny import tiny_convnext, tiny_resnet

pytestmark = pytest.mark.conformance

ModelTesterMixin = import_common_tests("test_modeling_common").ModelTesterMixin
ConfigTester = import_common_tests("test_configuration_common").ConfigTester


# Reasons that the common tests give for a skip and that say less than they could, or something else than is so here.
NO_IMPLEMENTATIONS = "the stream's attention has one formula and no implementations to choose from"
OWN_MAPS = "the maps are `attention_maps`, there whatever `output_attentions` says"
REASONS = {
    "Model architecture does not support attentions": NO_IMPLEMENTATIONS,
    "Model does not output attentions": OWN_MAPS,
    "Model does not support output_attentions": OWN_MAPS,
    "Model does not have position embeddings": "the stream has no position embeddings, and leaves a backbone's alone",
    "test_resize_embeddings is set to `False`": "a model of images has no token embeddings to resize",
    "No model with a differentiable loss was available to verify enable_input_require_grads with gradient "
    "checkpointing.": "a model of images has no input embeddings to require gradients of",
}


class CAStreamModelTester:
    """What the common tests ask of a model: a small config, inputs, and what to expect of the hidden states."""

    batch_size = 3
    is_training = True
    num_hidden_layers = 2  # depths that the stream reads, after the first
    seq_length = hidden_size = 16  # height and width of the first map that the stream reads: a quarter of the image's

    def __init__(self, backbone_config):
        self.backbone_config = backbone_config
        self.options = {"num_labels": 3}

    def get_config(self) -> CAStreamConfig:
        return CAStreamConfig(backbone_config=self.backbone_config(), **self.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[CAStreamConfig, dict]:
        return self.get_config(), {"pixel_values": torch.randn(self.batch_size, 3, 64, 64)}


class CAStreamCommonTests(ModelTesterMixin):
    all_model_classes = (CAStreamModel, CAStreamForImageClassification)
    backbone_config = None
    test_resize_embeddings = False
    has_attentions = (
        False  # the stream's maps are `attention_maps`, at hand without asking and under any implementation
    )
    test_can_init_all_missing_weights_before_2023 = True  # no date in our files: run it all the same
    _is_composite = True

    def setUp(self):
        set_seed(0)
        # The common tests look here for which models have a loss, and what labels it takes.
        mappings = (MODEL_MAPPING_NAMES, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
        for names, model_class in zip(mappings, self.all_model_classes, strict=True):
            patcher = patch.dict(names, castream=model_class.__name__)
            patcher.start()
            self.addCleanup(patcher.stop)
        self.model_tester = CAStreamModelTester(type(self).backbone_config)

    def skipTest(self, reason: str) -> None:
        super().skipTest(REASONS.get(reason, reason))

    def test_config(self):
        options = json.loads(self.model_tester.get_config().to_json_string(use_diff=False))
        tester = ConfigTester(
            self,
            config_class=CAStreamConfig,
            has_text_modality=False,
            common_properties=["num_attention_heads"],
            backbone_config=options["backbone_config"],
            num_attention_heads=2,
            variant="final",
        )
        tester.run_common_tests()

    def test_retain_grad_hidden_states_attentions(self):
        self.model_tester.options["freeze_backbone"] = False  # a frozen backbone's maps have no gradient to retain
        super().test_retain_grad_hidden_states_attentions()

    @unittest.skip("pixels go into a backbone: there are no input embeddings to get or set")
    def test_model_get_set_embeddings(self):
        pass


class ResNetTest(CAStreamCommonTests, unittest.TestCase):
    backbone_config = partial(tiny_resnet, out_features=["stage1", "stage3", "stage4"])


class ConvNextTest(CAStreamCommonTests, unittest.TestCase):
    backbone_config = partial(tiny_convnext, out_features=["stage1", "stage3", "stage4"])


class TimmTest(CAStreamCommonTests, unittest.TestCase):
    backbone_config = partial(TimmBackboneConfig, backbone="mobilenetv3_small_050", out_indices=[1, 3, 4])


class Dinov2Test(CAStreamCommonTests, unittest.TestCase):
    """A backbone with attention implementations, gradient checkpointing and drop path."""

    backbone_config = partial(
        Dinov2Config, image_size=64, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )

    @unittest.skip("feature maps are side outputs of a transformer's layers: no gradient runs from one to another")
    def test_retain_grad_hidden_states_attentions(self):
        pass
