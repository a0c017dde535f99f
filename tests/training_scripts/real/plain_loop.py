"""Train a small transformer encoder to tell whether a sequence holds more high than low tokens."""

import copy
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

EPOCHS = 3
BATCH_SIZE = 16
VOCAB = 32

torch.manual_seed(0)


class Classifier(nn.Module):
    def __init__(self, dim=32, heads=4, depth=2, length=12):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.pos = nn.Parameter(torch.randn(length, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 2)

    def forward(self, tokens):
        x = self.embed(tokens) + self.pos
        return self.head(self.encoder(x).mean(1))


tokens = torch.randint(0, VOCAB, (192, 12))
labels = ((tokens >= VOCAB // 2).sum(1) > 6).long()
train_set, val_set = random_split(TensorDataset(tokens, labels), [160, 32])
train_loader = DataLoader(train_set, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
val_loader = DataLoader(val_set, batch_size=BATCH_SIZE)

model = Classifier()
ema = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * len(train_loader))

best = float("inf")
for epoch in range(EPOCHS):
    model.train()
    running = 0.0
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        running += loss.item()
        with torch.no_grad():
            for average, current in zip(ema.parameters(), model.parameters()):
                average.lerp_(current, 0.1)

    model.eval()
    correct, val_loss = 0, 0.0
    with torch.no_grad():
        for x, y in val_loader:
            logits = model(x)
            val_loss += F.cross_entropy(logits, y, reduction="sum").item()
            correct += (logits.argmax(-1) == y).sum().item()
    val_loss /= len(val_set)
    print(
        f"epoch {epoch + 1}: train {running / len(train_loader)!r} val {val_loss!r} "
        f"accuracy {correct / len(val_set):.3f} lr {scheduler.get_last_lr()[0]:.2e}"
    )
    if val_loss < best:
        best = val_loss
        checkpoint = {
            "epoch": epoch,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(checkpoint, "best.pt")
        # The whole module too: the quick way that so many scripts take.
        torch.save(model, "model.pt")
        torch.save(copy.deepcopy(optimizer), "optimizer.pt")

# Resume from the best checkpoint and train for a few steps more.
checkpoint = torch.load("best.pt", weights_only=False)
model.load_state_dict(checkpoint["model"])
optimizer.load_state_dict(checkpoint["optimizer"])
torch.set_rng_state(checkpoint["rng"])
model.train()
for x, y in train_loader:
    optimizer.zero_grad(set_to_none=False)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, sys.argv[1])
