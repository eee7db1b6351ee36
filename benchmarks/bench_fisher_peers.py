"""Fisher information beside torch.func, Opacus and BackPACK: time and peak memory of one batch, in one run."""

import functools

import harness
import peers
import pytest
import torch
import workloads

NAMES = {"vmap_grad": "torch.func.vmap(grad)", "opacus": "Opacus", "backpack": "BackPACK, linear layers only"}
PASSES = {"cpu": [("MiniLM", 16, 128)], "cuda": [("MiniLM", 16, 128)]}


@pytest.mark.parametrize(("device", "name", "n", "t"), harness.on_devices(PASSES))
def test_peers(compare, device, name, n, t):
    pytest.importorskip("opacus", reason="peers are installed by `make bench`")
    pytest.importorskip("backpack", reason="peers are installed by `make bench`")
    data = workloads.batches(name, device, 1, n, t)
    model = workloads.MODELS[name](device)
    runs = {peer: prepare(workloads.MODELS[name](device)) for peer, prepare in peers.PEERS.items()}
    check(model, data, runs)
    measured = ("forward_backward", *peers.PEERS)
    compare(
        harness.Case("estimate_fisher", f"{name}, {n} x {t} tokens, beside peers", device=device),
        functools.partial(workloads.estimate_fisher, model, data),
        {
            "forward + backward": functools.partial(workloads.forward_backward, model, data),
            **{NAMES[peer]: functools.partial(run, data) for peer, run in runs.items()},
        },
        rounds=5,
        peaks={
            "sparseft": harness.peak_bytes("estimate_fisher", device, name, 1, n, t),
            **{
                NAMES.get(each, "forward + backward"): harness.peak_bytes(each, device, name, 1, n, t)
                for each in measured
            },
        },
    )


def check(model, data, runs):
    """Every peer and estimate_fisher agree on every parameter the peer covers, to 1e-5 of its largest score."""
    scores = workloads.estimate_fisher(model, data)
    samples = sum(len(batch["labels"]) for batch in data)
    largest = max(float(score.max()) for score in scores.values())
    for run in runs.values():
        for name, total in run(data).items():
            scale = max(float(scores[name].max()), 1e-12 * largest)
            torch.testing.assert_close(total / samples / scale, scores[name] / scale, rtol=0, atol=1e-5, msg=name)
