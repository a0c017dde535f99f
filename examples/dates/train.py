"""Trains the date translator from scratch and saves it beside this file: `python examples/dates/train.py`.

The texts are made up on the fly. One day in ten is never trained on, and accuracy is measured on those only.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date, timedelta

import torch
from model import WEIGHTS, Config, DateTranslator, encode, shifted_right, translations
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

SEED = 0
STEPS = 1300
WARM_UP_STEPS = 100
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 6e-3

# A hundred years, so that a year of two digits has one meaning. 10 and 7 share no factor: the days that are
# held out fall on every weekday.
DAYS = [date(1950, 1, 1) + timedelta(days) for days in range(36_525)]
HELD_OUT_DAYS = [day for day in DAYS if day.toordinal() % 10 == date(1998, 5, 3).toordinal() % 10]
TRAINING_DAYS = sorted(set(DAYS) - set(HELD_OUT_DAYS))


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)  # tensors this small gain little from more, and lose much on a busy machine
    torch.manual_seed(SEED)
    config = Config()
    model = DateTranslator(config)
    train(model, STEPS, random.Random(SEED))
    print(f"trained in {time.perf_counter() - start:.0f} s")

    held_out = written_dates(HELD_OUT_DAYS, 2000, random.Random(SEED + 1))
    for text, _ in held_out[:8]:
        print(f"{text:>32} -> {translations(model, [text])[0]}")
    print(f"{accuracy(model, held_out):.2%} of {len(held_out)} texts of held-out days are exactly right")
    save_file(model.state_dict(), WEIGHTS, {"config": json.dumps(asdict(config))})
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size / 1000:.0f} kB")


def train(model: nn.Module, steps: int, rng: random.Random) -> None:
    """Trains in place, with teacher forcing. The learning rate rises linearly, then falls linearly to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP_STEPS, 1 - step / steps)
    )
    model.train()
    for step in range(1, steps + 1):
        texts, answers = zip(*written_dates(TRAINING_DAYS, BATCH_SIZE, rng), strict=True)
        target_BT = encode(answers)
        logits_BTV = model(encode(texts), shifted_right(target_BT))
        loss = cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step:>4} of {steps}: loss {loss.item():.4f}", flush=True)
    model.eval()


def accuracy(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> float:
    """Share of the texts whose ten characters are all right."""
    texts, answers = zip(*pairs, strict=True)
    return sum(map(str.__eq__, translations(model, texts), answers)) / len(pairs)


def written_dates(days: Sequence[date], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """`count` pairs: a day as somebody might write it, and the same day in ISO form."""
    return [(written(day, rng), day.isoformat()) for day in rng.choices(days, k=count)]


def written(day: date, rng: random.Random) -> str:
    month, weekday = MONTHS[day.month - 1], WEEKDAYS[day.weekday()]
    text = rng.choice(FORMS).format(
        d=rng.choice([f"{day.day}", f"{day.day:02}"]),
        m=rng.choice([f"{day.month}", f"{day.month:02}"]),
        y=rng.choice([f"{day.year}", f"{day.year % 100:02}"]),
        nth=f"{day.day}{ordinal_suffix(day.day)}",
        month=rng.choice([month, month[:3]]),
        dd=f"{day.day:02}",
        mm=f"{day.month:02}",
        yy=f"{day.year % 100:02}",
        yyyy=f"{day.year}",
    )
    prefix = rng.choice([weekday, weekday[:3]]) + rng.choice([" ", ", "])
    return prefix + text if rng.random() < 0.25 else text


def ordinal_suffix(number: int) -> str:
    return "th" if number in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip

# Points and words put the day first or say which it is; slashes mean month/day/year.
FORMS = (
    "{d} {month} {y}",
    "{d} {month}, {y}",
    "{d} {month} '{yy}",
    "{d}. {month} {y}",
    "{d}-{month}-{y}",
    "{nth} {month} {y}",
    "{nth} of {month} {y}",
    "{nth} of {month}, {y}",
    "the {nth} of {month} {y}",
    "the {nth} of {month}, {y}",
    "{month} {d} {y}",
    "{month} {d}, {y}",
    "{month} {d} '{yy}",
    "{month} {nth} {y}",
    "{month} {nth}, {y}",
    "{month} the {nth}, {y}",
    "{d}.{m}.{y}",
    "{d}. {m}. {y}",
    "{m}/{d}/{y}",
    "{yyyy} {month} {d}",
    "{yyyy}-{mm}-{dd}",
    "{yyyy}/{mm}/{dd}",
    "{yyyy}{mm}{dd}",
)


if __name__ == "__main__":
    main()
