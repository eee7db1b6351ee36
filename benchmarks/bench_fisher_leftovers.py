"""What no rule captures: the fallback beside a loop of single samples, and beside `torch.func.vmap(grad)` alone.

All make the gradients of the same parameters. `docs/design.md` says how the fallback chooses between the two.
"""

import functools

import harness
import leftovers
import pytest
import torch

CASES = [(name,) for name in leftovers.MODELS]
# cuDNN has no backward pass of an LSTM in evaluation mode
PASSES = {"cpu": CASES, "cuda": [case for case in CASES if "LSTM" not in case[0]]}
LOOP, VMAP = "autograd, one sample at a time", "torch.func.vmap(grad), in chunks"


@pytest.mark.parametrize(("device", "name"), harness.on_devices(PASSES))
def test_leftovers(compare, device, name):
    model, parameters, batch = leftovers.prepared(name, device)
    ways = {"sparseft": "leftovers", LOOP: "leftovers_loop", VMAP: "leftovers_vmap"}
    if isinstance(model, leftovers.Padded):
        del ways[VMAP]  # its mask looks at values, which torch.func alone refuses
    runs = {key: functools.partial(leftovers.WAYS[way](model, parameters), batch) for key, way in ways.items()}
    check([run() for run in runs.values()])
    compare(
        harness.Case("leftovers", name, device=device),
        runs.pop("sparseft"),
        runs,
        rounds=7,
        warm=1,
        peaks={key: harness.peak_bytes(way, device, name) for key, way in ways.items()},
    )


def check(found):
    """All agree on every parameter, to 1e-5 of its largest score."""
    for name, wanted in found[0].items():
        scale = float(wanted.max())
        for other in found[1:]:
            torch.testing.assert_close(other[name] / scale, wanted / scale, rtol=0, atol=1e-5, msg=name)
