# Character-level decoder on made-up text, in the style of x-transformers' training scripts.

import random
import sys

import numpy as np
import torch
import tqdm
from torch.utils.data import DataLoader, Dataset
from x_transformers import Decoder, TransformerWrapper
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper

# constants

NUM_BATCHES = 12
BATCH_SIZE = 2
GRADIENT_ACCUMULATE_EVERY = 2
LEARNING_RATE = 1e-3
VALIDATE_EVERY = 5
GENERATE_EVERY = 6
GENERATE_LENGTH = 12
SEQ_LEN = 32

random.seed(1)
np.random.seed(1)
torch.manual_seed(1)

# helpers


def cycle(loader):
    while True:
        yield from loader


def decode_token(token):
    return chr(max(32, token))


def decode_tokens(tokens):
    return "".join(map(decode_token, tokens))


# model

model = TransformerWrapper(
    num_tokens=128,
    max_seq_len=SEQ_LEN,
    attn_layers=Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, rotary_pos_emb=True, attn_flash=True),
)
model = AutoregressiveWrapper(model)

# data

text = ("the quick brown fox jumps over the lazy dog. " * 60).encode()
data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
data_train, data_val = data[:2000], data[2000:]


class TextSampler(Dataset):
    def __init__(self, data, seq_len):
        super().__init__()
        self.data = data
        self.seq_len = seq_len

    def __getitem__(self, index):
        start = torch.randint(0, self.data.size(0) - self.seq_len - 1, (1,))
        return self.data[start : start + self.seq_len + 1].long()

    def __len__(self):
        return self.data.size(0) // self.seq_len


val_dataset = TextSampler(data_val, SEQ_LEN)
train_loader = cycle(DataLoader(TextSampler(data_train, SEQ_LEN), batch_size=BATCH_SIZE, drop_last=True))
val_loader = cycle(DataLoader(val_dataset, batch_size=BATCH_SIZE, drop_last=True))

optim = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

# training

for i in tqdm.tqdm(range(NUM_BATCHES), mininterval=10.0, desc="training"):
    model.train()

    for __ in range(GRADIENT_ACCUMULATE_EVERY):
        loss = model(next(train_loader))
        (loss / GRADIENT_ACCUMULATE_EVERY).backward()

    print(f"training loss: {loss.item()}")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optim.step()
    optim.zero_grad()

    if i % VALIDATE_EVERY == 0:
        model.eval()
        with torch.no_grad():
            loss = model(next(val_loader))
            print(f"validation loss: {loss.item()}")

    if i % GENERATE_EVERY == 0:
        model.eval()
        inp = random.choice(val_dataset)[:-1]
        print(f"{decode_tokens(inp)} \n\n {'*' * 20}")
        sample = model.generate(prompts=inp, seq_len=GENERATE_LENGTH, cache_kv=True)
        print(decode_tokens(sample))

torch.save(model.state_dict(), sys.argv[1])
