"""Tiny models of images and sound: every parameter against the loss transformers itself computes, one by one."""

import pytest
import torch
import transformers as tf
from exactness import assert_same, own_loss_loop
from models import full_precision, one_thread  # noqa: F401

from sparseft import testing
from sparseft.fisher import estimate_fisher

N, CLASSES = 5, 3
_TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def _resnet():
    return tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=CLASSES)
    )


def _bottlenecks():
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=CLASSES)
    return tf.ResNetForImageClassification(config)


def _vit(**options):
    return tf.ViTForImageClassification(
        tf.ViTConfig(**_TRANSFORMER, image_size=24, patch_size=8, num_labels=CLASSES, **options)
    )


def _convnext():
    return tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=CLASSES)
    )


def _mobilenet():
    return tf.MobileNetV2ForImageClassification(
        tf.MobileNetV2Config(depth_multiplier=0.1, image_size=24, num_labels=CLASSES)
    )


def _wav2vec2():
    return tf.Wav2Vec2ForSequenceClassification(
        tf.Wav2Vec2Config(
            **_TRANSFORMER,
            conv_dim=(8, 12),
            conv_kernel=(5, 3),
            conv_stride=(3, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
            num_labels=CLASSES,
        )
    )


MODELS = {
    "resnet": _resnet,
    "resnet of bottlenecks": _bottlenecks,
    "vit": _vit,
    "vit, eager": lambda: _vit(attn_implementation="eager"),
    "convnext": _convnext,
    "mobilenet": _mobilenet,
    "wav2vec2": _wav2vec2,
}
# computed from two parameters by weight_norm, which is none of the rules' business
FALLBACK = {"wav2vec2": {f"wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original{i}" for i in (0, 1)}}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model


def batch(name):
    generator = torch.Generator().manual_seed(1)
    shape, key = ((N, 120), "input_values") if name == "wav2vec2" else ((N, 3, 24, 24), "pixel_values")
    return {
        key: torch.randn(shape, generator=generator),
        "labels": torch.randint(0, CLASSES, (N,), generator=generator),
    }


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_equals_the_loop_of_single_samples(name, device):
    model, samples = make(name).to(device), batch(name)
    scores = estimate_fisher(model, [samples], progress=False)
    expected = own_loss_loop(model, samples)
    assert_same(scores, expected)
    rules = scores.report.rules
    assert set(scores.report.fallback) == FALLBACK.get(name, set())
    unused = {parameter for parameter, rule in rules.items() if rule == "unused"}
    assert unused == {parameter for parameter, value in expected.items() if not value.any()}
    assert "conv" in rules.values()
    assert "norm" in rules.values()
