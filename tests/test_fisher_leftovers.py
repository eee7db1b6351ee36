"""What no rule captures: composed weights, raw tensors in einsum, recurrent layers; by torch.func, or one by one."""

import copy
import warnings
import weakref
from collections import deque

import models
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_exact, assert_same_gradients, own_loss_loop
from exactness import assert_same as assert_same_scores
from models import one_thread  # noqa: F401
from nets import C, H, N, Net, data, parameter
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sparseft.fisher import batch_one_fisher, estimate_fisher, sample_gradients, vmapped
from sparseft.fisher.escapes import released
from sparseft.fisher.loss import Objective
from sparseft.fisher.one_pass import OnePass
from sparseft.fisher.report import FisherReport, FisherScores
from sparseft.fisher.state import evaluation
from sparseft.fisher.tally import Squares

TOGETHER, ALONE = "several samples at a time, by torch.func", "one sample at a time: "
RECURRENT = f"{ALONE}torch.func would take the kernels of recurrent layers apart"
REFUSED = f"{ALONE}torch.func refuses the model ("


class Recurrent(Net):
    def odd(self, x):
        return self.inner(x)[0]


class Cell(Net):
    def odd(self, x):
        state, states = x.new_zeros(len(x), H), []
        for token in x.unbind(1):
            state = self.inner(token, state)
            states.append(state)
        return torch.stack(states, 1)


class Composed(Net):
    def odd(self, x):
        return self.inner(x)


class Heads(Net):
    def odd(self, x):
        return torch.einsum("ntd,hde->nthe", x, self.inner).flatten(2).tanh()


class Tied(Net):
    # one raw tensor, contracted and composed with: its gradients are added before they are squared
    def odd(self, x):
        y = torch.einsum("ntd,de->nte", x, self.inner).tanh()
        return F.linear(y, self.inner @ self.inner + self.inner)


class Scalar(Net):
    def odd(self, x):
        return x.sigmoid() ** self.inner.exp()


class Plus(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.up, self.down = parameter(H, rank), parameter(rank, H)

    def forward(self, weight):
        return weight + self.up @ self.down


def low_rank():
    layer = nn.TransformerEncoderLayer(H, 2, H, batch_first=True)
    parametrize.register_parametrization(layer.linear1, "weight", Plus(2))
    return layer


WEIGHT_NORM = "inner.parametrizations.weight.original0"
# model -> how it is made, a parameter that no rule captures, how the fallback takes the samples
MODELS = {
    "LSTM": (Recurrent, lambda: nn.LSTM(H, H, batch_first=True), "inner.weight_hh_l0", RECURRENT),
    "GRU, both ways": (
        Recurrent,
        lambda: nn.GRU(H, H // 2, batch_first=True, bidirectional=True),
        "inner.bias_ih_l0_reverse",
        RECURRENT,
    ),
    "GRU cell": (Cell, lambda: nn.GRUCell(H, H), "inner.weight_ih", TOGETHER),
    "weight norm": (Composed, lambda: parametrizations.weight_norm(nn.Linear(H, H)), WEIGHT_NORM, TOGETHER),
    "composed in a transformer": (Composed, low_rank, "inner.linear1.parametrizations.weight.0.up", TOGETHER),
    "einsum": (Heads, lambda: parameter(2, H, H // 2), "inner", TOGETHER),
    "tied": (Tied, lambda: parameter(H, H), "inner", TOGETHER),
    "scalar": (Scalar, lambda: nn.Parameter(torch.tensor(0.3)), "inner", TOGETHER),
}


def made(name):
    torch.manual_seed(0)
    kind, inner, left, way = MODELS[name]
    return kind(inner=inner()), left, way


def batches():
    ids, labels = data()
    return [(ids[:3], labels[:3]), (ids[3:], labels[3:])]


def assert_same(scores, expected):
    assert scores.keys() == expected.keys()
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        # a key's bias has a gradient that is zero but for rounding
        error = float((scores[name] - value).abs().max()) / max(float(value.max()), 1e-9 * largest)
        assert error <= 1e-5, f"{name}: error {error:.1e}"


def gradients_of(model, ids, labels):
    """Return the gradients of each sample, name -> [N, ...], by plain autograd."""
    rows = {name: [] for name, _ in model.named_parameters()}
    for sample, label in zip(ids.split(1), labels.split(1), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model.eval()(sample), label), list(model.parameters()))
        for name, grad in zip(rows, grads, strict=True):
            rows[name].append(grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}


@pytest.mark.parametrize("name", MODELS)
def test_leftovers_are_exact_and_reported(name):
    model, left, way = made(name)
    with pytest.warns(UserWarning, match="parameters take the slow path") as found:
        scores = estimate_fisher(model, batches(), progress=False)
    assert scores.report.rules[left] == "fallback"
    assert scores.report.way == way
    assert f"no rule for {left} (" in str(scores.report)
    assert f"what has no rule: {way}" in str(scores.report)
    assert len(found) == 1
    assert way in str(found[0].message)
    assert_same(scores, {key: grads.square().mean(0) for key, grads in gradients_of(model, *data()).items()})


@pytest.mark.parametrize("mode", ["expected", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_leftovers_in_other_modes(name, mode):
    model, _, way = made(name)
    scores = estimate_fisher(model, batches(), mode=mode, progress=False)
    assert scores.report.way == way
    assert_same(scores, batch_one_fisher(model, batches(), mode=mode))


@pytest.mark.parametrize("name", ["GRU cell", "einsum", "LSTM"])
def test_leftovers_token_by_token(name):
    model, _, way = made(name)

    def losses(model, batch):
        logits = model.out(model.odd(model.embed(batch[0])))
        return F.cross_entropy(logits.flatten(0, 1), batch[0].flatten() % C, reduction="none").view(batch[0].shape)

    options = {"loss": losses, "token_reduction": "token"}
    assert assert_exact(model, batches(), **options).report.way == way


@pytest.mark.parametrize("name", ["LSTM", "einsum", "tied", "scalar"])
def test_gradients_of_each_sample_and_their_norms(name):
    model, _, way = made(name)
    expected = gradients_of(model, *data())
    every = {key: torch.arange(p.numel()) for key, p in model.named_parameters()}
    found = sample_gradients(model, batches(), every, progress=False)
    assert found.report.way == way
    assert_same_gradients(found, {key: grads.reshape(N, -1) for key, grads in expected.items()})
    norms, sums = dict.fromkeys(range(N), 0.0), {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    with evaluation(model, parameters):
        run = OnePass(model, Objective("empirical", None, "mean", 0), parameters, FisherReport("empirical"))
        run.add(Squares(sums, norms), data(), list(range(N)))
    wanted = sum(grads.double().reshape(N, -1).square().sum(1) for grads in expected.values())
    assert list(norms.values()) == pytest.approx(wanted.tolist(), rel=1e-5)


class Measures(Net):
    # a value, and goes on with it, on a way that only longer texts take
    def odd(self, x):
        y = torch.einsum("ntd,de->nte", x, self.inner)
        return torch.stack([row / float(row.detach().abs().max()) for row in y]) if x.shape[1] > 6 else y


def test_a_model_that_measures_values_is_done_one_by_one_from_there_on():
    torch.manual_seed(0)
    model = Measures(inner=parameter(H, H))
    short, long, last = (data(4, length, seed=length) for length in (6, 7, 5))
    assert assert_exact(model, [short]).report.way == TOGETHER
    for order in ([long], [short, long, last]):
        assert assert_exact(model, order).report.way.startswith(f"{REFUSED}RuntimeError: vmap: It looks like")


class Asks(Net):
    # and goes a way of its own with texts that end with a small word
    def odd(self, x):
        y = torch.einsum("ntd,de->nte", x, self.inner)
        if len(x) > 1:
            return torch.stack([self.odd(row[None])[0] for row in x])
        if not y.isfinite().all():
            raise ValueError("every value must be finite")
        last = x[:, -1, :1].detach()
        return y.tanh() if last.gt(0) or bool((last.abs().sum() * 0).int().item()) else y.sigmoid()


@pytest.mark.parametrize("mode", ["empirical", "expected"])
def test_samples_that_answer_differently_go_apart(monkeypatch, mode):
    sizes, together = [], vmapped.Vmapped._together

    def noted(self, samples, answers):
        found = together(self, samples, answers)
        sizes.append(sorted(samples))
        return found

    monkeypatch.setattr(vmapped.Vmapped, "_together", noted)
    torch.manual_seed(0)
    model = Asks(inner=parameter(H, H))
    ids, labels = data()
    small = model.embed(ids[:, -1])[:, 0].gt(0)
    assert 1 < small.sum() < N
    assert assert_exact(model, [(ids, labels)], mode=mode).report.way == TOGETHER
    groups = [small.nonzero()[:, 0].tolist(), small.logical_not().nonzero()[:, 0].tolist()]
    assert sizes == [*groups, *groups]  # when tried, and when used


class _Doubled(torch.autograd.Function):
    """x @ w, whose batching rule has a factor that it should not have."""

    @staticmethod
    def forward(x, w):
        return x @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.mT, (x.mT @ grad).sum(0) if x.dim() > w.dim() else x.mT @ grad

    @staticmethod
    def vmap(info, in_dims, x, w):
        w = w if in_dims[1] is None else w.movedim(in_dims[1], 0)[:, None]
        return (x.movedim(in_dims[0], 0) @ w) * 1.001, 0


class WrongRule(Net):
    def odd(self, x):
        return _Doubled.apply(x, self.inner)


def test_a_wrong_batching_rule_is_noticed():
    torch.manual_seed(0)
    model = WrongRule(inner=parameter(H, H))
    way = assert_exact(model, batches()).report.way
    assert way.startswith(f"{ALONE}torch.func gives another gradient of inner, off by ")


class Shift(Net):
    # of all logits of a query alike, as a key's bias is: the gradient is zero but for rounding
    def odd(self, x):
        keys = x + torch.einsum("nt,d->ntd", torch.ones_like(x[..., 0]), self.inner)
        return torch.einsum("nts,nsd->ntd", torch.einsum("ntd,nsd->nts", x, keys).softmax(2), x)


def test_rounding_is_not_taken_for_a_wrong_rule():
    torch.manual_seed(0)
    model = Shift(inner=parameter(H))
    scores = estimate_fisher(model, batches(), progress=False)
    assert (set(scores.report.fallback), scores.report.way) == ({"inner"}, TOGETHER)
    assert_same_scores(scores, batch_one_fisher(model, batches()), noise=("inner",))


def chunks(monkeypatch, refuse_at=None):
    """Note how many samples torch.func takes at a time; let it refuse one call."""
    sizes, original = [], vmapped.Vmapped.gradients

    def gradients(self, samples, *rest):
        sizes.append(len(samples))
        if len(sizes) == refuse_at:
            raise NotImplementedError("not today\nand not tomorrow")
        return original(self, samples, *rest)

    monkeypatch.setattr(vmapped.Vmapped, "gradients", gradients)
    return sizes


@pytest.mark.parametrize(("mode", "gradients"), [("empirical", 1), ("expected", C - 1)])
def test_memory_bounds_how_many_samples_are_taken_at_a_time(monkeypatch, mode, gradients):
    sizes = chunks(monkeypatch)
    model, _, _ = made("einsum")
    monkeypatch.setattr(vmapped, "_ROOM", {"cpu": (2 * gradients * 4 * model.inner.numel() + 3, 2)})
    assert assert_exact(model, [data()], mode=mode).report.way == TOGETHER
    assert sizes == [2, 2, 2, 1]  # the first to try
    monkeypatch.setattr(vmapped, "_ROOM", {"cpu": (2 * gradients * 4 * model.inner.numel() - 1, 2)})
    way = assert_exact(model, [data()], mode=mode).report.way
    assert way == f"{ALONE}several would take too much memory"
    assert len(sizes) == 4


def test_a_refusal_in_the_middle_of_a_batch_loses_no_sample(monkeypatch):
    sizes = chunks(monkeypatch, refuse_at=3)
    model, _, _ = made("einsum")
    monkeypatch.setattr(vmapped, "_ROOM", {"cpu": (2 * 4 * model.inner.numel(), 2)})
    way = assert_exact(model, [data(), data(seed=1)]).report.way
    assert way == f"{REFUSED}not today)"
    assert sizes == [2, 2, 2]


def test_batches_of_one_sample_have_nothing_to_take_together(monkeypatch):
    sizes = chunks(monkeypatch)
    model, _, _ = made("einsum")
    ids, labels = data()
    alone = list(zip(ids.split(1), labels.split(1), strict=True))
    assert assert_exact(model, alone).report.way == f"{ALONE}no batch had two"
    assert not sizes
    # one is over: it goes alone, and so do those before the first two
    assert assert_exact(model, [alone[0], (ids[1:4], labels[1:4]), alone[4]]).report.way == TOGETHER
    assert sizes == [3, 3]  # tried, and used


def test_samples_without_a_gradient_tell_nothing(monkeypatch):
    sizes = chunks(monkeypatch)
    model, _, _ = made("einsum")
    ids, labels = data(6)
    ignored = torch.full_like(labels, -100)
    assert assert_exact(model, [(ids[:2], ignored[:2]), (ids[2:], labels[2:])]).report.way == TOGETHER
    assert sizes == [4, 4]
    way = assert_exact(model, [(ids, ignored)]).report.way
    assert way == f"{ALONE}inner had no gradient to compare"
    assert len(sizes) == 2


class Remembers(Net):
    # what it has last seen, in an attribute and in a buffer, and a weight that is composed by a hook
    def odd(self, x):
        self.seen = y = self.inner(torch.einsum("ntd,de->nte", x, self.raw)).tanh()
        self.register_buffer("mean", y.detach().mean(1), persistent=False)
        return y


def test_nothing_of_a_transform_stays_in_the_model():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = Remembers(inner=nn.utils.weight_norm(nn.Linear(H, H)), raw=parameter(H, H))
    assert assert_exact(model, batches()).report.way == TOGETHER
    for tensor in (model.seen, model.mean, model.inner.weight):
        assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    # what they have is of an ordinary pass, and the next one makes its own
    assert model.seen.shape[1:] == (6, H)
    model(data(2)[0])
    assert len(model.seen) == len(model.mean) == 2


class Keeps(Net):
    # what it has seen, in whatever it was given
    def odd(self, x):
        y = torch.einsum("ntd,de->nte", x, self.inner).tanh()
        self.keep(y)
        return y


class _Holder:
    def __init__(self):
        self.last, self.cells, self.all = {"mean": torch.zeros(())}, [], deque(maxlen=3)

    def __call__(self, y):
        # a running statistic, a history, and a cache by shape that is filled once
        self.last["mean"] = 0.9 * self.last["mean"] + 0.1 * y.detach().mean()
        self.all.append(y.detach())
        self.cells.append(y)
        self.last.setdefault((len(y), y.shape[1]), torch.ones_like(y))


def _into_closure():
    kept = []

    def keep(y):
        kept.append(y)
        return kept

    return keep


EVERYWHERE = []


@pytest.mark.parametrize("make", [_Holder, _into_closure, lambda: EVERYWHERE.append])
def test_what_code_keeps_is_no_tensor_of_a_transform(make):
    torch.manual_seed(0)
    model = Keeps(inner=parameter(H, H))
    model.keep = keep = make()
    ids, labels = data(12)
    sizes = [4, 3, 2, 2, 1]
    way = assert_exact(model, list(zip(ids.split(sizes), labels.split(sizes), strict=True))).report.way
    assert way == f"{REFUSED}code keeps tensors of a forward pass)"
    model(ids)
    kept = [*keep.cells, *keep.all, *keep.last.values()] if make is _Holder else EVERYWHERE or keep(ids)
    assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, kept))
    EVERYWHERE.clear()


class _Slots:
    __slots__ = ("last",)


def test_a_tensor_that_lives_on_is_that_of_the_first_sample():
    made, slots, plain, held = [], _Slots(), _Holder(), {"nest": [(0, None)]}
    last = None

    def keep(row):
        nonlocal last
        y = row * 2
        made.append(weakref.ref(y))
        last = slots.last = plain.any = held["y"] = y
        held["nest"][0] = (1, y)
        cycle = [y * 3]
        cycle.append(cycle)
        return y.sum()

    x = torch.arange(6.0).view(3, 2)
    torch.func.vmap(keep, in_dims=1)(x)
    assert not released(made)
    for found in (last, slots.last, plain.any, held["y"], held["nest"][0][1]):
        assert found.tolist() == [0, 4, 8]
    made.clear()
    torch.func.vmap(lambda row: made.append(weakref.ref(row * 2)) or row)(x)
    assert released(made)


def test_a_loss_may_keep_its_own_account():
    torch.manual_seed(0)
    model = Heads(inner=parameter(2, H, H // 2))

    class Loss:
        total, every = torch.zeros(()), []

        def __init__(self):
            self.every = []

        def __call__(self, model, batch):
            losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
            self.total = self.total + losses.detach().sum()
            self.every.append(losses.detach())
            return losses

    loss = Loss()
    assert assert_exact(model, batches(), loss=loss).report.way == f"{REFUSED}code keeps tensors of a forward pass)"
    assert torch.cat(loss.every).isfinite().all()
    assert float(loss.total) > 0


class Swallows(Net):
    # the error of a question that cannot be answered, and goes on as if the answer were yes
    def odd(self, x):
        rows = []
        for x_n, y_n in zip(x, torch.einsum("ntd,de->nte", x, self.inner), strict=True):
            try:
                yes = self.ask(x_n[-1, 0].detach())
            except Exception:  # noqa: BLE001
                yes = True
            rows.append(y_n.tanh() if yes else y_n.sigmoid())
        return torch.stack(rows)


@pytest.mark.parametrize(
    ("ask", "way"),
    [
        (lambda value: bool(value > 0), TOGETHER),
        (lambda value: value.item() > 0, f"{REFUSED}RuntimeError: vmap: It looks like"),
        (lambda value: value.numpy() > 0, f"{REFUSED}"),
        (lambda value: "-" not in str(value), f"{REFUSED}RuntimeError: a text is made of a value)"),
        (lambda value: "-" not in f"{value}", f"{REFUSED}RuntimeError: a text is made of a value)"),
    ],
)
def test_an_error_that_the_model_catches_is_an_error(ask, way):
    torch.manual_seed(0)
    model = Swallows(inner=parameter(H, H))
    model.ask = ask
    ids, labels = data(12)
    # the first that are tried answer alike
    ids = ids[model.embed(ids[:, -1])[:, 0].gt(0).argsort(descending=True, stable=True)]
    parts = list(zip(ids.split(6), labels.split(6), strict=True))
    assert assert_exact(model, parts).report.way.startswith(way)


class Hidden(Net):
    # a list holds the parameter too, of which torch.func knows nothing
    def odd(self, x):
        if len(x) > 1:
            return torch.cat([self.odd(row[None]) for row in x])
        weight = self.inner if bool(x[0, -1, 0] > 0) else self.hidden[0]
        return torch.einsum("ntd,de->nte", x, weight).tanh()


class Sometimes(Net):
    # a parameter that few samples use
    def odd(self, x):
        used = x[:, -1:, :1].detach().gt(0).to(x.dtype)
        y = torch.einsum("ntd,de->nte", x, self.inner)
        return (y + (1 - used) * torch.einsum("ntd,de->nte", x, self.other)).tanh()


def ordered(model):
    """Return samples, those first whose last word begins with more than 0; there are more than eight of these."""
    ids, labels = data(24)
    more = model.embed(ids[:, -1])[:, 0].gt(0)
    assert 8 < more.sum() < 24
    order = more.argsort(descending=True, stable=True)
    return ids[order], labels[order]


def test_a_parameter_in_another_place_is_noticed():
    torch.manual_seed(0)
    model = Hidden(inner=parameter(H, H))
    model.hidden = [model.inner]
    ids, labels = ordered(model)
    way = assert_exact(model, [(ids[:8], labels[:8]), (ids[8:], labels[8:])]).report.way
    assert way == f"{REFUSED}RuntimeError: inner is held in more than one place)"


def test_a_gradient_that_was_not_compared_is_not_trusted(monkeypatch):
    sizes = chunks(monkeypatch)
    torch.manual_seed(0)
    model = Sometimes(inner=parameter(H, H), other=parameter(H, H))
    ids, labels = ordered(model)
    for count in (1, 4):
        way = assert_exact(model, [(ids[:8], labels[:8])] * count).report.way
        assert way == f"{ALONE}other had no gradient to compare"
    assert not sizes
    assert assert_exact(model, [(ids[:8], labels[:8]), (ids[8:].flip(0), labels[8:].flip(0))]).report.way == TOGETHER
    assert sizes == [8, 16]


def test_hooks_on_gradients_run():
    model, _, _ = made("einsum")
    model.inner.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    assert assert_exact(model, batches()).report.way == f"{ALONE}torch.func runs no hooks on gradients of parameters"


def test_what_is_composed_has_a_gradient_of_each_sample_too(monkeypatch):
    sizes = chunks(monkeypatch)
    torch.manual_seed(0)
    layer = nn.Linear(H, H)
    parametrize.register_parametrization(layer, "weight", Plus(1))
    model = Composed(inner=layer)
    names = ["inner.parametrizations.weight.0.up", "inner.parametrizations.weight.0.down"]
    # the product, the sum, and the gradients of both vectors
    monkeypatch.setattr(vmapped, "_ROOM", {"cpu": (2 * 4 * (2 * H * H + 2 * H), 2)})
    assert assert_exact(model, [data()], names=names).report.way == TOGETHER
    assert sizes == [2, 2, 2, 1]
    monkeypatch.setattr(vmapped, "_ROOM", {"cpu": (2 * 4 * (2 * H * H + 2 * H) - 1, 2)})
    assert assert_exact(model, [data()], names=names).report.way == f"{ALONE}several would take too much memory"


class Searches(Net):
    # a step after the other, until its own is found
    def odd(self, x):
        if len(x) > 1:
            return torch.cat([self.odd(row[None]) for row in x])
        y, steps = torch.einsum("ntd,de->nte", x, self.inner), 0
        while bool(x[0, -1, 0] > steps / 4 - 1) and steps < 8:
            y, steps = y.tanh(), steps + 1
        return y


def test_what_is_composed_in_place_counts(monkeypatch):
    class Scattered(nn.Module):
        def __init__(self):
            super().__init__()
            self.few = parameter(3)

        def forward(self, weight):
            update = torch.zeros_like(weight)
            update[[0, 1, 2], [3, 4, 5]] = self.few
            return weight + update

    torch.manual_seed(0)
    layer = nn.Linear(H, H)
    parametrize.register_parametrization(layer, "weight", Scattered())
    model = Composed(inner=layer)
    monkeypatch.setattr(vmapped, "_ROOM", {"cpu": (2 * 4 * (2 * H * H + 3) - 1, 2)})
    scores = assert_exact(model, [data()], names=["inner.parametrizations.weight.0.few"])
    assert scores.report.way == f"{ALONE}several would take too much memory"


def test_samples_that_go_too_many_ways_go_alone():
    torch.manual_seed(0)
    model = Searches(inner=parameter(H, H))
    ids, labels = data(8)
    assert len({float(value) for value in model.embed(ids[:, -1])[:, 0]}) > 4
    assert assert_exact(model, [(ids, labels)]).report.way == f"{REFUSED}samples go too many ways)"


class Warns(Net):
    def odd(self, x):
        warnings.warn("of the model", stacklevel=1)
        return torch.einsum("ntd,de->nte", x, self.inner).tanh()


def test_warnings_of_the_model_are_shown_as_often_as_without():
    torch.manual_seed(0)
    model = Warns(inner=parameter(H, H))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        assert estimate_fisher(model, batches(), progress=False).report.way == TOGETHER
    assert sum(str(each.message) == "of the model" for each in found) == 1


class Roots(Net):
    def odd(self, x):
        return torch.einsum("ntd,de->nte", x.abs().sqrt(), self.inner).tanh()


def test_gradients_that_are_not_finite_tell_nothing():
    torch.manual_seed(0)
    model = Roots(inner=parameter(H, H))
    with torch.no_grad():
        model.embed.weight[3] = 0
    ids, labels = data(6)
    ids = torch.where(ids.eq(3), 4, ids)
    for bad in range(len(ids)):
        broken = ids.clone()
        broken[bad, 2] = 3
        scores = estimate_fisher(model, [(broken, labels)], progress=False, max_dropped=1.0)
        assert scores.report.way == TOGETHER
        assert scores.report.dropped == [bad]


class TimeFirst(Net):
    def forward(self, ids):
        return self.out(torch.einsum("tnd,de->tne", self.embed(ids), self.inner).tanh().mean(0))


def test_samples_in_another_dimension():
    torch.manual_seed(0)
    ids, labels = data()
    model = TimeFirst(inner=parameter(H, H))
    scores = assert_exact(model, [{"ids": ids.mT.contiguous(), "labels": labels}], batch_dim={"ids": 1})
    assert scores.report.way == TOGETHER


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float64, 1e-5)])
def test_other_precisions(dtype, bound):
    model, _, _ = made("tied")
    model.to(dtype)
    scores = estimate_fisher(model, batches(), progress=False)
    assert scores.report.way == TOGETHER
    assert_same_scores(scores, batch_one_fisher(model, batches()), bound)


@pytest.mark.parametrize("name", ["deberta", "gemma2", "gpt2 eager", "vit", "bert multilabel", "t5", "bert masked"])
def test_a_composed_weight_in_models_of_transformers(name):
    model = models.make(name)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    parametrizations.weight_norm(linears[len(linears) // 2])
    batch = models.batch(name)
    scores = estimate_fisher(model, [batch], progress=False)
    assert any(name.endswith("weight.original1") for name in scores.report.fallback)
    assert_same_scores(scores, own_loss_loop(model, batch))


def test_how_the_fallback_went_is_saved_with_the_scores(tmp_path):
    model, _, _ = made("einsum")
    scores = estimate_fisher(model, batches(), progress=False)
    scores.save(tmp_path / "scores")
    loaded = FisherScores.load(tmp_path / "scores")
    assert loaded.report.way == TOGETHER
    more = estimate_fisher(copy.deepcopy(model), batches(), resume=loaded, progress=False)
    assert more.report.way == TOGETHER
