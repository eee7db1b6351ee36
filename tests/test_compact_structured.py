"""Whole rows, columns and blocks: the gradient is a few dense products, whoever made the mask, and still the same."""

import itertools

import models
import pytest
import torch
from compacts import assert_same_gradients
from models import one_thread  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import sparseft
from sparseft import testing
from sparseft.compact import bands
from sparseft.mask import Mask

HEIGHT, WIDTH = 203, 151


def places(*tiles, height=HEIGHT, width=WIDTH):
    """Return a matrix that says where some tiles, pairs of rows and columns, have their entries."""
    chosen = torch.zeros(height, width, dtype=torch.bool)
    for rows, columns in tiles:
        chosen[torch.as_tensor(rows)[:, None], torch.as_tensor(columns)] = True
    return chosen


ALL_ROWS, ALL_COLUMNS = range(HEIGHT), range(WIDTH)
UNITS = {
    "a row": places(([7], ALL_COLUMNS)),
    "rows": places(([0, 1, 50, 202], ALL_COLUMNS)),
    "adjacent rows": places((range(190, HEIGHT), ALL_COLUMNS)),
    "a column": places((ALL_ROWS, [150])),
    "few columns": places((ALL_ROWS, [0, 3, 4, 149])),
    "many columns": places((ALL_ROWS, range(0, WIDTH, 2))),
    "adjacent columns": places((ALL_ROWS, range(60, 120))),
    "a block": places((range(5, 80), range(10, 90))),
    "blocks": places((range(100), range(40, WIDTH)), (range(103, HEIGHT), [*range(60), *range(100, WIDTH)])),
    "blocks in rows that meet": places((range(100), range(105)), (range(100, HEIGHT), range(46, WIDTH))),
    "rows and columns that lie apart": places((range(0, HEIGHT, 3), range(1, WIDTH, 2))),
    "an entry": places(([100], [77])),
    "all": places((ALL_ROWS, ALL_COLUMNS)),
}
SCATTERED = places(*(([row], [row * 7 % WIDTH, row * 31 % WIDTH]) for row in ALL_ROWS))
LAYERS = {"Linear": lambda: nn.Linear(WIDTH, HEIGHT), "Conv1D": lambda: Conv1D(WIDTH, HEIGHT)}

every_unit = pytest.mark.parametrize("chosen", UNITS.values(), ids=UNITS)
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


class Called(TorchDispatchMode):
    """Counts the calls of `selected_grad_`, which are products of single entries."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.sparseft.selected_grad_.default
        return func(*args, **(kwargs or {}))


def mask_of(model, **chosen):
    """Return a mask of named parameters, a matrix of booleans each."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    lists = {name.replace("__", "."): at.flatten().nonzero().flatten().int() for name, at in chosen.items()}
    return Mask(lists, shapes)


def make_layer(make, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    layer = make().to(device, dtype)
    return layer, torch.randn(9, 5, WIDTH if isinstance(layer, nn.Linear) else HEIGHT, device=device).to(dtype)


def exact_gradient(layer, x, y):
    """Return the weight's gradient of the sum of squares of y, what the layer made of x: in fp64."""
    rows, dy = x.double().flatten(0, -2), 2 * y.detach().double().flatten(0, -2)
    return dy.T @ rows if isinstance(layer, nn.Linear) else rows.T @ dy


def assert_close(got, want):
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def saved_bytes(layer, mask, x):
    """Return the bytes that a layer keeps for backward, beside its weight."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with sparseft.compact_gradients(layer, mask) as compact:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        y.sum().backward()
        assert all(leaf.grad is not None for leaf in compact.entries.values())
    return sum(tensor.nbytes for tensor in kept if tensor.shape != layer.weight.shape)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@every_layer
@every_unit
def test_gradients(chosen, make, dtype, device):
    layer, x = make_layer(make, device, dtype)
    bias = places(([0], [0, 2, 77]), height=1, width=layer.bias.numel())
    grads = []
    for _ in range(2):
        with (
            sparseft.compact_gradients(layer, mask_of(layer, weight=chosen, bias=bias)) as compact,
            Called() as called,
        ):
            layer.zero_grad()  # entered again, it has the same leaves
            y = layer(x)
            y.square().sum().backward()
            assert called.count == 0
        grads.append(compact.entries["weight"].grad.clone())
    assert_close(grads[0], exact_gradient(layer, x, y)[chosen.to(device)])
    assert torch.equal(*grads)
    want_bias = 2 * y.detach().double().flatten(0, -2).sum(0)[[0, 2, 77]]
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # a bias's gradient has the dtype of its layer
    assert float((compact.entries["bias"].grad - want_bias).abs().max()) <= tolerance * float(want_bias.abs().max())


@every_layer
def test_single_entries_are_products_of_their_own(make):
    layer, x = make_layer(make)
    with sparseft.compact_gradients(layer, mask_of(layer, weight=SCATTERED)) as compact, Called() as called:
        y = layer(x)
        y.square().sum().backward()
    assert called.count == 1
    assert_close(compact.entries["weight"].grad, exact_gradient(layer, x, y)[SCATTERED])


@pytest.mark.parametrize("seed", range(40))
def test_bands_are_their_entries_in_order(seed, monkeypatch):
    """Of any list: rows drawn from few patterns, so that some meet, repeat after gaps, and have as many entries."""
    monkeypatch.setattr(bands, "_ENTRIES_A_LINE", 0)
    monkeypatch.setattr(bands, "_MOST_BANDS", {"cpu": 1000})
    generator = torch.Generator().manual_seed(seed)
    height, width = (int(size) for size in torch.randint(1, 30, (2,), generator=generator))
    patterns = torch.rand(3, width, generator=generator) < torch.rand(3, 1, generator=generator)
    chosen = patterns[torch.randint(0, 3, (height,), generator=generator)]
    chosen[int(torch.randint(0, height, (1,), generator=generator)), 0] = True
    found = bands.Bands.of(*chosen.nonzero().unbind(1), (height, width))
    lines, sides = iter(found.lines.tolist()), []
    for first, count in found.spans:
        sides.append(list(range(first, first + count)) if first >= 0 else list(itertools.islice(lines, count)))
    assert next(lines, None) is None
    listed = [entry for tile in zip(sides[::2], sides[1::2], strict=True) for entry in itertools.product(*tile)]
    assert listed == [tuple(entry) for entry in chosen.nonzero().tolist()]
    left, right = (torch.randn(7, size, generator=generator) for size in (height, width))
    want = (left.double().T @ right.double())[chosen]
    assert float((bands.gradient(left, right, found) - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_nothing_chosen_is_no_band():
    none = torch.empty(0, dtype=torch.int64)
    assert bands.Bands.of(none, none, (3, 4)) is None


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_or_one(tokens):
    layer = nn.Linear(WIDTH, HEIGHT)
    x = torch.randn(tokens, WIDTH)
    for name in ("rows", "few columns", "blocks"):
        with sparseft.compact_gradients(layer, mask_of(layer, weight=UNITS[name])) as compact:
            layer(x).sum().backward()
            assert torch.equal(compact.entries["weight"].grad, x.sum(0).expand(HEIGHT, -1)[UNITS[name]])


def test_few_columns_are_all_that_is_kept():
    layer, x = make_layer(LAYERS["Linear"], dtype=torch.bfloat16)
    few = UNITS["few columns"]
    # nothing but these of x: side by side in what is kept, they need no list
    assert saved_bytes(layer, mask_of(layer, weight=few), x) == x[..., :4].numel() * 2
    # for an output neuron, the input whole and the neurons' numbers
    assert saved_bytes(layer, mask_of(layer, weight=UNITS["rows"]), x) == x.nbytes + 4 * 8
    layer, x = make_layer(LAYERS["Conv1D"])
    assert saved_bytes(layer, mask_of(layer, weight=UNITS["rows"]), x) == x[..., :4].numel() * 4


@pytest.mark.parametrize("unit", ["rows", "few columns", "blocks"])
def test_inputs_and_gradients_with_gaps(unit):
    """A slice of a longer sequence, and the expanded gradient of a sum."""
    layer, x = make_layer(LAYERS["Linear"])
    with sparseft.compact_gradients(layer, mask_of(layer, weight=UNITS[unit])) as compact:
        layer(x[:, 0]).sum().backward()
    want = x[:, 0].double().sum(0).expand(HEIGHT, -1)[UNITS[unit]]
    assert_close(compact.entries["weight"].grad, want)


class Mixed(nn.Module):
    """Rows in one layer, columns in the next, single entries, blocks, nothing at all."""

    def __init__(self):
        super().__init__()
        self.rows, self.columns = nn.Linear(40, WIDTH), nn.Linear(WIDTH, HEIGHT)
        self.scattered, self.blocks = nn.Linear(HEIGHT, HEIGHT), Conv1D(WIDTH, HEIGHT)
        self.empty = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.empty(self.blocks(self.scattered(self.columns(self.rows(x).tanh()).tanh()).tanh()).tanh())


def mixed():
    torch.manual_seed(0)
    model = Mixed()
    mask = mask_of(
        model,
        rows__weight=places(([3, 9, 150], range(40)), height=WIDTH, width=40),
        columns__weight=UNITS["few columns"],
        scattered__weight=SCATTERED[:, torch.arange(HEIGHT) % WIDTH],
        blocks__weight=UNITS["blocks"],
        blocks__bias=places(([0], [5, 6]), height=1),
    )
    return model, mask, torch.randn(6, 7, 40)


def test_layers_of_one_model_differ():
    model, mask, x = mixed()
    with sparseft.compact_gradients(model, mask), Called() as called:
        model(x).square().sum().backward()
        model.zero_grad()
    assert called.count == 1
    assert_same_gradients(model, mask, lambda model: model(x).square().sum())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, mask, x = mixed()

    def loss(model):
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).square().sum()

    assert_same_gradients(model, mask, loss)


def test_autocast_around_forward_and_backward():
    model, mask, x = mixed()

    def loss(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(x).float().square().sum()
            result.backward(retain_graph=True)
            model.zero_grad()
            return result

    assert_same_gradients(model, mask, loss, 0.05)


@pytest.mark.parametrize("cast", [False, True])
def test_a_compiled_model(cast):
    model, mask, x = mixed()
    with sparseft.compact_gradients(model, mask) as compact:
        grads = []
        for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            torch._dynamo.reset()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                loss = run(x).float().square().sum()
            loss.backward()
            grads.append([leaf.grad.clone() for leaf in compact.entries.values()])
            model.zero_grad()
    torch._dynamo.reset()
    for eager, compiled in zip(*grads, strict=True):
        tolerance = 0.02 if cast else 1e-5
        assert float((eager - compiled).abs().max()) <= tolerance * float(eager.abs().max())


def test_accumulated_over_batches_and_uses():
    model, mask, x = mixed()
    batches = [x, x.flip(0), 2 * x]

    def loss(model):
        for batch in batches[1:]:
            model(batch).square().sum().backward()
        return (model(x) + model(x.flip(1))).square().sum()

    assert_same_gradients(model, mask, loss)


def test_training_with_clipping_is_that_of_dense_gradients():
    model, mask, x = mixed()
    other, _, _ = mixed()
    chosen = {name: mask[name].long() for name in mask}
    optimizer = torch.optim.SGD([other.get_parameter(name) for name in mask], lr=0.1, momentum=0.9)
    with sparseft.compact_gradients(model, mask):
        leaves = torch.optim.SGD(mask.param_groups(model), lr=0.1, momentum=0.9)
        for step in range(5):
            batch = x + step
            leaves.zero_grad()
            model(batch).square().mean().backward()
            torch.nn.utils.clip_grad_norm_([p for group in leaves.param_groups for p in group["params"]], 0.05)
            leaves.step()
            optimizer.zero_grad()
            other(batch).square().mean().backward()
            for name, at in chosen.items():
                grad = other.get_parameter(name).grad
                grad.copy_(torch.zeros(grad.numel()).index_copy(0, at, grad.flatten()[at]).view(grad.shape))
            torch.nn.utils.clip_grad_norm_([other.get_parameter(name) for name in mask], 0.05)
            optimizer.step()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    assert not torch.equal(model.columns.weight, mixed()[0].columns.weight)


@pytest.mark.parametrize(("structure", "block"), [("row", None), ("column", None), ("block", (16, 16))])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama tied", "t5"])
def test_what_select_makes(name, structure, block):
    model = models.make(name).eval()
    options = {"structure": structure, **({"block": block} if block else {})}
    mask = sparseft.select("random", model, density=0.3, include="*weight", **options)
    batch = models.batch(name)
    assert_same_gradients(model, mask, lambda model: model(**batch).loss)
