"""Models whose parameters lie in parts in several processes: FSDP1, FSDP2 and tensor parallel."""

import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import MixedPrecisionPolicy, fully_shard

FAULTY_STEP, FAULTY_RANK, STEPS = 2, 1, 4


class Scale(torch.autograd.Function):
    """The identity, whose gradient is Inf in one column of the last dimension."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[..., 5] = grad[..., 5] / torch.zeros_like(grad[..., 5])
        return grad


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 12)
        self.bad_gradient = False

    def forward(self, tokens, gain=None):
        x = self.embed(tokens)
        if gain is not None:
            x = x * gain[:, None, None]
        if self.bad_gradient:
            x = Scale.apply(x)
        return self.head(x + self.down(F.silu(self.up(x))))


def data(steps, world, rank):
    torch.manual_seed(0)
    tokens = torch.randint(0, 12, (steps * 3 * world, 5))
    gain = torch.ones(steps * 3 * world)
    return tokens, gain


def digest(model):
    values = [
        p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()
    ]
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in values)).hexdigest()


def fsdp(fault="none", steps=STEPS):
    rank, world = dist.get_rank(), dist.get_world_size()
    tokens, gain = data(steps, world, rank)
    if fault in ("batch", "half", "clip"):
        gain[(FAULTY_STEP * 3 + 2) * world + FAULTY_RANK] = 1e5 if fault == "half" else float("inf")
    pairs = TensorDataset(tokens, gain)
    loader = DataLoader(pairs, batch_size=3, sampler=DistributedSampler(pairs, shuffle=False))
    model = Net()
    policy = MixedPrecisionPolicy(torch.float16) if fault == "half" else MixedPrecisionPolicy()
    for layer in (model.up, model.down):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, (x, g) in enumerate(loader):
        here = step == FAULTY_STEP and rank == FAULTY_RANK
        optimizer.zero_grad()
        model.bad_gradient = here and fault == "backward"
        logits = model(x, g)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), x.flatten())
        loss.backward()
        if fault in ("clip", "clips"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if fault == "update" and step == FAULTY_STEP:
            optimizer.param_groups[0]["lr"] = float("inf")
        if here and fault == "shard":
            model.up.weight.grad.to_local()[0, 0] = float("nan")
        optimizer.step()
    return digest(model)


def flattened(fault="none", steps=STEPS):
    """FSDP1, which keeps a part of one long parameter."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tokens, gain = data(steps, world, rank)
    if fault == "batch":
        gain[(FAULTY_STEP * 3 + 2) * world + FAULTY_RANK] = float("inf")
    pairs = TensorDataset(tokens, gain)
    loader = DataLoader(pairs, batch_size=3, sampler=DistributedSampler(pairs, shuffle=False))
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, g in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x, g).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
    return digest(model)


def tensor_parallel(fault="none", steps=STEPS):
    rank, world = dist.get_rank(), dist.get_world_size()
    tokens, _ = data(steps, 1, rank)
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = Net()
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        x = tokens[step * 3 : step * 3 + 3]
        optimizer.zero_grad()
        if fault == "shard" and step == FAULTY_STEP and rank == FAULTY_RANK:
            with torch.no_grad():
                model.up.weight.to_local()[2, 4] = float("nan")
        loss = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
        loss.backward()
        optimizer.step()
    return digest(model)
