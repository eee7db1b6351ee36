"""What no rule captures: the loop of single samples beside `torch.func.vmap(grad)` over the same parameters.

`docs/design.md` says why the fallback is the loop. Left out is what torch.func refuses: recurrent cells, and whatever
looks at values, as most masks of padding do.
"""

import functools

import harness
import leftovers
import pytest
import torch

CASES = [(name,) for name in leftovers.MODELS]
# cuDNN has no backward pass of an LSTM in evaluation mode
PASSES = {"cpu": CASES, "cuda": [case for case in CASES if "LSTM" not in case[0]]}


@pytest.mark.parametrize(("device", "name"), harness.on_devices(PASSES))
def test_leftovers(compare, device, name):
    given = leftovers.prepared(name, device)
    check(*given)
    compare(
        harness.Case("one_by_one", name, device=device),
        functools.partial(leftovers.loop, *given),
        {"torch.func.vmap(grad), in chunks": functools.partial(leftovers.vmapped, *given)},
        rounds=9,
        peaks={
            "sparseft": harness.peak_bytes("leftovers_loop", device, name),
            "torch.func.vmap(grad), in chunks": harness.peak_bytes("leftovers_vmap", device, name),
        },
    )


def check(*given):
    """Both agree on every parameter, to 1e-5 of its largest score."""
    scores, others = leftovers.loop(*given), leftovers.vmapped(*given)
    for name, wanted in scores.items():
        scale = float(wanted.max())
        torch.testing.assert_close(others[name] / scale, wanted / scale, rtol=0, atol=1e-5, msg=name)
