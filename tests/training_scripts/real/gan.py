"""A GAN with two optimisers, a gradient penalty (second derivatives) and a discriminator with attention."""

import sys

import torch
from torch import autograd, nn

torch.manual_seed(9)
latent, length, dim = 4, 6, 8


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(latent, 32), nn.ReLU(), nn.Linear(32, length * dim))

    def forward(self, z):
        return self.net(z).view(-1, length, dim)


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(length * dim, 1)

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(1, 2) / dim**0.5
        return self.out((torch.softmax(scores, -1) @ self.v(x)).flatten(1))


def gradient_penalty(critic, real, fake):
    mix = torch.rand(len(real), 1, 1)
    x = (mix * real + (1 - mix) * fake).requires_grad_(True)
    grads = autograd.grad(critic(x).sum(), x, create_graph=True)[0]
    return 10 * (grads.flatten(1).norm(dim=1) - 1).square().mean()


G, D = Generator(), Critic()
opt_g = torch.optim.Adam(G.parameters(), lr=1e-3, betas=(0.5, 0.9))
opt_d = torch.optim.Adam(D.parameters(), lr=1e-3, betas=(0.5, 0.9))

for step in range(10):
    for _ in range(2):
        real = torch.sin(torch.arange(length).view(1, -1, 1) + torch.rand(8, 1, dim))
        fake = G(torch.randn(8, latent)).detach()
        loss_d = D(fake).mean() - D(real).mean() + gradient_penalty(D, real, fake)
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()

    for p in D.parameters():
        p.requires_grad_(False)
    loss_g = -D(G(torch.randn(8, latent))).mean()
    opt_g.zero_grad()
    loss_g.backward()
    opt_g.step()
    for p in D.parameters():
        p.requires_grad_(True)
    if step % 3 == 0:
        print(f"{step}: D {loss_d.item()!r} G {loss_g.item()!r}")

torch.save([G.state_dict(), D.state_dict()], sys.argv[1])
