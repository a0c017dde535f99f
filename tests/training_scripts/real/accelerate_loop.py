"""Hugging Face Accelerate: prepare, accumulate, backward, clip."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Shifted(Dataset):
    def __init__(self, size=96):
        self.x = torch.randn(size, 6, 8)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"features": self.x[i], "target": self.x[i].roll(1, 0).sum(-1)}


class Regressor(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.up = nn.Linear(dim, 32)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.down = nn.Linear(32, 1)

    def forward(self, features):
        h = self.up(features)
        q, k, v = (p(h).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        probs = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
        return self.down(h + (probs @ v).transpose(1, 2).flatten(2)).squeeze(-1)


def main():
    set_seed(11)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = Regressor()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    loader = DataLoader(Shifted(), batch_size=8, shuffle=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    criterion = nn.MSELoss()

    for epoch in range(4):
        total = torch.zeros(())
        for batch in loader:
            with accelerator.accumulate(model):
                loss = criterion(model(batch["features"]), batch["target"])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total += accelerator.gather(loss.detach())
        accelerator.print(f"epoch {epoch} loss {total.item() / len(loader)!r}")

    accelerator.wait_for_everyone()
    accelerator.save_state("state")
    accelerator.save(accelerator.unwrap_model(model).state_dict(), sys.argv[1])


if __name__ == "__main__":
    main()
