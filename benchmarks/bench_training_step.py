"""A whole training step with compact gradients, beside full fine-tuning and what peft has: time and peak memory.

Floor: the matrix products of the forward pass and of the input gradients; every way needs them.
"""

import copy
import functools

import harness
import pytest
import torch
import training_steps
import workloads

import sparseft

NAMES = {
    "full": "full, fused AdamW",
    "lora": "peft LoRA, rank {}",
    "shira": "peft SHiRA, rank {}",
    "supertuning": "peft Super-Tuning",
    "dense_gradients": "sparseft, dense gradients",
    "compact_torch_products": "sparseft, torch's products",
    "input_gradients": "forward + input gradients",
}
PEAKS = ("full", "lora", "shira", "supertuning", "dense_gradients")
# model, samples, tokens, share of the linear layers' weights
CASES = {
    "cpu": [(name, 16, 128, density) for name in ("MiniLM", "Llama of 8 layers") for density in (0.005, 0.012)],
    "cuda": [("Llama of 3.2 B", 4, 768, 0.0033)],
}


@pytest.mark.parametrize(("device", "name", "n", "t", "density"), harness.on_devices(CASES))
def test_training_step(compare, device, name, n, t, density):
    pytest.importorskip("peft", reason="peers are installed by `make bench`")
    (batch,) = workloads.batches(name, device, 1, n, t)
    make = workloads.MODELS[name]
    check(make(device), batch, density)
    steps = {each: training_steps.STEPS[each](make(device).train(), density) for each in ("compact", *NAMES)}
    dtype = next(make(device).parameters()).dtype
    passes = workloads.forward_backward_flops(make(device), [batch])
    rank = training_steps.rank(make(device), density)
    names = {each: name.format(rank) for each, name in NAMES.items()}
    compare(
        harness.Case(
            "training_step", f"{name}, {n} x {t} tokens, linear layers", density=density, dtype=dtype, device=device
        ),
        functools.partial(steps["compact"], batch),
        {names[each]: functools.partial(steps[each], batch) for each in NAMES},
        rounds=5,
        floor=harness.Floor(flops=2 * passes / 3),
        peaks={
            names.get(each, "sparseft"): harness.peak_bytes(each, device, name, 1, n, t, density)
            for each in ("compact", *PEAKS)
        }
        if density == CASES[device][-1][-1]
        else {},
    )


def check(model, batch, density):
    """The leaves' gradients are those of an ordinary pass, relative to the tensor's largest."""
    ordinary = copy.deepcopy(model)
    ordinary(**batch).loss.backward()
    grads = {name: parameter.grad for name, parameter in ordinary.named_parameters()}
    mask = training_steps.random_mask(model, density)
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05
    with sparseft.compact_gradients(model, mask) as compact:
        model(**batch).loss.backward()
        for name, leaf in compact.entries.items():
            want = grads[name].reshape(-1)[leaf.positions.long()].float()
            scale = float(grads[name].abs().max())
            torch.testing.assert_close(leaf.grad / scale, want / scale, rtol=0, atol=tolerance, msg=name)
