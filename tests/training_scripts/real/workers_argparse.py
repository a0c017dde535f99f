"""argparse and data loaders with worker processes; the dataset class lives in this file, and travels by pickle."""

import argparse
import random
import sys

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info


class Addition(Dataset):
    """Two digits and a plus sign in, the sum out; augmentation draws from the worker's own generators."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        a, b = random.randrange(10), int(np.random.randint(10))
        noise = torch.randn(())
        return torch.tensor([a, 10, b]), torch.tensor(a + b), noise


class Stream(IterableDataset):
    def __iter__(self):
        worker = get_worker_info()
        for i in range(worker.id, 12, worker.num_workers):
            yield torch.tensor([i % 10, 10, 1]), torch.tensor(i % 10 + 1), torch.zeros(())


class Adder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.embed = nn.Embedding(11, dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.head = nn.Linear(3 * dim, 19)

    def forward(self, x):
        h = self.embed(x)
        return self.head((h + self.attention(h, h, h)[0]).flatten(1))


def seed_worker(worker_id):
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


def collate(items):
    x, y, noise = zip(*items)
    return torch.stack(x), torch.stack(y), torch.stack(noise)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--start-method", choices=["fork", "spawn"], default="fork")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--every", type=int, default=4, help="print every so many batches")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.manual_seed(5)
    model = Adder(args.dim)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True)
    options = {
        "batch_size": 8,
        "num_workers": args.workers,
        "multiprocessing_context": args.start_method,
        "worker_init_fn": seed_worker,
        "collate_fn": collate,
        "persistent_workers": True,
        "prefetch_factor": 2,
    }
    loader = DataLoader(Addition(64), shuffle=True, generator=torch.Generator().manual_seed(1), **options)
    for epoch in range(2):
        for i, (x, y, noise) in enumerate(loader):
            loss = nn.functional.cross_entropy(model(x), y, reduction="none")
            loss = (loss * (1 + 0.1 * noise)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if i % args.every == 0:
                print(f"{epoch}:{i} {loss.item()!r}", flush=True)
    del options["batch_size"], options["persistent_workers"], options["collate_fn"]
    for x, y, _ in DataLoader(Stream(), batch_size=2, **options):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.save(model.state_dict(), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
