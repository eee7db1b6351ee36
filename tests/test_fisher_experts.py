"""Mixture-of-experts models: every parameter against single backward passes through the model's own loss."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from models import one_thread  # noqa: F401

from sparseft import testing
from sparseft.fisher import estimate_fisher

VOCABULARY = 61
_SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def mixtral(experts=4, top_k=2, **options):
    sizes = {"num_local_experts": experts, "num_experts_per_tok": top_k, "intermediate_size": 20}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, **sizes, **options))


def qwen(experts=12, top_k=3, **options):
    sizes = {"num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": 20, "head_dim": 8}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_SIZES, **sizes, intermediate_size=20, **options))


def gpt_oss(experts=4, top_k=2, **options):
    # weights [E, in, out], interleaved gates, biases
    sizes = {"num_local_experts": experts, "num_experts_per_tok": top_k, "intermediate_size": 20, "head_dim": 8}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**_SIZES, **sizes, **options))


MODELS = {
    "mixtral": mixtral,
    "mixtral, top 1": lambda: mixtral(top_k=1),
    "qwen3": qwen,
    "gpt-oss": gpt_oss,
}


def make(function, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    model = function()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device, dtype).train()


def ragged(samples=5, length=9, left=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 20, (samples, length), generator=generator)
    lengths = torch.randint(3, length + 1, (samples,), generator=generator)
    lengths[0] = length
    kept = torch.arange(length) < lengths[:, None]
    mask = kept.flip(1) if left else kept
    ids = ids.masked_fill(~mask, 0)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def own_loss_loop(model, batch):
    """Return the mean of squared gradients of the loss transformers computes for a batch of one."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    samples = len(batch["input_ids"])
    for n in range(samples):
        model.zero_grad()
        model(**{key: value[n : n + 1].to(device) for key, value in batch.items()}).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += p.grad.square()
    model.zero_grad()
    model.train(training)
    return {name: total / samples for name, total in sums.items()}


def assert_same(scores, expected, tolerance=1e-5):
    assert set(scores) == set(expected)
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        scale = max(float(value.max()), 1e-9 * largest)
        error = float((scores[name] - value).abs().max()) / scale
        assert error <= tolerance, f"{name}: {error:.1e} ({scores.report.rules[name]})"


def slices(batch, size):
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, len(batch["input_ids"]), size)]


def expert_parameters(model):
    return [name for name, _ in model.named_parameters() if ".experts." in name]


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_exact(name, implementation, device):
    model = make(MODELS[name], device)
    model.set_experts_implementation(implementation)
    for left in (False, True):
        batch = ragged(left=left)
        scores = estimate_fisher(model, slices(batch, 3), progress=False)
        assert not scores.report.fallback, scores.report
        for parameter in expert_parameters(model):
            assert scores.report.rules[parameter] == ("bias" if parameter.endswith("_bias") else "experts")
        assert_same(scores, own_loss_loop(model, batch), 1e-5 if device == "cpu" else 1e-4)
