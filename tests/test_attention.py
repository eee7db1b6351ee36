"""Attention of the Fisher pass on the CPU, against torch's own in fp64; what it leaves to torch."""

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_same

import sparseft
from sparseft import attention, ops

if ops.SERVED_BY["attention"]["cpu"] == "reference":
    pytest.skip("the C++ extension is not built", allow_module_level=True)


@pytest.fixture(params=["ours", "torch"])
def both(request, monkeypatch):
    """Take the kernels of this package, and those of torch, whatever the processor."""
    monkeypatch.setattr(attention, "prefer_onednn", lambda: request.param == "ours")


@pytest.fixture
def ours(monkeypatch):
    """Take the kernels of this package on processors, too, for which torch's are fast."""
    monkeypatch.setattr(attention, "prefer_onednn", lambda: True)


@pytest.fixture
def served(monkeypatch):
    """Note the calls that this package serves."""
    calls = []

    def apply(*args):
        calls.append(args)
        return original(*args)

    original = attention._Attention.apply
    monkeypatch.setattr(attention._Attention, "apply", apply)
    return calls


def heads(generator, *sizes, features=16):
    """Return queries, keys and values as layers make them: [N, T, H, D] in memory."""
    samples, tokens, count = sizes
    return [
        torch.randn(samples, tokens, count, features, generator=generator).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]


def gradients(function, tensors, dy, **options):
    out = function(*tensors, **options)
    return [out, *torch.autograd.grad(out, tensors, dy.to(out))]


def assert_as_torch(tensors, generator, **options):
    """Compare output and gradients with torch's in fp64; errors may be twice those of torch in fp32."""
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    mask = options.get("attn_mask")
    wide = {**options, "attn_mask": mask.double()} if mask is not None and mask.is_floating_point() else options
    shape = (*tensors[0].shape[:3], tensors[2].shape[3])
    dy = torch.randn(shape, generator=generator)
    wanted = gradients(F.scaled_dot_product_attention, exact, dy, **wide)
    plain = gradients(F.scaled_dot_product_attention, tensors, dy, **options)
    got = gradients(attention.scaled_dot_product_attention, tensors, dy, **options)
    for one, other, want in zip(got, plain, wanted, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == want.shape
        allowed = 2 * (other - want).abs().max() + 1e-6 * want.abs().max()
        assert (one - want).abs().max() <= allowed


@pytest.mark.parametrize("sizes", [(2, 5, 3), (1, 33, 2), (3, 64, 1), (2, 150, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_as_torch(generator, both, served, threads, sizes, options):
    assert_as_torch(heads(generator, *sizes), generator, **options)
    assert len(served) == 1


@pytest.mark.parametrize("shape", [(2, 3, 20, 20), (2, 1, 1, 20), (20, 20), (1, 3, 20, 1), (1, 1, 20, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks(generator, both, served, shape, dtype):
    mask = torch.randn(shape, generator=generator)
    if dtype == torch.bool:
        mask = (mask > 0).index_fill_(-1, torch.tensor([0]), True)  # torch does not say what a query without keys gets
    assert_as_torch(heads(generator, 2, 20, 3), generator, attn_mask=mask)
    assert len(served) == 1


def test_heads_that_share_keys(generator, ours, served):
    query, key, value = (torch.randn(2, count, 40, 8, generator=generator).requires_grad_() for count in (6, 2, 2))
    assert_as_torch([query, key, value], generator, enable_gqa=True, is_causal=True)
    assert len(served) == 1
    with pytest.raises(RuntimeError, match="size"):
        attention.scaled_dot_product_attention(query, key, value)
    assert len(served) == 1


def test_other_numbers_of_keys_and_features_any_strides(generator, ours, served):
    query = torch.randn(2, 3, 16, 50, generator=generator).mT.requires_grad_()
    key = torch.randn(3, 2, 31, 16, generator=generator).transpose(0, 1).requires_grad_()
    value = torch.randn(2, 3, 31, 22, generator=generator)[..., ::2].requires_grad_()
    assert_as_torch([query, key, value], generator)
    assert len(served) == 1


def test_scores_that_would_overflow(generator, both):
    query, key, value = heads(generator, 1, 40, 2)
    assert_as_torch([(1000 * tensor).detach().requires_grad_() for tensor in (query, key)] + [value], generator)


def test_queries_that_see_nothing_are_zero(generator, both):
    query, key, value = heads(generator, 1, 8, 2)
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[3] = False
    out = attention.scaled_dot_product_attention(query, key, value, mask)
    assert torch.equal(out[:, :, 3], torch.zeros(1, 2, 16))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), [query, key, value]))


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(generator, both, which, number):
    tensors = dict(zip(("query", "key", "value"), heads(generator, 2, 40, 2), strict=True))
    changed = tensors[which].detach().clone()
    changed[1, 0, 7, 3] = number
    out = attention.scaled_dot_product_attention(**{**tensors, which: changed})
    assert out[0].isfinite().all()
    assert out[1, 1].isfinite().all()
    assert not out[1, 0].isfinite().all()


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("queries", [[70], [0, 3, 99], range(25), range(26), []], ids=str)
def test_queries_without_a_gradient_are_left_out(generator, both, monkeypatch, queries, masked):
    tensors, sizes = heads(generator, 2, 100, 2), []
    mask = torch.randn(2, 1, 100, 100, generator=generator) if masked else None
    dy = torch.zeros(2, 2, 100, 16)
    dy[:, :, queries] = torch.randn(2, 2, len(queries), 16, generator=generator)
    pull_back = attention._pull_back

    def noted(*args):
        sizes.append(args[1].shape[2])
        return pull_back(*args)

    monkeypatch.setattr(attention, "_pull_back", noted)
    got = gradients(attention.scaled_dot_product_attention, tensors, dy, attn_mask=mask)
    # the first counts as one of them always
    assert sizes == [len({0, *queries}) if len({0, *queries}) <= 25 else 100]
    rest = [query for query in range(100) if query not in queries]
    assert torch.equal(got[1][:, :, rest], torch.zeros(2, 2, len(rest), 16))
    wanted = gradients(F.scaled_dot_product_attention, tensors, dy, attn_mask=mask)
    for one, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-6)


def test_a_query_that_no_first_feature_tells_of_counts(generator, both):
    tensors = heads(generator, 2, 40, 2)
    dy = torch.zeros(2, 2, 40, 16)
    dy[1, 1, :, 7] = 1
    wanted = gradients(F.scaled_dot_product_attention, tensors, dy)
    for one, want in zip(gradients(attention.scaled_dot_product_attention, tensors, dy), wanted, strict=True):
        torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-6)


def test_results_do_not_depend_on_the_number_of_threads(generator, ours):
    tensors, results = heads(generator, 3, 70, 5), []
    before = torch.get_num_threads()
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(gradients(attention.scaled_dot_product_attention, tensors, torch.ones(3, 5, 70, 16)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"dropout_p": 0.5},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"three_dimensions": True},
        {"attn_mask": torch.zeros(8, 8, requires_grad=True)},
    ],
    ids=str,
)
def test_the_rest_is_left_to_torch(generator, both, served, change):
    change = dict(change)
    dtype, three = change.pop("dtype", torch.float32), change.pop("three_dimensions", False)
    tensors = [tensor.to(dtype) for tensor in heads(generator, 2, 8, 2)]
    if three:
        tensors = [tensor.flatten(0, 1) for tensor in tensors]
    torch.manual_seed(0)
    got = attention.scaled_dot_product_attention(*tensors, **change)
    torch.manual_seed(0)
    assert torch.equal(got, F.scaled_dot_product_attention(*tensors, **change))
    assert served == []


def test_under_autocast_it_is_left_to_torch(generator, both, served):
    with torch.autocast("cpu"):
        assert attention.scaled_dot_product_attention(*heads(generator, 2, 8, 2)).dtype == torch.bfloat16
    assert served == []


def test_where_torch_would_take_other_kernels_it_is_left_to_torch(generator, served, monkeypatch):
    monkeypatch.setattr(attention, "prefer_onednn", lambda: False)
    query, key, value = heads(generator, 2, 8, 2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attention.scaled_dot_product_attention(query, key, value)
    attention.scaled_dot_product_attention(query, key, torch.randn(2, 2, 8, 5))
    attention.scaled_dot_product_attention(query, key[:, :1], value[:, :1], enable_gqa=True)
    attention.scaled_dot_product_attention(query.mT.contiguous().mT, key, value)
    assert served == []
    attention.scaled_dot_product_attention(query, key, value)
    assert len(served) == 1


def test_without_the_extension_it_is_left_to_torch(generator, ours, served, monkeypatch):
    monkeypatch.setitem(ops.SERVED_BY, "attention", {"cpu": "reference", "cuda": "reference"})
    attention.scaled_dot_product_attention(*heads(generator, 2, 8, 2))
    assert served == []


def test_the_fisher_pass_uses_it_and_stays_exact(generator, both, served):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.projection, self.head = torch.nn.Linear(12, 36), torch.nn.Linear(12, 2)

        def forward(self, x):
            parts = self.projection(x).unflatten(-1, (3, 2, 6)).unbind(2)
            seen = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
            return self.head(seen.transpose(1, 2).flatten(2)[:, 0])

    torch.manual_seed(0)
    model = Layer()
    data = [(torch.randn(5, 9, 12, generator=generator), torch.randint(0, 2, (5,), generator=generator))]
    scores = sparseft.estimate_fisher(model, data, progress=False)
    assert served
    assert scores.report.fallback == {}
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for x, label in zip(*data[0], strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), label[None]), parameters)
        for name, grad in zip(names, grads, strict=True):
            wanted[name] += grad**2 / 5
    assert_same(scores, wanted)


def call(**changes):
    """Call the op itself, with one argument changed."""
    query, key, value = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 3)
    arguments = {"query": query, "key": key, "value": value, "bias": None, "scale": 1.0, "causal": False}
    return torch.ops.sparseft.attention(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("query", torch.zeros(4, 5, 8), "query must be .samples, heads, tokens, features., got 3 dimensions"),
        ("query", torch.zeros(2, 4, 0, 8), "query must hold something"),
        ("query", torch.zeros(2, 3, 5, 8), "query must have a multiple of key's 2 heads, got 3"),
        (
            "key",
            torch.zeros(2, 2, 6, 7),
            r"key must be of query's samples and features, \[2, 2, 6, 8\], got \[2, 2, 6, 7\]",
        ),
        ("value", torch.zeros(2, 2, 5, 3), r"value must be of key's .*, \[2, 2, 6, 3\], got \[2, 2, 5, 3\]"),
        ("value", torch.zeros(2, 2, 6, 3).half(), "value must be float32, got float16"),
        ("bias", torch.zeros(5, 6), r"bias must be .*\[2, 4, 5, 6\], got \[5, 6\]"),
    ],
)
def test_the_op_refuses(name, tensor, message):
    assert call()[0].shape == (2, 4, 5, 3)
    with pytest.raises(ValueError, match=message):
        call(**{name: tensor})
