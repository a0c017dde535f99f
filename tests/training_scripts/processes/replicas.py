"""A model in DistributedDataParallel, each process with batches of its own. The fault is chosen by name."""

import argparse
import contextlib
import hashlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

FAULTY_STEP, FAULTY_RANK, STEPS = 2, 2, 4


class Backward(torch.autograd.Function):
    """The identity, whose gradient is divided by zero."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (grad - grad) / (grad - grad)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 16)
        self.fc2 = nn.Linear(16, 3)
        self.bad_gradient = False
        self.counts_processes = False

    def forward(self, x):
        if self.counts_processes:
            dist.all_reduce(torch.ones(1))
        hidden = F.relu(self.fc1(x))
        if self.bad_gradient:
            hidden = Backward.apply(hidden)
        return self.fc2(torch.log(hidden + 1.0))


def main(fault="none", steps=STEPS):
    """Trains, and gives the hash of the weights."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    inputs, labels = (
        torch.randn(steps * 2 * 4 * world, 6).abs(),
        torch.randint(0, 3, (steps * 2 * 4 * world,)),
    )
    scaler = torch.amp.GradScaler("cpu", enabled=fault == "scaler")
    if fault in ("batch", "clip", "accumulation", "scaler", "collective"):
        # Item 1 of the batch that the faulty rank takes first in the faulty step.
        first = FAULTY_STEP * (2 if fault == "accumulation" else 1) * 4
        inputs[(first + 1) * world + min(FAULTY_RANK, world - 1), 3] = float("nan")
    data = TensorDataset(inputs, labels)
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False))
    model = Net()
    model.counts_processes = fault == "collective"
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    batches = iter(loader)
    accumulate = 2 if fault == "accumulation" else 1
    for step in range(steps):
        here = step == FAULTY_STEP and rank == min(FAULTY_RANK, world - 1)
        optimizer.zero_grad()
        for micro in range(accumulate):
            x, y = next(batches)
            if here and fault == "label":
                y[2] = 7
            if here and fault == "dies":
                os._exit(9)
            model.bad_gradient = here and fault == "backward"
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last else wrapped.no_sync():
                loss = F.cross_entropy(wrapped(x), y)
                if here and fault == "loss":
                    loss = loss + torch.log(loss - loss - 1.0)
                scaler.scale(loss).backward()
        if fault == "update" and step == FAULTY_STEP:
            optimizer.param_groups[0]["lr"] = float("inf")
        if fault == "clip":
            nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        if fault == "replica" and here:
            limits = sys.modules.get("attncli.training.processes")
            if limits is not None:
                limits.ARRIVAL_SECONDS = 2.0
            model.fc2.weight.grad[0, 1] = float("nan")
        scaler.step(optimizer)
        scaler.update()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    return digest.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="none")
    given = parser.parse_args()
    dist.init_process_group("gloo")
    digest = main(given.fault)
    print(f"rank {dist.get_rank()}: {digest}")
    dist.destroy_process_group()
