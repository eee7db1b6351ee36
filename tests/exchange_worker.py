"""One of two processes that train disjoint masks and exchange; run by test_workers_exchange.py.

python exchange_worker.py RANK STORE RESULT: a file to meet at, and one to write weights, traffic and errors to.
"""

import copy
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

import sparseft
from sparseft import workers
from sparseft.mask import OTHERS_TRAINED, fingerprint

ROUNDS = ((0, 0.05), (1, 0.02))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 21), nn.Tanh(), nn.LayerNorm(21), nn.Linear(21, 3)).to(dtype)


def masks_of(model, k=75):
    """Return two masks of 38 and 37 entries, and a head that both train."""
    return workers.split(sparseft.select("random", model, k=k, dense="3.bias"), 2, seed=0)


def train(model, optimizer, rank, round_):
    """Take two steps on data of this rank and round."""
    generator = torch.Generator().manual_seed(10 * round_ + rank)
    for _ in range(2):
        optimizer.zero_grad()
        inputs = torch.randn(5, 13, generator=generator).to(next(model.parameters()).dtype)
        model(inputs).square().sum().backward()
        optimizer.step()


def several_dtypes():
    """Return parameters of several dtypes and odd shapes: what is sent of one begins at an odd byte of the next."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5, 7), "b": (11,), "c": (), "d": (17, 1)}
    dtypes = (torch.float16, torch.float32, torch.bfloat16, torch.float32)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return nn.ParameterDict(
        {name: nn.Parameter(made[name].to(dtype)) for name, dtype in zip(shapes, dtypes, strict=True)}
    )


def uneven_masks(model):
    mask = sparseft.select("random", model, k=60, dense="c")
    head = {name: index[:1] for name, index in mask.items() if name != "b"}
    rest = {name: index[1:] if name in head else index for name, index in mask.items()}
    return [sparseft.Mask(part, mask.shapes, dense=mask.dense, fingerprint=mask.fingerprint) for part in (head, rest)]


def change(model, mask, rank):
    with torch.no_grad():
        for name, index in mask.items():
            model[name].view(-1)[index.long()] += rank + 1
        for name in mask.dense:
            model[name] += rank + 1


def refusals(rank):
    """Yield what is wrong, and the model, masks and options of this rank."""
    model = net()
    masks = masks_of(model)
    yield "other masks", model, masks if rank == 0 else masks_of(model, 76), {}
    yield "too many masks", model, masks if rank == 0 else [*masks, masks[0]], {}
    yield "other options", model, masks, {"weights": [1.0, 1.0 + rank]}
    yield "overlap", model, [masks[0], masks[0]], {}
    yield "other dtypes", net(torch.float32 if rank == 0 else torch.bfloat16), masks, {"check_weights": False}
    yield "another model", nn.Linear(3, 3) if rank == 0 else model, masks, {}
    yield "no masks", model, masks if rank == 0 else ["one", "two"], {}
    yield "no weights", model, masks, {"weights": ["one", 1.0] if rank == 0 else [1.0, 1.0]}
    refreshed = copy.copy(masks[0])
    refreshed.info = {**refreshed.info, OTHERS_TRAINED: True}
    yield "others trained", model, [refreshed, masks[1]], {}
    free = int((~torch.isin(torch.arange(273), torch.cat([mask["0.weight"] for mask in masks]))).nonzero()[0])
    with torch.no_grad():
        model[0].weight.view(-1)[free] += 1e-6 * rank
    yield "other weights", model, masks, {}
    model = net()
    with torch.no_grad():
        model[3].bias[0] = float("nan") if rank == 1 else 0.0
    yield "not finite", model, masks, {}


def main(rank, store, result):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    sent, all_gather = [], dist.all_gather

    def counting(received, tensor, group=None):
        sent.append(tensor.nbytes)
        all_gather(received, tensor, group=group)

    dist.all_gather = counting
    found = {"rounds": [], "errors": {}}

    for dtype in (torch.float32, torch.bfloat16):
        model = net(dtype)
        masks = masks_of(model)
        optimizer = sparseft.SparseAdamW(masks[rank].param_groups(model), lr=0.05)
        for round_, lr in ROUNDS:
            optimizer.param_groups[0]["lr"] = lr
            train(model, optimizer, rank, round_)
            sent.clear()
            merged = workers.exchange(model, masks, weights=[1.0, 2.0])
            found["rounds"].append({"weights": model.state_dict(), "sent": list(sent), "k": merged.mask.k})
            found["rounds"][-1]["weights"] = {name: value.clone() for name, value in model.state_dict().items()}

    model = net(torch.bfloat16)
    masks = masks_of(model)
    with sparseft.compact_gradients(model, masks[rank]):
        optimizer = sparseft.SparseAdamW(masks[rank].param_groups(model), lr=0.05)
        for round_, lr in ROUNDS:
            optimizer.param_groups[0]["lr"] = lr
            train(model, optimizer, rank, round_)
            workers.exchange(model, masks, weights=[1.0, 2.0])
    found["compact"] = model.state_dict()

    model = several_dtypes()
    masks = uneven_masks(model)
    change(model, masks[rank], rank)
    sent.clear()
    workers.exchange(model, masks, check_weights=False)
    found["several dtypes"] = {"weights": model.state_dict(), "sent": list(sent)}

    model = net()
    mask = masks_of(model)[0]
    same = sparseft.Mask(dict(mask), mask.shapes, fingerprint=mask.fingerprint)
    train(model, sparseft.SparseAdamW(same.param_groups(model), lr=0.05), rank, 0)
    workers.exchange(model, [same, same], overlap="mean")
    found["same mask"] = model.state_dict()

    for what, model, masks, options in refusals(rank):
        before = fingerprint(model)
        try:
            workers.exchange(model, masks, **options)
        except (TypeError, ValueError) as error:
            found["errors"][what] = str(error)
        assert fingerprint(model) == before, what
    torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    # gloo's threads may outlive the process group, and one that frees a tensor while the interpreter shuts down aborts
    # the process: leave without shutting it down
    os._exit(0)
