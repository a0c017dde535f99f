"""The watch as a callback of two trainers: the fault ends the training, and nothing stays behind."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

import attncli

BAD = 5


def hooks_left() -> int:
    from torch.optim import optimizer

    return sum(
        map(
            len,
            (
                hooks._global_forward_hooks,
                hooks._global_forward_pre_hooks,
                hooks._global_forward_hooks_with_kwargs,
                optimizer._global_optimizer_pre_hooks,
                optimizer._global_optimizer_post_hooks,
            ),
        )
    )


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, bad: bool) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randn(16, 4), torch.rand(16) + 0.5
        if bad:
            self.y[2 * BAD + 1] = 0

    def __len__(self) -> int:
        return 16

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"x": self.x[at], "y": self.y[at]}


class Ratio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.line(x).squeeze(-1) / y).abs().mean()}


def by_transformers(folder: Path, bad: bool, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from attncli.callbacks import TrainerWatch

    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, num_train_epochs=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential", remove_unused_columns=False,
    )  # fmt: skip
    callback = TrainerWatch(**settings)
    trainer = Trainer(Ratio(), arguments, train_dataset=Rows(bad), callbacks=[callback])
    trainer.train()
    return callback.run


def by_lightning(folder: Path, bad: bool, **settings: Any) -> Any:
    import pytorch_lightning as lightning

    from attncli.callbacks import LightningWatch

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Ratio()

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    callback = LightningWatch(**settings)
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, barebones=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(Rows(bad), 2))
    return callback.run


LOOPS = {"transformers": by_transformers, "lightning": by_lightning}


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip({"lightning": "pytorch_lightning"}.get(request.param, request.param))

    def quiet(*given: Any, **settings: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the libraries say of loaders, loggers and themselves
            return LOOPS[request.param](*given, **settings)

    quiet.name = request.param  # type: ignore[attr-defined]
    return quiet


def test_a_fault_ends_the_training_with_its_report(loop: Any, tmp_path: Path) -> None:
    before = hooks_left()
    with pytest.raises(attncli.TrainingFault) as caught:
        loop(tmp_path, True)
    report = caught.value.report
    fault = report.run["training"]["fault"]
    assert (fault["step"], fault["batch"]["index"]) == (BAD + 1, BAD)
    assert [(one.op, one.confirmed) for one in report.origins] == [("div", True)]
    # As the checkpoint names it, also where the loop calls a part of the model alone.
    prefix = {"lightning": "model.", "transformers": ""}[loop.name]
    assert report.run["training"]["steps"][-1]["parameter"] in (f"{prefix}line.weight", f"{prefix}line.bias")
    assert report.origins[0].module == prefix.rstrip(".")
    del caught, report
    import gc

    gc.collect()
    assert hooks_left() == before


def test_a_healthy_training_leaves_a_log_and_nothing_else(loop: Any, tmp_path: Path) -> None:
    before = hooks_left()
    run = loop(tmp_path, False, log=tmp_path / "run.jsonl", every=4)
    assert run.report.run["training"]["seen"] == 8
    assert run.report.verdict == "clean"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert steps == [4, 8]
    assert hooks_left() == before


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_model_of_transformers_is_repeated_with_what_its_trainer_makes_of_the_loss(
    accumulated: int, tmp_path: Path
) -> None:
    """The Trainer counts the labels of all micro-batches before, and scales the loss in place behind the model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    first_bad = 2 * 3 * accumulated

    class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 32

        def __getitem__(self, at: int) -> dict[str, Tensor]:
            ids = torch.arange(at, at + 8) % 20
            ignored = first_bad <= at < first_bad + 2 * accumulated
            return {"input_ids": ids, "labels": torch.full_like(ids, -100) if ignored else ids}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, report_to=[], use_cpu=True,
            gradient_accumulation_steps=accumulated, save_strategy="no", disable_tqdm=True,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=Tokens())
        with pytest.raises(attncli.TrainingFault) as caught, attncli.watch(every=0):
            trainer.train()
    report = caught.value.report
    fault = report.run["training"]["fault"]
    assert (fault["step"], fault["reproduced"]) == (4, True), fault
    assert fault["batch"]["index"] in range(3 * accumulated, 4 * accumulated)
    assert [(one.cause, one.confirmed) for one in report.origins] == [("division-by-zero", True)]
