"""LayerNorm's backward with per-sample gradients: against autograd, on any number of threads, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_same

import sparseft
from sparseft import ops, reference


def arguments(generator, n, t, h):
    """Return dy, x, mean, rstd and weight."""
    dy, x, weight = (torch.randn(*shape, generator=generator) for shape in ((n, t, h), (n, t, h), (h,)))
    _, mean, rstd = torch.native_layer_norm(x, [h], weight, None, 1e-5)
    return dy, x, mean[..., 0], rstd[..., 0], weight


def test_the_reference_is_what_autograd_finds_for_one_sample_at_a_time(generator):
    dy, x, _, _, weight = (tensor.double() for tensor in arguments(generator, 3, 7, 5))
    _, mean, rstd = torch.native_layer_norm(x, [5], weight, None, 1e-5)
    got = reference.layer_norm_backward(dy, x, mean[..., 0], rstd[..., 0], weight)
    for n in range(3):
        leaves = [x[n].clone(), weight.clone(), torch.zeros_like(weight)]
        for leaf in leaves:
            leaf.requires_grad_()
        wanted = torch.autograd.grad(F.layer_norm(leaves[0], [5], *leaves[1:]), leaves, dy[n])
        for one, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(one[n], want)


def test_results_do_not_depend_on_the_number_of_threads(generator):
    given, results = arguments(generator, 3, 150, 384), []
    before = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(torch.ops.sparseft.layer_norm_backward(*given))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_what_is_not_finite_stays_in_its_token_and_sample(generator):
    dy, x, mean, rstd, weight = arguments(generator, 2, 40, 8)
    dy[1, 5, 3] = float("nan")
    dx, of_weight, of_bias = torch.ops.sparseft.layer_norm_backward(dy, x, mean, rstd, weight)
    assert dx[1, 5].isnan().all()
    assert dx.isnan().sum() == 8
    for grad in (of_weight, of_bias):
        assert grad.isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.skipif(ops.SERVED_BY["layer_norm_backward"]["cpu"] == "reference", reason="the extension is not built")
@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        (0, torch.zeros(3, 8), "dy must be .samples, tokens, features., got 2 dimensions; insert"),
        (0, torch.zeros(2, 3, 8).half(), "dy must be float32, got float16"),
        (1, torch.zeros(2, 3, 7), "x must be of the shape of dy, got another shape"),
        (1, torch.zeros(2, 3, 8).double(), "x must be float32, got float64"),
        (2, torch.zeros(2, 3, 1), "mean must be one number a token of dy"),
        (3, torch.zeros(3, 2), "rstd must be one number a token of dy"),
        (4, torch.zeros(7), "weight must be one number a feature of dy"),
    ],
)
def test_the_op_refuses(place, tensor, message):
    given = [torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(8)]
    torch.ops.sparseft.layer_norm_backward(*given)
    given[place] = tensor
    with pytest.raises(ValueError, match=message):
        torch.ops.sparseft.layer_norm_backward(*given)


class Normed(torch.nn.Module):
    """A model with one norm between two layers, of a batch that may stand second."""

    def __init__(self, norm, second):
        super().__init__()
        self.first, self.norm, self.head = torch.nn.Linear(6, 12), norm, torch.nn.Linear(12, 2)
        self.second = second

    def forward(self, x):
        x = self.first(x)
        x = self.norm(x.transpose(0, 1)).transpose(0, 1) if self.second else self.norm(x)
        return self.head(x.tanh().mean(1))


@pytest.mark.skipif(ops.SERVED_BY["layer_norm_backward"]["cpu"] == "reference", reason="the extension is not built")
@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("affine", ["both", "no bias", "none", "frozen weight"])
def test_the_fisher_pass_uses_it_where_samples_come_first_and_stays_exact(generator, monkeypatch, served, affine):
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(12, elementwise_affine=affine != "none", bias=affine != "no bias")
    model, calls = Normed(norm, second=not served), []
    if affine == "frozen weight":
        norm.weight.requires_grad_(False)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    op = torch.ops.sparseft.layer_norm_backward
    monkeypatch.setattr(torch.ops.sparseft, "layer_norm_backward", lambda *args: (calls.append(args), op(*args))[1])
    data = [(torch.randn(5, 9, 6, generator=generator), torch.randint(0, 2, (5,), generator=generator))]
    scores = sparseft.estimate_fisher(model, data, progress=False)
    assert bool(calls) == (served and affine != "none")
    assert scores.report.fallback == {}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [model.get_parameter(name) for name in names]
    wanted = {name: torch.zeros_like(parameter) for name, parameter in zip(names, parameters, strict=True)}
    for x, label in zip(*data[0], strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), label[None]), parameters)
        for name, grad in zip(names, grads, strict=True):
            wanted[name] += grad**2 / 5
    assert_same(scores, wanted)
