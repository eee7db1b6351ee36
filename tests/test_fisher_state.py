"""What a pass leaves behind, what it refuses, and what bad samples do to it: nothing."""

import models
import pytest
import torch
import torch.nn.functional as F
from models import one_thread  # noqa: F401
from torch import nn

from sparseft.fisher import batch_one_fisher, estimate_fisher
from sparseft.fisher import ledger as ledgers


class WithState(nn.Module):
    """Counts its calls in buffers, one of which it replaces."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.lin = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.fail = None

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        if self.fail is not None and not self.training:
            raise self.fail
        return self.lin(self.norm(x))


def snapshot(model):
    return (
        {name: (p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: (id(buffer), buffer.tolist()) for name, buffer in model.named_buffers()},
        {name: value.clone() for name, value in model.state_dict().items()},
    )


@pytest.mark.parametrize("fail", [None, ValueError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", [estimate_fisher, batch_one_fisher])
def test_the_model_is_left_as_it_was_found(function, fail):
    model = WithState()
    model.norm.eval()
    model.lin.bias.requires_grad_(False)
    model.lin.weight.grad = torch.ones(3, 4)
    grad = model.lin.weight.grad
    hooked, seen = [], []
    model.lin.weight.register_hook(lambda g: hooked.append("tensor"))
    model.lin.weight.register_post_accumulate_grad_hook(lambda p: hooked.append("accumulated"))
    model.lin.register_forward_hook(lambda *a: seen.append("forward"))
    before = snapshot(model)
    model.fail = fail
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    if fail is None:
        scores = function(model, [(x, y)], names=["lin.weight", "lin.bias", "norm.weight"])
        assert set(scores) == {"lin.weight", "lin.bias", "norm.weight"}
        assert float(scores["lin.bias"].max()) > 0
    else:
        with pytest.raises(type(fail)):
            function(model, [(x, y)])
    model.fail = None
    after = snapshot(model)
    assert before[:3] == after[:3]
    for name, value in before[3].items():
        assert torch.equal(value, after[3][name])
    assert model.lin.weight.grad is grad
    assert torch.equal(grad, torch.ones(3, 4))
    if function is estimate_fisher:
        assert not hooked
    # hooks are still there, and work
    hooked.clear(), seen.clear()
    model(x).sum().backward()
    assert hooked == ["tensor", "accumulated"]
    assert seen == ["forward"]
    model.norm.reset_running_stats()


class Interrupted(nn.Module):
    """Is interrupted in the given forward run, or in the backward run that follows it."""

    def __init__(self, run, backward):
        super().__init__()
        self.lin, self.dropout, self.runs, self.backward = nn.Linear(4, 3), nn.Dropout(), run, backward
        self.lin.bias.requires_grad_(False)

    def interrupt(self, *args):
        raise KeyboardInterrupt

    def forward(self, x):
        self.runs -= 1
        y = self.lin(self.dropout(x))
        if self.runs == 0:
            y.register_hook(self.interrupt) if self.backward else self.interrupt()
        return y


# the probe runs with one sample and with two, from which it goes back, and with each of these and its copy
@pytest.mark.parametrize(
    ("run", "backward"), [(1, False), (2, False), (3, False), (5, False), (2, True), (5, True), (0, False)]
)
def test_an_interruption_leaves_the_model_as_it_was_found(run, backward):
    def data():
        yield X, Y
        if run == 0:
            raise KeyboardInterrupt

    for function in (estimate_fisher, batch_one_fisher):
        model = Interrupted(run, backward)
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            function(model, data())
        assert snapshot(model)[:3] == before[:3]
        assert torch._C._len_torch_function_stack() == 0
        assert torch.is_grad_enabled()


def test_gradient_checkpointing_of_transformers_is_left_on_and_does_no_harm():
    for reentrant in (True, False):
        model, batch = models.make("llama"), models.batch("llama")
        expected = estimate_fisher(model, [batch], progress=False)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        scores = estimate_fisher(model, [batch], progress=False)
        assert model.is_gradient_checkpointing
        for name, value in expected.items():
            assert torch.equal(scores[name], value)


class Inverse(nn.Module):
    """A loss that is finite for x = 0, with a gradient that is not: sqrt(w x) below a layer that stays finite."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 4, bias=False)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x).abs().sqrt())


def bad_at(positions, samples):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(samples, 1, generator=generator) + 0.5
    for position, value in positions.items():
        x[position] = value
    return x, torch.randint(0, 3, (samples,), generator=generator)


def without(positions, x, y):
    kept = [n for n in range(len(x)) if n not in positions]
    return x[kept], y[kept]


@pytest.mark.parametrize("journal", ["kept", "too small"])
@pytest.mark.parametrize(
    "bad",
    [
        {3: 0.0},  # the gradient of `first` is infinite, that of `last` is not
        {3: float("nan")},
        {0: 0.0, 1: float("inf"), 2: float("nan")},
        {5: 0.0, 44: 0.0, 61: float("nan"), 62: 0.0},
    ],
)
def test_bad_samples_are_dropped_and_leave_no_trace(bad, journal, monkeypatch):
    model = Inverse()
    x, y = bad_at(bad, 63)
    batches = list(zip(x.split(3), y.split(3), strict=True))
    if journal == "too small":
        # the model has 19 numbers, so a few batches outgrow it; a bad sample then meets the checked path
        monkeypatch.setattr(ledgers, "_CHECK_EVERY", 10**6)
    else:
        monkeypatch.setattr(ledgers, "nbytes", lambda batch: 0)
    scores = estimate_fisher(model, batches, progress=False, max_dropped=0.1)
    assert scores.report.dropped == sorted(bad)
    assert scores.report.positions == [n for n in range(63) if n not in bad]
    assert f"dropped as not finite: {len(bad)} samples" in str(scores.report)
    for name, value in batch_one_fisher(model, [without(bad, x, y)]).items():
        torch.testing.assert_close(scores[name], value)


def test_healthy_data_are_run_once_and_never_copied(monkeypatch):
    monkeypatch.setattr(ledgers, "nbytes", lambda batch: 0)
    monkeypatch.setattr(ledgers.Ledger, "_add_checked", lambda *a: pytest.fail("a healthy batch was run twice"))
    calls = []
    model = Inverse()
    model.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    x, y = bad_at({}, 60)
    estimate_fisher(model, [(x[:30], y[:30]), (x[30:], y[30:])], progress=False)
    # two batches, and what the probe runs: one sample, two samples, each of them with its copy
    assert calls == [1, 2, 2, 2, 30, 30]


def test_nothing_but_bad_samples_is_an_error():
    x, y = bad_at({0: 0.0, 1: float("nan")}, 2)
    with pytest.raises(ValueError, match="finite"):
        estimate_fisher(Inverse(), [(x, y)], progress=False)


def test_too_many_bad_samples_are_refused_by_name():
    x, y = bad_at({5: 0.0, 12: float("nan")}, 40)
    assert estimate_fisher(Inverse(), [(x, y)], progress=False).report.dropped == [5, 12]
    x, y = bad_at({5: 0.0, 12: float("nan"), 30: 0.0}, 40)
    model = Inverse()
    with pytest.raises(ValueError, match=r"at most 5.0% .* got 3 of 40, at 5, 12, 30"):
        estimate_fisher(model, [(x, y)], progress=False)
    with pytest.raises(ValueError, match=r"got 3 of 40"):
        estimate_fisher(model, [(x, y)], progress=False, max_dropped=0.0)
    assert estimate_fisher(model, [(x, y)], progress=False, max_dropped=0.08).report.samples == 37


class Coupled(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lin, self.head, self.router, self.kind = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 4), kind
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x):
        h = self.lin(x)
        if self.kind == "batch mean":
            h = h - h.mean(0)
        if self.kind == "random":
            h = F.dropout(h, 0.5, training=True)
        if self.kind == "batch norm":
            h = F.batch_norm(h, None, None, training=True)
        if self.kind == "batch norm over time":
            h = F.batch_norm(h[:, :, None].tanh() * torch.arange(1, 6), None, None, training=True).mean(2)
        if self.kind == "batch norm module":
            h = self.norm(h)
        self.routed = self.router(torch.tanh(h)).softmax(-1)
        return self.head(torch.tanh(h)) * self.routed.max(-1, keepdim=True).values


COUPLED = ["batch mean", "random", "batch norm", "batch norm over time", "batch norm module"]


@pytest.mark.parametrize("kind", COUPLED)
def test_losses_that_depend_on_other_samples_are_refused(kind):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"that sample alone|depends on the other samples"):
        estimate_fisher(Coupled(kind), [(torch.randn(5, 4), torch.randint(0, 3, (5,)))], progress=False)


def in_batch_negatives(model, batch):
    z = F.normalize(model.lin(batch[0]), dim=-1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)), reduction="none")


def balanced(weight):
    def loss(model, batch):
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        used = F.one_hot(model.routed.argmax(-1), 4).float().mean(0)
        return losses + weight * 4 * (used * model.routed.mean(0)).sum()

    return loss


@pytest.mark.parametrize("loss", [in_batch_negatives, balanced(1.0), balanced(0.01), balanced(0.001)])
def test_losses_across_the_batch_are_refused(loss):
    torch.manual_seed(0)
    data = [(torch.randn(5, 4), torch.randint(0, 3, (5,)))]
    assert estimate_fisher(Coupled(""), data, loss=balanced(0.0), progress=False).report.samples == 5
    with pytest.raises(ValueError, match=r"that sample alone, .* router"):
        estimate_fisher(Coupled(""), data, loss=loss, progress=False)


class Detached(nn.Module):
    """Samples depend on others, through tensors that no gradient goes back through, unless `attached`."""

    def __init__(self, kind, attached=False):
        super().__init__()
        self.lin, self.head, self.kind, self.attached = nn.Linear(4, 6), nn.Linear(6, 3), kind, attached

    def forward(self, x):
        h = self.lin(x)
        others = {"mean": h.mean(0), "first": h[0], "last": h[-1], "neighbour": h.roll(1, 0), "none": 0 * h}[self.kind]
        return self.head(torch.tanh(h - 0.1 * (others if self.attached else others.detach())))


def detached_negatives(model, batch):
    z = F.normalize(model.lin(batch[0]), dim=-1)
    return F.cross_entropy(z @ z.T.detach() / 0.1, torch.arange(len(z)), reduction="none")


def weighted_by_class(model, batch):
    share = F.one_hot(batch[1], 3).float().mean(0)[batch[1]]
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / share


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("kind", "loss"),
    [*((kind, None) for kind in ("mean", "first", "last", "neighbour")), ("none", detached_negatives)],
)
def test_a_dependence_that_carries_no_gradient_is_refused(kind, loss, seed):
    torch.manual_seed(seed)
    with pytest.raises(ValueError, match="that sample alone"):
        estimate_fisher(Detached(kind), [(torch.randn(5, 4), torch.randint(0, 3, (5,)))], loss=loss, progress=False)


@pytest.mark.parametrize("kind", ["mean", "first", "last", "neighbour"])
def test_the_same_dependence_with_a_gradient_is_refused(kind):
    with pytest.raises(ValueError, match="that sample alone"):
        estimate_fisher(Detached(kind, attached=True), [(X, Y)], progress=False)


class Otherwise(Detached):
    # without gradients another kernel serves: it rounds otherwise, and coarsely
    def forward(self, x):
        y = super().forward(x)
        return y if torch.is_grad_enabled() else 1.001 * y


def test_a_sample_beside_itself_that_rounds_otherwise_is_run_again():
    model = Otherwise("none")
    scores = estimate_fisher(model, [(X, Y)], progress=False)
    for name, value in batch_one_fisher(model, [(X, Y)]).items():
        torch.testing.assert_close(scores[name], value)
    with pytest.raises(ValueError, match="that sample alone"):
        estimate_fisher(Otherwise("mean"), [(X, Y)], progress=False)


def test_a_dependence_on_the_labels_of_others_is_refused():
    with pytest.raises(ValueError, match="that sample alone"):
        estimate_fisher(Detached("none"), [(X, torch.tensor([0, 0, 0, 1, 1]))], loss=weighted_by_class, progress=False)


@pytest.mark.parametrize("model", [Detached("mean"), Coupled("batch mean")])
@pytest.mark.parametrize("first", ["a single sample", "equal samples"])
def test_a_dependence_that_the_first_batch_cannot_show_is_refused_at_the_next(model, first):
    one = (X[:1], Y[:1]) if first == "a single sample" else (X[:1].expand(4, 4), Y[:1].expand(4))
    with pytest.raises(ValueError, match="that sample alone"):
        estimate_fisher(model, [one, (X, Y)], progress=False)


@pytest.mark.parametrize("kind", ["mean", "batch mean"])
def test_batches_of_one_are_what_a_loop_over_single_samples_is(kind):
    model = Detached(kind) if kind == "mean" else Coupled(kind)
    data = [(X[n : n + 1], Y[n : n + 1]) for n in range(len(X))]
    scores = estimate_fisher(model, data, progress=False)
    for name, value in batch_one_fisher(model, data).items():
        torch.testing.assert_close(scores[name], value)


def test_a_sample_that_is_not_finite_is_no_proof_of_dependence():
    x = X.clone()
    x[0, 0] = float("nan")
    one = (X[:1], Y[:1])
    assert estimate_fisher(Detached("none"), [one, (x, Y)], max_dropped=0.2, progress=False).report.dropped == [1]


def test_a_model_that_runs_single_samples_only_says_what_is_missing():
    model, batch = models.make("gpt2 classification"), models.batch("gpt2 classification", samples=1)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id"):
        estimate_fisher(model, [batch], progress=False)


X, Y = torch.randn(5, 4), torch.randint(0, 3, (5,))


def second_only(model, batch):
    return model(batch[0])[:1, 0]


@pytest.mark.parametrize(
    ("model", "batch", "options", "match"),
    [
        (nn.Embedding(5, 3, max_norm=1.0), (Y, Y), {}, r"^embedding 'weight' must not use max_norm"),
        # both show with a second sample only
        (nn.Linear(4, 3), (X, torch.tensor([3, 0, 0, 0, 0])), {}, "^labels must be classes from 0 to 2"),
        (nn.Linear(4, 3), (X, Y), {"loss": second_only}, r"^loss must return one value a sample, shape \[2\]"),
    ],
)
def test_what_is_refused_is_not_blamed_on_the_model(model, batch, options, match):
    with pytest.raises(ValueError, match=match) as raised:
        estimate_fisher(model, [batch], progress=False, **options)
    assert "pad_token_id" not in str(raised.value)


class TimeMajor(nn.Module):
    """Takes ids [T, N] and returns logits [T, N, 3] that depend on all of a sample's ids."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.last = nn.Embedding(9, 4), nn.RNN(4, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.last(self.rnn(self.embed(ids))[0])


def test_a_batch_that_is_not_first_is_named():
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 9, (7, 6)), torch.randint(0, 3, (7, 6))
    with pytest.raises(ValueError, match="batch_dim"):
        estimate_fisher(TimeMajor(), [(ids, labels)], progress=False)
    with pytest.warns(UserWarning, match="4 of 7 parameters"):
        assert estimate_fisher(TimeMajor(), [(ids, labels)], progress=False, batch_dim=1).report.samples == 6


@pytest.mark.parametrize(
    ("data", "options", "error", "match"),
    [
        ([], {}, ValueError, "at least one sample"),
        ([(X[:0], Y[:0])], {}, ValueError, "at least one sample"),
        ([X], {}, ValueError, "labels"),
        ([{"input": X}], {}, ValueError, "labels"),
        ({"input": X, "labels": Y}, {}, TypeError, "in a list"),
        (X, {}, TypeError, "in a list"),
        ([(X, Y[:3])], {}, ValueError, "same leading size"),
        ([(X, Y + 2)], {}, ValueError, "classes from 0 to 2, or -100 to ignore one, got [34]"),
        ([(X, "yes")], {}, TypeError, "tokenize"),
        ([(X, Y, Y)], {}, ValueError, "3 parts"),
        ([(X, Y)], {"samples": 0}, ValueError, "samples"),
        ([(X, Y)], {"mode": "true"}, ValueError, "mode"),
        ([(X, Y)], {"token_reduction": "max"}, ValueError, "token_reduction"),
        ([(X, Y)], {"label_smoothing": 1.0}, ValueError, "label_smoothing"),
        ([(X, Y)], {"label_smoothing": 0.1, "mode": "sampled"}, ValueError, "label_smoothing"),
        ([(X, X[:, :3])], {"label_smoothing": 0.1}, ValueError, "regression head"),
        ([(X, Y)], {"max_dropped": 5}, ValueError, "max_dropped"),
        ([(X, Y)], {"batch_dim": -1}, ValueError, "batch_dim"),
        ([(X, Y)], {"batch_dim": {"x": 1}}, ValueError, r"'0': \[5, 4\]"),
        ([(X, Y)], {"resume": "a", "checkpoint": "b"}, ValueError, "one of them"),
        ([(X, Y)], {"resume": "no such file"}, FileNotFoundError, "no such file"),
        ([(X, Y)], {"names": ["weight", "wieght"]}, ValueError, "wieght"),
        ([(X, Y)], {"names": []}, ValueError, "parameter to score"),
    ],
)
def test_bad_input_is_named(data, options, error, match):
    model = nn.Linear(4, 3)
    with pytest.raises(error, match=match):
        estimate_fisher(model, data, progress=False, **options)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_with_nothing_to_score_is_an_error():
    model = nn.Linear(4, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="requires gradients"):
        estimate_fisher(model, [(X, Y)], progress=False)


def test_shared_tensors_of_a_batch_are_not_cut():
    model, batch = models.make("bert"), models.batch("bert")
    expected = estimate_fisher(model, [batch], samples=3, progress=False)
    batch["position_ids"] = torch.arange(9)[None]
    scores = estimate_fisher(model, [batch], samples=3, progress=False)
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value)


def test_a_gradient_that_only_a_second_sample_sends_to_the_first_is_refused():
    """Its values show nothing. What watches the copies of a shared table sees it, in the second gradient alone."""

    class Positioned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.positions, self.head = nn.Linear(6, 8), nn.Embedding(5, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.first(x) + self.positions(torch.arange(5))[None]

    def loss(model, batch):
        hidden = model(batch[0]).tanh()
        total = hidden.sum((1, 2))
        earlier = torch.cat([total.new_zeros(1), (total - total.detach())[:-1]])
        return F.cross_entropy(model.head(hidden.mean(1)), batch[1], reduction="none") + earlier

    torch.manual_seed(0)
    data = [(torch.randn(4, 5, 6), torch.tensor([0, 1, 1, 0]))]
    with pytest.raises(ValueError, match="must depend on that sample alone, but its gradient in"):
        estimate_fisher(Positioned(), data, loss=loss, progress=False)
