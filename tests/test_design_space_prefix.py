"""Prefixes in attention: their definition, peft's where it has the same, and generation with a cache."""

import math

import models
import pytest
import torch
from models import one_thread  # noqa: F401

from sparseft.design_space import Space
from sparseft.integrations import prefix
from sparseft.integrations.design_space import apply_space

peft = pytest.importorskip("peft", reason="LoRA and prefixes need peft: pip install 'sparseft[peft]'")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_prefix_on_every_layer_is_that_of_peft(name):
    ours, length = models.make(name).eval(), 3
    width = 16 if name == "llama" else 32
    apply_space(Space(("P", "P"), "uniform"), ours, 2 * length * 2 * width)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    theirs = peft.get_peft_model(models.make(name).eval(), config).eval()
    attentions = [module for module in ours.modules() if hasattr(module, "prefix")]
    together = torch.cat([module.prefix.embedding.weight for module in attentions], dim=1)
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(together)
    inputs = {key: value for key, value in models.batch(name).items() if key != "labels"}
    mask = inputs["attention_mask"].bool()
    # by way of the cache, tokens stand behind the prefix
    positions = (length + torch.arange(mask.shape[1])).expand_as(mask)
    got = ours(**inputs, position_ids=positions).logits
    wanted = theirs(**inputs).logits
    torch.testing.assert_close(got[mask], wanted[mask], rtol=1e-4, atol=1e-5)
    plain = models.make(name).eval()(**inputs).logits
    assert (plain[mask] - got[mask]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_the_cache_works_with_prefixes(name):
    model = models.make(name).eval()
    apply_space(Space(("P", "P"), "uniform", "increasing"), model, 3_000, remainder="leave")
    lengths = {len(module.prefix.embedding.weight) for module in model.modules() if hasattr(module, "prefix")}
    assert len(lengths) == 2
    ids = models.batch(name)["input_ids"][:1, :5]
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_to_a_prefix_is_its_definition(grouped, mask, bias):
    torch.manual_seed(0)
    samples, heads, kv_heads, queries, keys, dim, length = 2, 4, 2 if grouped else 4, 3, 5, 8, 4
    module = torch.nn.Module()
    module.is_causal = mask == "causal"
    module.num_key_value_groups = heads // kv_heads
    module.prefix = torch.nn.Module()
    module.prefix.embedding = torch.nn.Embedding(length, 2 * kv_heads * dim)
    query = torch.randn(samples, heads, queries, dim)
    key, value = torch.randn(2, samples, kv_heads, keys, dim)
    allowed = torch.rand(samples, 1, queries, keys) > 0.3
    allowed[..., 0] = True
    if mask == "causal":
        allowed = (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries)[None, None]
    given = {"none": None, "causal": None, "bool": allowed, "float": torch.where(allowed, 0.0, -math.inf)}[mask]
    extra = {"position_bias": torch.randn(1, heads, queries, keys)} if bias else {}
    got, _ = prefix._attend(module, query, key, value, given, scaling=0.5, dropout=0.0, **extra)
    first = module.prefix.embedding.weight
    for n in range(samples):
        for h in range(heads):
            kv = h // (heads // kv_heads)
            own = first.view(length, 2, kv_heads, dim)[:, :, kv]
            ks, vs = torch.cat([own[:, 0], key[n, kv]]), torch.cat([own[:, 1], value[n, kv]])
            scores = query[n, h] @ ks.T * 0.5
            if bias:
                scores[:, length:] += extra["position_bias"][0, h]
            if mask != "none":
                scores[:, length:][~allowed[n % len(allowed), 0]] = -math.inf
            torch.testing.assert_close(got[n, :, h], scores.softmax(-1) @ vs, rtol=1e-5, atol=1e-5)


def test_prefixes_need_the_attention_interface():
    model = models.make("gpt2 eager")
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa', got .'eager'. in GPT2LMHeadModel"):
        apply_space(Space(("L", "P"), "uniform"), model, 1_000, remainder="leave")
    assert not any("lora" in name for name, _ in model.named_parameters())
