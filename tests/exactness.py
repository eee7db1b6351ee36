"""What exact means of Fisher scores in fp32: the error of a parameter, the bound on it, and a loop to compare with."""

import torch

from sparseft.fisher import batch_one_fisher, estimate_fisher

BOUND = 1e-5
GPU_BOUND = 1e-4
# a key's bias shifts all attention logits of a query alike: its gradient is zero but for rounding
KEY_BIASES = ("key.bias", "k_proj.bias")
# shares of the model's largest score: of any parameter but such ones, NOISE would hide that it was missed
NOISE, FLOOR = 1e-9, 1e-12


def relative_errors(found, expected, noise=()):
    """Return parameter -> largest difference of its scores, relative to its largest score, or to a floor if larger.

    noise: parameters, besides biases of keys, whose gradients are zero but for rounding.
    """
    largest = max(float(value.max()) for value in expected.values())
    errors = {}
    for name, value in expected.items():
        floor = (NOISE if name.endswith(KEY_BIASES) or name in noise else FLOOR) * largest
        scale = max(float(value.abs().max()), floor, torch.finfo(torch.float32).tiny)
        errors[name] = float((found[name] - value).abs().max()) / scale
    return errors


def assert_same(found, expected, bound=None, noise=()):
    """Hold every parameter to the bound: that of fp32 on its device, unless another is given."""
    assert found.keys() == expected.keys()
    for name, error in relative_errors(found, expected, noise).items():
        allowed = bound or (BOUND if found[name].device.type == "cpu" else GPU_BOUND)
        assert error <= allowed, f"{name}: error {error:.1e}"


def assert_same_gradients(found, expected):
    """Compare gradients by their squares, so that errors are those of scores; the squares keep their signs."""
    signed = [{name: rows * rows.abs() for name, rows in each.items()} for each in (found, expected)]
    assert_same(*signed)


def assert_exact(model, batches, bound=None, **options):
    """Compare a pass with the loop of single samples, and return the scores."""
    scores = estimate_fisher(model, batches, progress=False, **options)
    assert_same(scores, batch_one_fisher(model, batches, **options), bound)
    return scores


def own_loss_loop(model, batch):
    """The oracle: the loss that transformers itself computes for a batch of one sample, nothing of sparseft."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    scores = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = len(batch["labels"])
    for one in slices(batch, 1):
        model.zero_grad()
        model(**{key: value.to(device) for key, value in one.items()}).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                scores[name] += p.grad**2 / count
    model.zero_grad()
    model.train(training)
    return scores


def slices(batch, size):
    """Cut a batch into batches of that many samples."""
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, len(batch["labels"]), size)]
