"""Parameters that train whole take a shorter way through a step on the CPU: the same bits as the other one's."""

import pytest
import torch

from sparseft import optim

OPTIONS = {
    "fp32": (torch.float32, {}),
    "bf16 with masters": (torch.bfloat16, {}),
    "fp16 rounded stochastically": (torch.float16, {"rounding": "stochastic", "seed": 7}),
    "decay to the pretrained": (torch.float32, {"decay_to": "pretrained"}),
}


@pytest.mark.parametrize(("dtype", "options"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_whole_parameter_steps_as_its_parts_do(name, dtype, options):
    generator = torch.Generator().manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(1003, generator=generator).to(dtype))
    even, odd = (torch.nn.Parameter(whole.detach().clone()) for _ in range(2))
    make = {"lr": 0.01, "weight_decay": 0.1, **({"momentum": 0.9} if name == "sgd" else {}), **options}
    # each is the first of its optimizer: random numbers depend on the place
    steppers = [
        optim.OPTIMIZERS[name](
            [{"params": [param], "indices": None if start is None else [every[start::2].contiguous()]}], **make
        )
        for every in [torch.arange(1003, dtype=torch.int32)]
        for param, start in ((whole, None), (even, 0), (odd, 1))
    ]
    for _ in range(4):
        grad = torch.randn(1003, generator=generator).to(dtype)
        for param, optimizer in zip((whole, even, odd), steppers, strict=True):
            param.grad = grad
            optimizer.step()
    expected = torch.empty_like(whole.detach())
    expected[0::2], expected[1::2] = even.detach()[0::2], odd.detach()[1::2]
    assert torch.equal(whole.detach(), expected)
