"""Updates that are not `loss.backward(); optimizer.step()`: SAM, one optimiser per parameter inside backward, a custom
optimiser, several losses, a closure-free second-order step, sparse gradients and parameters without any."""

import contextlib
import copy
import pickle
import sys

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(8)


class Pool(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.embed = nn.Embedding(50, 8, sparse=sparse)
        self.query = nn.Parameter(torch.randn(8))
        self.out = nn.Linear(8, 2)
        self.never_used = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids):
        self.seen += ids.numel()
        h = self.embed(ids)
        return self.out((F.softmax(h @ self.query, -1).unsqueeze(-1) * h).sum(1))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: climbs, then steps with the base optimiser."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base = base(self.param_groups, **kwargs)

    @torch.no_grad()
    def first_step(self):
        grads = [p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack(grads).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.clone()
                    p.add_(p.grad * group["rho"] / (norm + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.state[p]["old"])
        self.base.step()
        self.zero_grad()

    def step(self, closure=None):
        raise NotImplementedError("call first_step and second_step")


class SignSGD(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad.sign()
        return 17


def batch():
    ids = torch.randint(0, 50, (6, 5))
    return ids, (ids.sum(1) % 2)


results = []

# SAM: two backward passes for one update.
model = Pool()
sam = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
for _ in range(4):
    ids, y = batch()
    F.cross_entropy(model(ids), y).backward()
    sam.first_step()
    loss = F.cross_entropy(model(ids), y)
    loss.backward()
    sam.second_step()
print("sam", repr(loss.item()), model.seen.item())
results.append(model.state_dict())

# An optimiser per parameter, stepped as soon as its gradient is there. Three batches of four parameters.
model = Pool()
optimizers = {p: torch.optim.Adam([p], lr=1e-2) for p in model.parameters()}


def step_now(p):
    optimizers[p].step()
    optimizers[p].zero_grad()


handles = [p.register_post_accumulate_grad_hook(step_now) for p in model.parameters()]
for _ in range(3):
    ids, y = batch()
    loss = F.cross_entropy(model(ids), y)
    loss.backward()
print("in backward", repr(loss.item()), all(p.grad is None for p in model.parameters()))
for handle in handles:
    handle.remove()
results.append(model.state_dict())

# A custom optimiser whose step returns something; hooks of the script's own; a non-scalar loss; two losses.
model = Pool()
sign = SignSGD(model.parameters(), lr=1e-3)
calls = []
hooks = contextlib.ExitStack()
for handle in (
    model.register_forward_hook(lambda module, args, out: calls.append("forward")),
    model.out.register_full_backward_hook(lambda module, gi, go: calls.append("backward")),
    sign.register_step_pre_hook(lambda *a: calls.append("before step")),
    sign.register_step_post_hook(lambda *a: calls.append("after step")),
    model.query.register_hook(lambda grad: grad * 2),
):
    hooks.callback(handle.remove)
for _ in range(2):
    ids, y = batch()
    sign.zero_grad()
    losses = F.cross_entropy(model(ids), y, reduction="none")
    losses.backward(torch.linspace(0, 1, 6), retain_graph=True)
    torch.autograd.backward([losses.mean(), model.query.square().sum()])
    print("sign", sign.step(), repr(losses.sum().item()))
hooks.close()
print(calls)
results.append(model.state_dict())

# Sparse gradients, a copy of everything in the middle, and both copies train on.
model = Pool(sparse=True)
sparse = torch.optim.SparseAdam([model.embed.weight], lr=1e-2)
dense = torch.optim.Adagrad([p for n, p in model.named_parameters() if "embed" not in n])
ids, y = batch()
F.cross_entropy(model(ids), y).backward()
sparse.step()
dense.step()
twin = pickle.loads(pickle.dumps(model))
other = copy.deepcopy(model)
for net in (model, twin, other):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ids, y = batch()
    optimizer.zero_grad()
    (F.cross_entropy(net(ids), y) + 0 * net.query.sum()).backward()
    optimizer.step()
    results.append(net.state_dict())

# By hand, without any optimiser; and with the functional interface.
model = Pool()
for _ in range(3):
    ids, y = batch()
    grads = torch.autograd.grad(F.cross_entropy(model(ids), y), list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads):
            if g is not None:
                p -= 0.1 * g
params = {k: v.detach() for k, v in model.named_parameters()}
buffers = dict(model.named_buffers())


def functional_loss(params, ids, y):
    out = torch.func.functional_call(model, (params, {**buffers, "seen": torch.zeros(())}), (ids,))
    return F.cross_entropy(out, y)


for _ in range(3):
    grads = torch.func.grad(functional_loss)(params, *batch())
    params = {k: v - 0.1 * grads[k] for k, v in params.items()}
ids, y = batch()
per_sample = torch.func.vmap(torch.func.grad(functional_loss), in_dims=(None, 0, 0))(
    params, ids.unsqueeze(1), y.unsqueeze(1)
)
print("per sample", per_sample["query"].shape, repr(per_sample["query"].sum().item()))
traced = torch.jit.trace(model, ids)
print("traced", repr(traced(ids).sum().item()), "with inference mode")
with torch.inference_mode():
    print(repr(model(ids).sum().item()))
results.append(params)
torch.save(results, sys.argv[1])
