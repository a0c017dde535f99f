import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset


def loader(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 5, 4, generator=generator)
    data = TensorDataset(x, x[:, 0, 0] * 2 - x[:, -1, 1])
    sampler = BatchSampler(RandomSampler(data, generator=generator), 8, drop_last=False)
    return DataLoader(data, sampler=sampler, batch_size=None)
