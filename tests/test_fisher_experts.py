"""Mixture-of-experts models: every parameter against single backward passes through the model's own loss."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from exactness import assert_exact, assert_same, assert_same_gradients, own_loss_loop, slices
from models import one_thread  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparseft import testing
from sparseft.fisher import batch_one_fisher, estimate_fisher, sample_gradients
from sparseft.fisher.grouped import Grouped, add_grouped_

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


def deepseek():
    # a router of another precision than the layers, chosen by group; shared experts; a first layer without experts
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    inner = {"intermediate_size": 20, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
    heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 8, "q_lora_rank": 8}
    options = {**_SIZES, **sizes, **inner, **heads, "num_key_value_heads": 4}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**options))


MODELS = {
    "mixtral": mixtral,
    "mixtral, top 1": lambda: mixtral(top_k=1),
    "qwen3": qwen,
    "gpt-oss": gpt_oss,
    "deepseek": deepseek,
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
        # the weight of a single chosen expert is 1: where rounding leaves its router no gradient, nothing is proven
        routers = {key for key in scores if name == "mixtral, top 1" and key.endswith("gate.weight")}
        assert scores.report.fallback.keys() <= routers, scores.report
        for parameter in expert_parameters(model):
            assert scores.report.rules[parameter] == ("bias" if parameter.endswith("_bias") else "experts")
        assert_same(scores, own_loss_loop(model, batch), noise=routers)


def test_experts_that_see_every_token_in_one_batched_product():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "head_dim": 8}
    inner = {"intermediate_size": 20, "intermediate_size_mlp": 20}
    model = make(lambda: tf.Llama4ForCausalLM(tf.Llama4TextConfig(**_SIZES, **sizes, **inner)))
    for batch in (ragged(), ragged(left=True)):
        scores = estimate_fisher(model, slices(batch, 3), progress=False)
        assert not scores.report.fallback, scores.report
        assert {scores.report.rules[name] for name in expert_parameters(model)} == {"bmm"}
        assert_same(scores, own_loss_loop(model, batch))


class Product(nn.Module):
    """Samples in the rows of each matrix, or in between them."""

    def __init__(self, token_first):
        super().__init__()
        self.token_first = token_first
        self.heads, self.out = nn.Parameter(torch.randn(2, WIDTH, 3)), nn.Linear(6, CLASSES)

    def forward(self, x):
        rows = (x.transpose(0, 1) if self.token_first else x).reshape(1, -1, WIDTH).expand(2, -1, -1)
        y = torch.bmm(rows, self.heads).tanh().transpose(0, 1).flatten(1)
        shape = (x.shape[1], x.shape[0], 6) if self.token_first else (*x.shape[:2], 6)
        return self.out(y.view(shape).mean(0 if self.token_first else 1))


def test_a_batched_product_is_captured_where_samples_lie_one_after_the_other():
    torch.manual_seed(0)
    assert assert_exact(Product(token_first=False), [data(), data(3, 1)]).report.rules["heads"] == "bmm"
    assert "cannot tell" in assert_exact(Product(token_first=True), [data()]).report.fallback["heads"]


def test_batch_size_and_padding_do_not_matter_and_experts_without_tokens_score_zero():
    model, batch = make(lambda: qwen(top_k=1)), ragged(samples=3)
    expected = own_loss_loop(model, batch)
    longer = {
        key: torch.nn.functional.pad(value, (0, 4), value=-100 * (key == "labels")) for key, value in batch.items()
    }
    for batches in (slices(batch, 1), slices(batch, 2), [batch], [longer]):
        scores = estimate_fisher(model, batches, progress=False)
        assert not scores.report.fallback
        assert_same(scores, expected)
    # of the shorter batch, where padding goes nowhere either
    scores = estimate_fisher(model, slices(batch, 2), progress=False)
    unused = [scores[name].flatten(1).eq(0).all(1) for name in expert_parameters(model)]
    assert all(mask.any() and not mask.all() for mask in unused)


def test_the_auxiliary_loss_of_the_router_does_not_enter():
    model, batch = make(mixtral), ragged()
    expected = own_loss_loop(model, batch)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 100.0
    assert model(**batch).loss.item() > 50
    assert_same(estimate_fisher(model, slices(batch, 3), progress=False), expected)


@pytest.mark.parametrize("mode", ["expected", "sampled"])
def test_other_modes(mode):
    config = tf.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, intermediate_size=20, num_labels=3)
    model = make(lambda: tf.MixtralForSequenceClassification(config))
    batch = ragged()
    batch["labels"] = torch.tensor([0, 1, 2, 0, 1])
    assert not assert_exact(model, slices(batch, 3), mode=mode).report.fallback


def test_only_the_parameters_asked_for_are_scored():
    model, batch = make(gpt_oss), ragged()
    expected = own_loss_loop(model, batch)
    for names in (
        ["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj_bias"],
        ["model.layers.0.mlp.router.weight"],
    ):
        scores = estimate_fisher(model, [batch], names=names, progress=False)
        assert not scores.report.fallback
        assert_same(scores, {name: expected[name] for name in names})


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device):
    model, batch = make(mixtral, device, dtype), ragged()
    model.set_experts_implementation("eager")  # the others ask for sizes that 8 divides
    scores = estimate_fisher(model, [batch], progress=False)
    assert not scores.report.fallback
    expected = batch_one_fisher(model, [batch])
    largest = max(float(value.max()) for value in expected.values())
    compared = 0
    for name, value in expected.items():
        if value.max() > 1e-3 * largest:
            compared += ".experts." in name
            # rounding may send a token to another expert, which changes what that token gives in full
            assert (scores[name] - value).norm() < 40 * torch.finfo(dtype).eps * value.norm(), name
    assert compared == 4


def test_autocast_inside_the_model_is_followed():
    model, batch = make(mixtral), ragged()
    exact = estimate_fisher(model, [batch], progress=False)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    scores, expected = estimate_fisher(model, [batch], progress=False), batch_one_fisher(model, [batch])
    assert scores.report.rules == exact.report.rules
    for name in expert_parameters(model):
        assert (scores[name] - expected[name]).norm() < 0.04 * expected[name].norm(), name
        assert not torch.equal(scores[name], exact[name])


def test_the_model_is_left_as_it_was():
    model, batch = make(mixtral), ragged()
    layers = [layer.mlp.experts for layer in model.model.layers]

    def counting(*args):
        counting.calls += 1
        return type(layers[0]).forward(layers[0], *args)

    counting.calls = 0
    layers[0].forward = counting  # as libraries that wrap layers do
    estimate_fisher(model, [batch], progress=False)
    with pytest.raises(ZeroDivisionError):
        estimate_fisher(model, [batch], loss=lambda model, batch: 1 / 0, progress=False)
    assert layers[0].__dict__["forward"] is counting
    assert "forward" not in layers[1].__dict__
    before = counting.calls
    model(**batch)
    assert counting.calls == before + 1


WIDTH, INNER, EXPERTS, CLASSES = 7, 5, 3, 4


class Experts(nn.Module):
    """An experts layer by the marks of transformers' interface, computed densely: every token through every expert."""

    def __init__(self, is_transposed, has_bias, has_gate, has_post_expert_norm=False):
        super().__init__()
        self.num_experts, self.is_transposed, self.has_bias = EXPERTS, is_transposed, has_bias
        self.has_gate, self.has_post_expert_norm = has_gate, has_post_expert_norm
        self.config = tf.PreTrainedConfig()
        inner = 2 * INNER if has_gate else INNER
        self.first = "gate_up_proj" if has_gate else "up_proj"
        for name, rows, columns in ((self.first, inner, WIDTH), ("down_proj", WIDTH, INNER)):
            shape = (columns, rows) if is_transposed else (rows, columns)
            self.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *shape)))
            if has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, rows)))
        self.act_fn = torch.tanh
        if has_post_expert_norm:
            self.post_expert_norm = nn.LayerNorm(WIDTH)

    def _apply_gate(self, y):
        return torch.sigmoid(y[..., ::2]) * y[..., 1::2]

    def _linear(self, name, x):
        weight = getattr(self, name)
        y = torch.einsum("emi,eio->emo", x, weight if self.is_transposed else weight.mT)
        return y + getattr(self, f"{name}_bias")[:, None] if self.has_bias else y

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = self._linear(self.first, hidden_states.expand(EXPERTS, -1, -1))
        y = self._linear("down_proj", self._apply_gate(y) if self.has_gate else self.act_fn(y))
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        share = torch.zeros(len(hidden_states), EXPERTS).scatter_add(1, top_k_index, top_k_weights)
        return torch.einsum("emo,me->mo", y, share)


class Net(nn.Module):
    """Routes [N, T, WIDTH] through experts, as many times as asked, and classifies the mean."""

    def __init__(self, experts, times=1, time_major=False, choices=2):
        super().__init__()
        self.experts, self.times, self.time_major, self.choices = experts, times, time_major, choices
        self.router, self.out = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        if self.time_major:
            x = x.transpose(0, 1)
        flat = x.reshape(-1, WIDTH)
        for _ in range(self.times):
            weights, chosen = self.router(flat).softmax(-1).topk(self.choices)
            flat = flat + self.experts(flat, chosen, weights)
        y = flat.view(x.shape)
        return self.out((y.transpose(0, 1) if self.time_major else y).mean(1))


def data(samples=5, length=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, length, WIDTH, generator=generator), torch.arange(samples) % CLASSES


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_every_way_to_lay_out_experts(is_transposed, has_bias, has_gate):
    torch.manual_seed(0)
    model = Net(Experts(is_transposed, has_bias, has_gate))
    for length in (1, 6):
        x, targets = data(length=length)
        report = assert_exact(model, [(x[:3], targets[:3]), (x[3:], targets[3:])]).report
        assert not report.fallback
        assert report.rules["experts.down_proj"] == "experts"


def test_a_norm_after_the_experts_falls_back_alone():
    torch.manual_seed(0)
    report = assert_exact(Net(Experts(False, True, True, has_post_expert_norm=True)), [data()]).report
    assert set(report.fallback) == {"experts.post_expert_norm.weight", "experts.post_expert_norm.bias"}


def test_experts_used_twice_are_summed_within_a_sample():
    torch.manual_seed(0)
    report = assert_exact(Net(Experts(False, True, True), times=2), [data()]).report
    assert not report.fallback


def test_every_expert_chosen_by_every_token():
    torch.manual_seed(0)
    assert not assert_exact(Net(Experts(True, True, True), choices=EXPERTS), [data()]).report.fallback


def test_tokens_that_do_not_lie_sample_after_sample_are_found_out():
    torch.manual_seed(0)
    model = Net(Experts(False, False, True), time_major=True)
    report = assert_exact(model, [data()]).report
    assert report.rules["experts.down_proj"] == report.rules["experts.gate_up_proj"] == "fallback"
    assert "cannot tell the samples apart" in report.fallback["experts.down_proj"]


def test_columns_of_experts_equal_the_gradients_of_single_samples():
    generator = torch.Generator().manual_seed(0)
    samples, groups, left_size, right_size = 3, 4, 5, 6
    segment = torch.tensor([0, 0, 2, 3, 3, 3, 4, 9, 11, 11])  # group 2 has no row
    left = torch.randn(len(segment), left_size, generator=generator)
    right = torch.randn(len(segment), right_size, generator=generator)
    grads = torch.zeros(samples, groups, left_size, right_size)
    for m, s in enumerate(segment.tolist()):
        grads[s % samples, s // samples] += torch.outer(left[m], right[m])
    part = Grouped(samples, left, right, segment)
    for indices in (torch.arange(0, grads[0].numel(), 7), torch.arange(85, 100), torch.arange(0)):
        torch.testing.assert_close(part.at(indices.int()), grads.flatten(1)[:, indices])
    fisher = torch.zeros(grads.shape[1:])
    add_grouped_(fisher, [part])
    torch.testing.assert_close(fisher, grads.square().sum(0))
    assert part.reaches().tolist() == [True, True, True]
    left[segment % samples == 1] = 0
    assert part.reaches().tolist() == [True, False, True]


def test_gradients_of_single_samples_at_chosen_entries():
    model, batch = make(gpt_oss), ragged()
    indices = {name: torch.arange(0, p.numel(), 13) for name, p in model.named_parameters() if ".experts." in name}
    found = sample_gradients(model, slices(batch, 3), indices, progress=False)
    assert not found.report.fallback
    model.eval()
    for n, one in enumerate(slices(batch, 1)):
        model.zero_grad()
        model(**one).loss.backward()
        expected = {name: model.get_parameter(name).grad.flatten()[::13] for name in indices}
        assert_same_gradients({name: rows[n] for name, rows in found.items()}, expected)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_no_per_sample_gradient_of_an_expert_is_ever_made():
    torch.manual_seed(0)
    model = make(lambda: mixtral(experts=8))
    batch = ragged(samples=8, length=4)
    with Largest() as largest:
        estimate_fisher(model, [batch], progress=False)
    # the largest tensor is the largest parameter's scores
    assert largest.bytes == max(p.nbytes for p in model.parameters())
