"""Activation checkpointing: what runs again in backward is captured as it was the first time, and counts once."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import models
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import one_thread  # noqa: F401
from nets import H, N, T, data
from test_fisher import assert_same
from test_fisher_state import snapshot
from torch import nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint  # by name, as models do: not to be reached by replacing it there
from transformers.modeling_layers import GradientCheckpointingLayer

from sparseft.fisher import batch_one_fisher, estimate_fisher, sample_gradients


def not_checkpointed(function, *args):
    return function(*args)


def nested(function, *args):
    def outer(*args):
        return checkpoint(function, *args, use_reentrant=False) * 1.5

    return checkpoint(outer, *args, use_reentrant=False)


def thrice(function, *args):
    return checkpoint(nested, function, *args, use_reentrant=False)


def with_all(function, *args):
    # what it saves is the same; it runs to its end each time
    return checkpoint(function, *args, use_reentrant=False, early_stop=False)


def with_contexts(function, *args):
    products = partial(checkpointing.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    return checkpoint(function, *args, use_reentrant=False, context_fn=products)


WAYS = {
    "plain": partial(checkpoint, use_reentrant=False),
    "nested": nested,
    "thrice": thrice,
    "to the end": with_all,
    "contexts of its own": with_contexts,
}


class Block(nn.Module):
    """Attention and a feed-forward network, of which everything but the residual stream is computed again.

    bias: the attention bias that all samples share is made "outside" of what runs again, or "inside".
    """

    def __init__(self, way, bias):
        super().__init__()
        self.norm, self.qkv, self.down = nn.LayerNorm(H), nn.Linear(H, 3 * H), nn.Linear(2 * H, H)
        self.up, self.scale = nn.Linear(H, 2 * H), nn.Parameter(torch.randn(H))
        self.far = nn.Embedding(2 * T, 2)
        self.way, self.bias, self.runs, self.ends = way, bias, 0, 0

    def relative(self):
        near = torch.arange(T)[:, None] - torch.arange(T) + T
        return torch.tanh(self.far(near).permute(2, 0, 1)[None])

    def inner(self, x, bias):
        self.runs += 1
        bias = self.relative() if bias is None else bias
        q, k, v = self.qkv(self.norm(x)).view(len(x), T, 3, 2, H // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / 2 + bias
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.scale * F.dropout(self.down(F.gelu(self.up(x))), 0.5, self.training)
        self.ends += 1
        return x

    def forward(self, x):
        bias = self.relative() if self.bias == "outside" else None
        return self.way(self.inner, x, bias)


class Stack(nn.Module):
    """Tokens and positions, blocks of which the last is used twice, and a head tied to the tokens."""

    def __init__(self, way, bias="inside"):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, H), nn.Embedding(T, H)
        self.blocks = nn.ModuleList(Block(way, bias) for _ in range(2))
        self.norm = nn.LayerNorm(H)
        self.classes = nn.Linear(H, 11)
        self.classes.weight = self.tokens.weight

    def forward(self, ids):
        x = self.way_in(ids)
        for block in (*self.blocks, self.blocks[1]):
            x = block(x)
        return self.classes(self.norm(x).mean(1))

    def way_in(self, ids):
        return self.tokens(ids) + self.positions(torch.arange(T))

    @property
    def runs(self):
        return sum(block.runs for block in self.blocks)


def made(*args):
    torch.manual_seed(0)
    return Stack(*args)


def assert_exact(model, batches, oracle=None, **options):
    scores = estimate_fisher(model, batches, progress=False, **options)
    assert_same(scores, batch_one_fisher(oracle or model, batches, **options))
    assert not scores.report.fallback
    assert "unused" not in scores.report.rules.values()
    return scores


def batches():
    ids, labels = data()
    return [(ids[:3], labels[:3]), (ids[3:], labels[3:])]


@pytest.mark.parametrize("bias", ["inside", "outside"])
@pytest.mark.parametrize("way", WAYS)
def test_what_runs_again_is_exact(way, bias):
    model = made(WAYS[way], bias)
    before = snapshot(model)
    kept = {name: value for name, value in vars(checkpointing).items() if not name.startswith("__")}
    # single passes without checkpointing: nothing that runs again is in the oracle
    oracle = made(not_checkpointed if way not in ("nested", "thrice") else lambda f, *args: f(*args) * 1.5, bias)
    scores = assert_exact(model, batches(), oracle)
    assert scores.report.rules["tokens.weight"] == "embedding + linear"
    after = snapshot(model)
    assert before[:3] == after[:3]
    assert kept == {name: vars(checkpointing)[name] for name in kept}
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("mode", ["expected", "sampled"])
def test_other_modes_are_exact(mode):
    assert_exact(made(WAYS["plain"]), batches(), mode=mode)


def test_a_backward_pass_for_each_token_is_exact():
    def losses(model, batch):
        x = model.way_in(batch[0])
        for block in model.blocks:
            x = block(x)
        return F.cross_entropy(model.classes(model.norm(x)).mT, batch[0].flip(1), reduction="none")

    assert_exact(made(WAYS["plain"]), batches(), loss=losses, token_reduction="token")


def test_gradients_at_chosen_entries_are_those_without_checkpointing():
    found = []
    for way in (not_checkpointed, WAYS["plain"]):
        model = made(way)
        indices = {name: torch.arange(min(7, p.numel()), dtype=torch.int32) for name, p in model.named_parameters()}
        found.append(sample_gradients(model, batches(), indices, progress=False).columns)
    assert torch.equal(*found)


class Forms(nn.Module):
    """Convolutions, group norm, packed attention, raw parameters and products of weights alone."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, H, 3, padding=1), nn.GroupNorm(2, H)
        self.attention = nn.MultiheadAttention(H, 2, batch_first=True)
        self.first, self.low, self.high = (nn.Parameter(torch.randn(*shape)) for shape in ((1, 1, H), (H, 2), (2, H)))
        self.table = nn.Parameter(torch.randn(1, T + 1, H))
        self.experts, self.out, self.way = nn.Parameter(torch.randn(H, H)), nn.Linear(H, 3), way

    def inner(self, x):
        h = self.norm(self.conv(x)).transpose(1, 2)
        h = torch.cat([self.first.expand(len(h), -1, -1), h], 1) + self.table
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return h @ (self.experts + self.low @ self.high)

    def forward(self, x):
        return self.out(torch.tanh(self.way(self.inner, x)).mean(1))


@pytest.mark.parametrize("way", ["plain", "nested"])
def test_every_form_of_operation_may_run_again(way):
    torch.manual_seed(0)
    model = Forms(WAYS[way])
    x, labels = torch.randn(N, 4, T), torch.randint(0, 3, (N,))
    scores = estimate_fisher(model, [(x, labels)], progress=False)
    assert_same(scores, batch_one_fisher(model, [(x, labels)]))
    model.way = lambda function, *args: function(*args) * (1.5 if way == "nested" else 1)
    without = estimate_fisher(model, [(x, labels)], progress=False)
    assert scores.report.rules == without.report.rules
    assert scores.report.fallback == without.report.fallback


class Before(nn.Module):
    """Uses parameters before the region in other ways than in it, where samples lie differently."""

    def __init__(self, way):
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(11, H), nn.Linear(H, 2 * H), nn.Linear(2 * H, H)
        self.table, self.scale = nn.Parameter(torch.randn(T, H)), nn.Parameter(torch.randn(H))
        self.out, self.way = nn.Linear(H, 3), way

    def forward(self, ids):
        x = torch.tanh(self.down(torch.tanh(self.up(self.tokens(ids)))))
        if bool(ids[:, 0].eq(0).any()):
            x = x[ids >= 0].view_as(x)  # rows chosen by their values: two dimensions are not captured from here on
        shared, scale = torch.sin(self.table), self.scale.view(1, 1, H)
        x = (x.transpose(0, 1) * shared[:, None]).transpose(0, 1)

        def inner(x):
            x = x * scale * shared
            return torch.tanh(self.down(torch.tanh(self.up(x.flatten(0, 1))))).view_as(x)

        return self.out(self.way(inner, x).mean(1))


@pytest.mark.parametrize("way", ["plain", "nested"])
def test_what_came_before_a_region_is_not_forgotten_when_it_runs_again(way):
    torch.manual_seed(0)
    model = Before(WAYS[way])
    first, second = ((ids.clamp(min=1), labels % 3) for ids, labels in batches())
    scores = estimate_fisher(model, [first, second], progress=False)
    assert not scores.report.fallback
    assert_same(scores, batch_one_fisher(model, [first, second]))
    second[0][:, 0] = 0
    scores = estimate_fisher(model, [first, second], progress=False)
    assert {"up.weight", "down.weight"} <= set(scores.report.fallback)
    assert_same(scores, batch_one_fisher(model, [first, second]))


def test_a_fallback_runs_again_too():
    model = made(WAYS["plain"])
    # its rows are gathered across samples: no rule captures it
    model.odd = nn.Linear(H, H)
    inner = model.blocks[0].inner
    model.blocks[0].inner = lambda x, bias: inner(model.odd(x[torch.arange(len(x)).flip(0)]).flip(0), bias)
    scores = estimate_fisher(model, batches(), progress=False)
    assert set(scores.report.fallback) == {"odd.weight", "odd.bias"}
    assert_same(scores, batch_one_fisher(model, batches()))


class Counted(contextlib.ExitStack):
    """Counts the bytes that autograd saves for backward and that no checkpoint takes over."""

    def __enter__(self):
        self.bytes = 0
        self.enter_context(torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor))
        return super().__enter__()

    def pack(self, tensor):
        self.bytes += tensor.nbytes
        return tensor


def test_fewer_activations_are_kept_and_each_block_runs_again_once():
    saved, runs = [], []
    for way in (not_checkpointed, WAYS["plain"]):
        model = made(way)
        two = [data(samples=2)]
        estimate_fisher(model, two, progress=False)
        probed = model.runs
        with Counted() as counted:
            estimate_fisher(model, [*two, data(samples=16)], progress=False)
        saved.append(counted.bytes)
        runs.append(model.runs - 2 * probed)
    # 3 calls of blocks forward, and 3 again: pulling the shared bias back for 16 samples runs none
    assert runs == [3, 6]
    assert saved[1] < saved[0] / 4


def test_recomputation_stops_early():
    model = made(WAYS["plain"])
    estimate_fisher(model, batches(), progress=False)
    assert sum(block.ends for block in model.blocks) < model.runs


def test_reentrant_checkpointing_is_refused_before_anything_runs_again():
    model = made(partial(checkpoint, use_reentrant=True))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"use_reentrant=True.* pass use_reentrant=False.*batch_one_fisher"):
        estimate_fisher(model, batches(), progress=False)
    assert snapshot(model)[:3] == before[:3]
    # outside of the pass it works as ever
    batch_one_fisher(model, batches())


def test_reentrant_checkpointing_of_inputs_would_be_scored_as_zero_and_is_refused():
    first = nn.Linear(4, 4)

    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = first, nn.Linear(4, 3)

        def forward(self, x):
            return self.out(checkpoint(self.first, x, use_reentrant=True))

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        estimate_fisher(Raw(), [(torch.randn(N, 4), torch.randint(0, 3, (N,)))], progress=False)


def test_a_part_that_does_something_else_the_second_time_is_an_error():
    model = made(WAYS["plain"])
    inner = model.blocks[0].inner

    def fickle(x, bias):
        # of every two runs the second is not the first
        scaled = torch.tanh(x) if model.blocks[0].runs % 2 else torch.sin(x)
        return inner(scaled, bias)

    model.blocks[0].inner = fickle
    with pytest.raises(RuntimeError, match=r"same operations.*tanh|same operations.*sin"):
        estimate_fisher(model, [data(samples=2)], progress=False)


def test_checkpoints_of_other_threads_are_left_alone():
    other = made(WAYS["plain"])
    model = made(WAYS["plain"])
    inner, grads = model.blocks[0].inner, []

    def meanwhile(x, bias):
        with ThreadPoolExecutor(1) as pool:
            grads.append(pool.submit(lambda: torch.autograd.grad(other(data()[0]).sum(), other.norm.bias)[0]).result())
        return inner(x, bias)

    model.blocks[0].inner = meanwhile
    scores = estimate_fisher(model, batches(), progress=False)
    model.blocks[0].inner = inner
    assert_same(scores, batch_one_fisher(model, batches()))
    (expected,) = torch.autograd.grad(other(data()[0]).sum(), other.norm.bias)
    for grad in grads:
        torch.testing.assert_close(grad, expected)


def recomputing(model):
    """Switch checkpointing on as users do; return a list that gets a number for each run of a layer, -1 if forward."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    first = next(module for module in layers[0].modules() if module._parameters)
    first.register_forward_hook(lambda *args: runs.append(torch._C._current_graph_task_id()))
    return runs


def functions(model):
    return {name: vars(module).get("_gradient_checkpointing_func") for name, module in model.named_modules()}


@pytest.mark.parametrize("name", ["llama", "llama tied", "bert", "bert eager", "t5", "t5 eager", "deberta", "vit"])
def test_layers_of_transformers_run_again_where_they_do_in_training(name):
    model, batch = models.make(name), models.batch(name)
    expected = estimate_fisher(model, [batch], progress=False)
    runs = recomputing(model)
    before = snapshot(model), functions(model)
    scores = estimate_fisher(model, [batch], progress=False)
    assert -1 in runs
    assert max(runs) > -1
    assert_same(scores, expected)
    assert_same(scores, batch_one_fisher(model, [batch]))
    assert scores.report.rules == expected.report.rules
    assert not scores.report.fallback
    after = snapshot(model), functions(model)
    assert before[0][:3] == after[0][:3]
    assert before[1] == after[1]


def test_layers_with_dropout_of_their_own_do_without_while_they_run_again():
    sizes = {"d_model": 32, "vocab_size": models.VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    torch.manual_seed(0)
    config = tf.BartConfig(**sizes, dropout=0.5, activation_dropout=0.5, attention_dropout=0.5, eos_token_id=2)
    model, batch = tf.BartForConditionalGeneration(config).train(), models.batch("t5")
    runs = recomputing(model)
    scores = estimate_fisher(model, [batch], progress=False)
    assert max(runs) > -1
    assert_same(scores, batch_one_fisher(model, [batch]))
    assert not scores.report.fallback


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_key_value_cache_is_not_filled_again(name):
    def losses(model, batch):
        # as a loss of one's own may: with the cache that the model makes by itself, by place or by name
        logits = model(batch["input_ids"]).logits
        return F.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none").sum(1)

    model, batch = models.make(name), models.batch(name)
    runs = recomputing(model)
    scores = estimate_fisher(model, [batch], loss=losses, progress=False)
    assert max(runs) > -1
    assert_same(scores, batch_one_fisher(model, [batch], loss=losses))
    assert not scores.report.fallback


def test_experts_run_again():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**models._SMALL, **models._WORDS, **sizes)).train()
    runs, batch = recomputing(model), models.batch("llama")
    scores = estimate_fisher(model, [batch], progress=False)
    assert max(runs) > -1
    assert "experts" in scores.report.rules.values()
    assert_same(scores, batch_one_fisher(model, [batch]))
    assert not scores.report.fallback
