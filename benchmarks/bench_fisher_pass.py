"""Fisher information of every weight of a model, against an ordinary pass and the loops that others use.

Floor: the matrix products of an ordinary forward and backward pass; every way needs them.
"""

import functools

import harness
import pytest
import torch
import workloads

NAMES = {
    "estimate_fisher": "sparseft",
    "forward_backward": "forward + backward",
    "published_loop": "loop of batch 1, published",
    "tuned_loop": "loop of batch 1, tuned",
}
LOOPS = ("published_loop", "tuned_loop")
# model, batches, samples, tokens, whether the loops run too, whether peak memory is measured
ENCODER = [
    ("MiniLM", 4, 16, 128, True, True),
    # the shortest call: what it finds out about the model once weighs most
    ("MiniLM", 1, 16, 128, False, True),
    # short texts, as sentence classification has them: a loop's cost a sample does not shrink with them
    ("MiniLM", 4, 16, 48, True, False),
]
PASSES = {"cpu": ENCODER, "cuda": [*ENCODER, ("Llama of 1.36 B", 4, 8, 1024, False, True)]}


@pytest.mark.parametrize(("device", "name", "number", "n", "t", "loops", "peaks"), harness.on_devices(PASSES))
def test_fisher_pass(compare, device, name, number, n, t, loops, peaks):
    model, data = workloads.MODELS[name](device), workloads.batches(name, device, number, n, t)
    check(model, data)
    dtype = next(model.parameters()).dtype
    baselines = ("forward_backward", *(LOOPS if loops else ()))
    measured = ("estimate_fisher", *baselines) if peaks else ()
    compare(
        harness.Case("estimate_fisher", f"{name}, {number} x {n} x {t} tokens", dtype=dtype, device=device),
        functools.partial(workloads.estimate_fisher, model, data),
        {NAMES[each]: functools.partial(workloads.PASSES[each], model, data) for each in baselines},
        rounds=5,
        floor=harness.Floor(flops=workloads.forward_backward_flops(model, data)),
        peaks={NAMES[each]: harness.peak_bytes(each, device, name, number, n, t) for each in measured},
    )


def check(model, data):
    """Every parameter agrees with a loop of batch-1 backward passes, relative to its largest score.

    In fp32 to 1e-5. In bf16 both round, each at other places: there their sums agree to a few percent.
    """
    truth = workloads.tuned_loop(model, data)
    scores = workloads.estimate_fisher(model, data)
    samples = sum(len(batch["labels"]) for batch in data)
    assert scores.keys() == truth.keys()
    largest = max(float(want.max()) for want in truth.values())
    for name, want in truth.items():
        got = samples * scores[name]
        if next(model.parameters()).dtype == torch.float32:
            # a key's bias has no gradient but rounding: nothing to be compared with
            scale = max(float(want.max()), 1e-12 * largest)
            torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=1e-5, msg=name)
        else:
            torch.testing.assert_close(got.sum(), want.sum(), rtol=0.05, atol=1e-12 * largest * want.numel(), msg=name)
