"""One of two processes that train with compact gradients under DDP; run by test_compact_distributed.py.

python ddp_worker.py RANK STORE RESULT: a file to meet at, and one to write gradients, weights and traffic to.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparseft


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 4))


def mask_of(model):
    return sparseft.select("random", model, density=0.2, seed=0, dense="3.bias", progress=False)


def inputs(step):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step))


def train(model, mask, run, own, backwards):
    """Two steps of two micro-batches each; return the gradients of the last. backwards(last): where to go backward."""
    optimizer = sparseft.SparseAdamW(mask.param_groups(model), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        for part in range(2):
            with backwards(part == 1):
                run(inputs(2 * step + part)[own]).square().mean().backward()
        optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def main(rank, store, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = net()
    mask = mask_of(model)
    sent = []

    def counting(state, bucket):
        sent.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0] / 2)

    with sparseft.compact_gradients(model, mask):
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, counting)
        own = slice(4 * rank, 4 * rank + 4)
        grads = train(model, mask, wrapped, own, lambda last: torch.enable_grad() if last else wrapped.no_sync())
    torch.save({"grads": grads, "weights": model.state_dict(), "sent": sent}, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    # DDP keeps gloo's threads past destroy_process_group, and one that frees a tensor while the interpreter shuts
    # down aborts the process: leave without shutting it down.
    os._exit(0)
