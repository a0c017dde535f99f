"""A LightningModule with attention, fitted and validated on a toy task."""

import sys
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", ".*does not have many workers.*")


class LitAttention(pl.LightningModule):
    def __init__(self, dim: int = 24, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(20, dim)
        self.attn = nn.MultiheadAttention(dim, 4, batch_first=True, dropout=0.1)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 20)

    def forward(self, x):
        h = self.embed(x)
        a, _ = self.attn(h, h, h, need_weights=False)
        return self.out(self.norm(h + a))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x).flatten(0, 1), y.flatten())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x).flatten(0, 1), y.flatten()), prog_bar=True)

    def on_train_epoch_end(self):
        print("epoch", self.current_epoch, {k: v.item() for k, v in self.trainer.callback_metrics.items()})

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Reversed(pl.LightningDataModule):
    def setup(self, stage):
        x = torch.randint(0, 20, (144, 10))
        self.train, self.val = (
            TensorDataset(x[:128], x[:128].flip(1)),
            TensorDataset(x[128:], x[128:].flip(1)),
        )

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=8)


def main():
    pl.seed_everything(3, workers=True)
    model = LitAttention()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=True,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        callbacks=[ModelCheckpoint(dirpath="checkpoints", monitor="val_loss", filename="best-{epoch}")],
        deterministic=True,
    )
    trainer.fit(model, datamodule=Reversed())
    trainer.validate(model, datamodule=Reversed(), verbose=False)
    print("steps", trainer.global_step)
    torch.save(model.state_dict(), sys.argv[1])


if __name__ == "__main__":
    main()
