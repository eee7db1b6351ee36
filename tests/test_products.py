"""Products of linear layers by either library: exact to fp32 rounding, whatever the strides, and no views."""

import compacts
import pytest
import torch
from exactness import assert_exact

from sparseft import products, testing

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=["torch", "onednn"])
def library(request, monkeypatch):
    if request.param == "onednn" and not ONEDNN:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "prefer_onednn", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(products, "_SMALLEST_WEIGHT", 1)
    monkeypatch.setattr(products, "_SMALLEST_GRADIENT", 1)
    monkeypatch.setattr(products, "_SMALLEST_PRODUCT", 1)
    monkeypatch.setattr(products, "_ROWS_AT_ONCE", 3)
    return request.param


def mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 3))


def strided(tensor):
    """Return the tensor with gaps between its elements."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 33, 9), (130, 96, 200)])
@pytest.mark.parametrize("layout", ["plain", "transposed weight", "strided"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(library, shape, layout, with_bias):
    rows, inside, out = shape
    x, bias = torch.randn(2, rows, inside), torch.randn(out) if with_bias else None
    weight = torch.randn(inside, out).T if layout == "transposed weight" else torch.randn(out, inside)
    if layout == "strided":
        x, weight = strided(x), strided(weight)
    y = products.linear(x, weight, bias)
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert y.shape == want.shape
    assert y.is_contiguous()
    assert y._base is None
    assert float((y - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("bias", [torch.randn(18)[::2], torch.randn(1).expand(9), torch.randn(9, 7)[:, 3]])
def test_a_bias_with_gaps(library, bias):
    x, weight = torch.randn(17, 33), torch.randn(9, 33)
    want = x.double() @ weight.double().T + bias.double()
    assert float((products.linear(x, weight, bias) - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_nothing_to_multiply(library, shape):
    rows, inside, out = shape
    y = products.linear(torch.randn(2, rows, inside), torch.randn(out, inside), torch.ones(out))
    assert torch.equal(
        y, torch.nn.functional.linear(torch.zeros(2, rows, inside), torch.zeros(out, inside), torch.ones(out))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay_with_torch(library, dtype):
    x, weight = torch.randn(40, 24).to(dtype), torch.randn(16, 24).to(dtype)
    torch.testing.assert_close(products.linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 33, 9), (130, 96, 200), (0, 5, 4), (3, 0, 4), (3, 5, 0)])
@pytest.mark.parametrize("live", ["all", "all but the first token", "first half", "last of one sample", "none"])
@pytest.mark.parametrize("layout", ["plain", "transposed weight", "strided"])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_input_gradient(library, shape, live, layout, dtype):
    tokens, out, inside = shape
    place = torch.arange(2 * tokens).view(2, tokens, 1)
    rows = {
        "all": place >= 0,
        "all but the first token": place % max(tokens, 1) > 0,
        "first half": place % max(tokens, 1) < tokens // 2,
        "last of one sample": place == 2 * tokens - 1,
        "none": place < 0,
    }
    dy = (torch.randn(2, tokens, out) * rows[live]).to(dtype)  # zeros of both signs
    weight = (torch.randn(inside, out).T if layout == "transposed weight" else torch.randn(out, inside)).to(dtype)
    if layout == "strided":
        dy, weight = strided(dy), strided(weight)
    dx, want = products.input_gradient(dy, weight), dy.double() @ weight.double()
    assert dx.dtype == dtype
    assert dx.shape == want.shape
    assert dx.is_contiguous()
    assert dx._base is None
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    assert not want.numel() or float((dx - want).abs().max()) <= tolerance * float(want.abs().max())


def test_rows_that_are_zero_are_left_out(library, monkeypatch):
    """All but a few, so that products come in few sizes. NaN is not zero, wherever it stands in its row."""
    multiplied = []
    linear = products.linear

    def counted(x, weight, bias=None):
        multiplied.append(len(x.reshape(-1, x.shape[-1])))
        return linear(x, weight, bias)

    monkeypatch.setattr(products, "linear", counted)
    dy, weight = torch.zeros(2, 8, 20), torch.randn(20, 3)
    dy[0, 5, 18] = 1
    dy[1, 2:4, 0] = torch.nan
    dx = products.input_gradient(dy, weight)
    assert torch.equal(dx[0, 5], weight[18])
    assert bool(dx[1, 2:4].isnan().all())
    assert int((dx != 0).any(-1).sum()) == 3
    dy[0, 0] = 1
    products.input_gradient(dy, weight)
    assert multiplied == [3, 6]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (17, 33, 9), (130, 5, 200), (130, 200, 1), (0, 5, 4), (3, 0, 4), (3, 5, 0)]
)
@pytest.mark.parametrize("layout", ["plain", "strided", "slices", "expanded"])
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("device", testing.devices())
def test_weight_gradient(library, shape, layout, dtype, device):
    """To the accuracy of fp32 in every dtype, autocast or not."""
    tokens, out, inside = shape
    dy, x = torch.randn(tokens, out, device=device).to(dtype), torch.randn(tokens, inside, device=device).to(dtype)
    if layout == "strided":
        dy, x = strided(dy), strided(x)
    elif layout == "slices":
        dy, x = torch.cat([dy, dy], 1)[:, :out], torch.cat([x, x], 1)[:, inside:]
    elif layout == "expanded":
        dy = dy[:1, :1].expand(len(dy[:1]) * tokens, out)
    with torch.autocast(device, dtype=torch.bfloat16):
        gradient = products.weight_gradient(dy, x)
    want = dy.double().T @ x.double()
    assert gradient.dtype == torch.float32
    assert gradient.shape == want.shape
    assert gradient.is_contiguous()
    assert not want.numel() or float((gradient - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("last", [1, 5])
def test_fisher_is_exact_with_either(library, last):
    """Where the loss looks at all tokens, and where the rows of all but the first are left out."""
    model = mlp()
    data = [{"input": torch.randn(6, 5, 24)}]

    def loss(model, batch):
        return model(batch["input"])[:, :last].square().mean((1, 2))

    assert_exact(model, data, loss=loss)


@pytest.mark.parametrize("last", [1, 5])
def test_compact_gradients_are_exact_with_either(library, last):
    model, x = mlp(), torch.randn(6, 5, 24)
    mask = compacts.mask_of(model)
    compacts.assert_same_gradients(model, mask, lambda model: model(x)[:, :last].square().mean())


def test_what_is_preferred_is_there():
    assert isinstance(products.prefer_onednn(), bool)
    assert ONEDNN or not products.prefer_onednn()
