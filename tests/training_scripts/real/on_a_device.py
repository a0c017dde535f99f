"""A small GPT on a GPU or a CPU, trained as such scripts do it: what goes wrong in it is asked for by name."""

import argparse
import hashlib
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cuda")
parser.add_argument("--steps", type=int, default=24)
parser.add_argument("--amp", choices=("float16", "bfloat16"))
parser.add_argument("--fused", action="store_true")
parser.add_argument("--compile", choices=("default", "reduce-overhead"))
parser.add_argument("--graph", action="store_true", help="the whole step as one CUDA graph")
parser.add_argument("--clip", action="store_true")
parser.add_argument("--wrap", choices=("ddp", "fsdp"))
parser.add_argument("--fault", choices=("scores", "loss", "sample", "rate", "scale"))
parser.add_argument("--at", type=int, default=14, help="the step of the fault, from 1")
args = parser.parse_args()

torch.manual_seed(0)
device = torch.device(args.device)
VOCABULARY, WIDTH, HEADS, TOKENS = 64, 128, 4, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.gain = 1.0

    def forward(self, x):
        q, k, v = (
            one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        if args.fault == "scores":
            scores = (q * self.gain) @ (k * self.gain).mT
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, weights):
        x = self.tokens(ids) * weights[:, None, None] + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x)


data = torch.randint(VOCABULARY, (8 * args.steps, TOKENS + 1))
weights = torch.ones(len(data))
if args.fault == "sample":
    weights[8 * (args.at - 1) + 3] = float("nan")
loader = DataLoader(
    TensorDataset(data, weights), batch_size=8, num_workers=2, pin_memory=device.type == "cuda"
)

model = bare = Gpt().to(device)
if args.wrap:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    torch.distributed.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
if args.wrap == "ddp":
    model = nn.parallel.DistributedDataParallel(model, device_ids=[0])
elif args.wrap == "fsdp":
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
if args.compile:
    model = torch.compile(model, mode=args.compile)
optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-3, fused=args.fused or None, capturable=args.graph and not args.fused
)
scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "float16", init_scale=2.0**12)


def loss_of(ids, weights, step):
    with torch.autocast(
        device.type, dtype=getattr(torch, args.amp or "float32"), enabled=args.amp is not None
    ):
        logits = model(ids[:, :-1], weights)
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        if args.fault == "loss" and step == args.at:
            losses = losses + torch.log(F.relu(losses - 100.0)).clamp(max=0.0)  # FAULT
        loss = losses.mean()
        if args.fault == "scale" and step >= args.at:
            loss = loss + (logits * 0.0).pow(2).sum().sqrt()  # only its gradient is bad
        return loss


def update(loss):
    optimizer.zero_grad(set_to_none=not args.graph)
    scaler.scale(loss).backward()
    if args.clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


graph = None
if args.graph:
    ids, sample_weights = data[:8].to(device), weights[:8].to(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            update(loss_of(ids, sample_weights, 0))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = loss_of(ids, sample_weights, 0)
        update(static)

for step, (batch, weight) in enumerate(loader, 1):
    batch, weight = batch.to(device, non_blocking=True), weight.to(device, non_blocking=True)
    if args.fault == "rate" and step == args.at:
        optimizer.param_groups[0]["lr"] = 1e30
    if args.fault == "scores" and step == args.at:
        for block in bare.blocks:
            block.gain = 300.0
    if graph is not None:
        ids.copy_(batch)
        sample_weights.copy_(weight)
        graph.replay()
        print(step, static.item())
        continue
    loss = loss_of(batch, weight, step)
    update(loss)
    print(step, loss.item())

digest = hashlib.sha256()
for parameter in bare.parameters():
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    digest.update(local.detach().float().cpu().numpy().tobytes())
print(digest.hexdigest())
if args.wrap:
    torch.distributed.destroy_process_group()
