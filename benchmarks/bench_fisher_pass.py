"""Fisher information of every weight of an encoder, against an ordinary pass and the loops that others use.

Floor: the matrix products of an ordinary forward and backward pass; every way needs them.
"""

import harness
import pytest
import torch
import workloads

from sparseft import testing

SAMPLES, TOKENS = 16, 128


@pytest.mark.parametrize("device", testing.devices())
def test_fisher_pass(compare, device):
    model, batch = workloads.encoder(device), workloads.batch(device, SAMPLES, TOKENS)
    check(model, batch)
    peaks = {
        "sparseft": "sparseft_pass",
        "forward + backward": "forward_backward",
        "loop of batch 1, published": "published_loop",
        "loop of batch 1, tuned": "tuned_loop",
    }
    compare(
        harness.Case("estimate_fisher", f"MiniLM, {SAMPLES} x {TOKENS} tokens", device=device),
        lambda: workloads.sparseft_pass(model, batch),
        {
            "forward + backward": lambda: workloads.forward_backward(model, batch),
            "loop of batch 1, published": lambda: workloads.published_loop(model, batch),
            "loop of batch 1, tuned": lambda: workloads.tuned_loop(model, batch),
        },
        rounds=7,
        floor=harness.Floor(flops=workloads.forward_backward_flops(model, SAMPLES, TOKENS)),
        peaks={name: harness.peak_bytes(workload, device) for name, workload in peaks.items()},
    )


def check(model, batch):
    """Every parameter agrees with a loop of batch-1 backward passes, to a hundred-thousandth of the largest score."""
    truth = workloads.tuned_loop(model, batch)
    scores = workloads.sparseft_pass(model, batch)
    assert scores.keys() == truth.keys()
    for name, want in truth.items():
        got = SAMPLES * scores[name]
        # a key's bias has no gradient but rounding; what is that small cannot be compared to itself
        scale = max(float(want.max()), 1e-12 * max(float(other.max()) for other in truth.values()))
        torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=1e-5, msg=name)
