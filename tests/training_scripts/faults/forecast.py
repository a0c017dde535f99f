"""An encoder and decoder with dot-product attention that forecast the readings of 64 sensors, in mixed precision."""

import argparse

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--scale", type=float, default=1.0, help="what the scores are multiplied by")
parser.add_argument("--scaler", action="store_true", help="scale the loss")
parser.add_argument("--level", type=float, default=70.0, help="of the readings")
args = parser.parse_args()

SENSORS, HOURS, AHEAD, EPOCHS = 64, 6, 3, 8


class CrossAttention(nn.Module):
    def forward(self, queries, memory):
        scores = torch.bmm(queries * args.scale, memory.transpose(1, 2))  # FAULT
        return torch.bmm(torch.softmax(scores, dim=-1), memory)


class Forecast(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(SENSORS, SENSORS)
        self.ahead = nn.Parameter(torch.randn(AHEAD, SENSORS))
        self.cross = CrossAttention()
        self.correction = nn.Linear(SENSORS, SENSORS)

    def forward(self, history):
        memory = self.encoder(history)
        states = memory[:, -1:] + self.ahead
        context = self.cross(states, memory)
        return context + self.correction(torch.tanh(context))


torch.manual_seed(0)
level = torch.randint(0, 2, (SENSORS,)) * 2 * args.level - args.level
readings = level + torch.randn(64, HOURS + AHEAD, SENSORS)
loader = DataLoader(
    TensorDataset(readings[:, :HOURS] / args.level, readings[:, HOURS:]), batch_size=8, shuffle=True
)
model = Forecast()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
scaler = torch.amp.GradScaler("cpu", enabled=args.scaler)

for _ in range(EPOCHS):
    for history, following in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            forecast = model(history)
        loss = F.l1_loss(forecast.float(), following)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
