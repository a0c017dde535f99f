"""Train a tiny GPT-2 from scratch with transformers' Trainer, in the manner of run_clm."""

import logging
import math
import sys
from dataclasses import dataclass, field

import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    save_to: str = field(metadata={"help": "Where the final weights go."})
    n_layer: int = field(default=2, metadata={"help": "Layers."})
    n_embd: int = field(default=32)


@dataclass
class DataArguments:
    block_size: int = field(default=24)
    examples: int = field(default=96)


class Blocks(Dataset):
    """Sequences that count upwards from a random start, modulo 50."""

    def __init__(self, examples, block_size):
        start = torch.randint(0, 50, (examples, 1))
        self.ids = (start + torch.arange(block_size)) % 50

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


class Report(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            print(f"step {state.global_step}: loss {logs['loss']!r} grad_norm {logs['grad_norm']!r}")


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    transformers.utils.logging.set_verbosity_error()
    set_seed(training_args.seed)

    train = Blocks(data_args.examples, data_args.block_size)
    validation = Blocks(16, data_args.block_size)
    config = GPT2Config(
        vocab_size=64,
        n_positions=data_args.block_size,
        n_embd=model_args.n_embd,
        n_layer=model_args.n_layer,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    print(f"Training new model from scratch - total size={sum(p.numel() for p in model.parameters())}")

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_data_collator,
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    print("train loss", repr(result.training_loss), "steps", trainer.state.global_step)
    loss = trainer.evaluate()["eval_loss"]
    print("perplexity", repr(math.exp(loss)))
    trainer.save_model()
    torch.save(model.state_dict(), model_args.save_to)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        # The settings of the example, where only the target is given.
        sys.argv += (
            "--output_dir out --max_steps 12 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
            "--learning_rate 3e-3 --warmup_steps 2 --logging_steps 3 --save_steps 6 --eval_strategy steps "
            "--eval_steps 6 --report_to none --disable_tqdm true --use_cpu true --seed 7"
        ).split()
        sys.argv[1:2] = ["--save_to", sys.argv[1]]
    main()
