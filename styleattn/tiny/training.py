"""What the training of every embedded model shares: settings, drawings, learning rates, and runs
that go on after an interruption.

Every batch is a function of the seed and of the number of the step, so a run that was interrupted
goes on from its last checkpoint (`checkpoint.pt` in its folder, replaced atomically) to the weights
it would have reached without the interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .captions import caption
from .drawings import CONTENTS, STYLES, draw
from .optim import Muon


@dataclass(frozen=True)
class Settings:
    """What a run depends on; all of it is stored in the checkpoint and goes into the record of the
    model.

    Args:
        styled: share of the captions that name the style.
        dropped: share of the captions left out.
        detail: weight of a second loss on the fine structure alone.
    """

    seed: int = 0
    steps: int = 4500
    batch: int = 32
    lr: float = 1e-3
    matrix_lr: float = 0.02
    warmup: int = 100
    cooldown: float = 0.4
    ema: float = 0.998
    styled: float = 0.15
    dropped: float = 0.1
    optimizer: str = "muon"
    detail: float = 0.0


@dataclass(frozen=True)
class GroupSettings(Settings):
    """The settings of a model that is trained with shared attention.

    Args:
        shared: share of the steps, from `shared_from` on, whose batch is in groups of 4 drawings of
            one style that attend to the first of their group.
        shared_clean: share of those groups whose first drawing is at a lower noise level.
    """

    shared: float = 0.0
    shared_from: int = 0
    shared_clean: float = 0.5


@dataclass
class Scenes:
    """Drawings [B, 3, 32, 32] in -1..1 and their captions, in `count` groups of one style each; and
    one number in 0..1 for each drawing, by which captions are dropped."""

    pictures: torch.Tensor
    prompts: list[str]
    chance: np.ndarray
    count: int

    @property
    def size(self) -> int:
        """How many drawings a group has."""
        return len(self.prompts) // self.count


def draw_scenes(settings: Settings, rng: np.random.Generator, size: int) -> Scenes:
    """A batch of drawings in groups of `size` of one style."""
    count = settings.batch // size
    styles = [STYLES[i] for i in rng.integers(len(STYLES), size=count) for _ in range(size)]
    contents = [CONTENTS[i] for i in rng.integers(len(CONTENTS), size=settings.batch)]
    pictures = np.stack([draw(c, s, rng) for c, s in zip(contents, styles, strict=True)])
    prompts = [caption(c, s, rng, settings.styled) for c, s in zip(contents, styles, strict=True)]
    return Scenes(
        torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1,
        prompts,
        rng.random(settings.batch),
        count,
    )


def spread_levels(rng: np.random.Generator, count: int) -> np.ndarray:
    """Numbers in 0..1, one in each of `count` equal parts."""
    return (np.arange(count) + rng.random(count)) / count


def rate(settings: Settings, step: int) -> float:
    """The factor of the learning rates: linear warm-up, constant, linear cool-down to zero."""
    start = settings.steps * (1 - settings.cooldown)
    return min(
        1.0,
        (step + 1) / settings.warmup,
        max(0.0, (settings.steps - step) / (settings.steps - start)),
    )


def optimizers_of(
    model: nn.Module, settings: Settings, is_matrix: Callable[[str, nn.Parameter], bool]
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the parameters that `is_matrix` picks (or AdamW for all)."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = settings.optimizer == "muon" and is_matrix(name, parameter)
        (matrices if inner else rest).append(parameter)
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    ]
    if matrices:
        found.append(Muon(matrices, lr=settings.matrix_lr))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return found


class BaseRun(ABC):
    """A training run in a folder: model, averaged weights, optimizers and the number of the next
    step. A model's own run says what the model is and what its loss."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings, self.step, self.seconds = folder, settings, 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        self.model = self.new_model()
        self.mean = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizers = optimizers_of(self.model, settings, self.is_matrix)
        self.history: list[dict[str, Any]] = [{"step": 0, **asdict(settings)}]
        if (folder / "checkpoint.pt").exists():
            self._resume(torch.load(folder / "checkpoint.pt", weights_only=True))

    @abstractmethod
    def new_model(self) -> Any:
        """The model to train, its weights drawn from torch's global generator."""

    @abstractmethod
    def is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether Muon trains this parameter."""

    @abstractmethod
    def loss(self) -> torch.Tensor:
        """The loss of step `self.step`."""

    def _resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.mean, self.step, self.seconds = state["mean"], state["step"], state["seconds"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            rates = [group["initial_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, value in zip(optimizer.param_groups, rates, strict=True):
                group["initial_lr"] = value
        self.history = json.loads(state["history"])
        last = [stage for stage in self.history if "seed" in stage][-1]
        if {**last, "step": 0} != {"step": 0, **asdict(self.settings)}:
            self.history.append({"step": self.step, **asdict(self.settings)})

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "mean": self.mean,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "history": json.dumps(self.history),
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def train_step(self) -> float:
        """One step; returns its loss."""
        settings = self.settings
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate(settings, self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.mean[name].lerp_(parameter, 1 - decay)
        return loss.item()

    def go_on(
        self, minutes: float = float("inf"), stop: int | None = None, save_every: int = 50
    ) -> None:
        """Train until `settings.steps` steps are done, or up to `stop`, or for so many minutes."""
        settings, start, spent = self.settings, time.monotonic(), self.seconds
        losses: list[float] = []
        while self.step < (stop or settings.steps) and time.monotonic() - start < 60 * minutes:
            losses.append(self.train_step())
            self.seconds = spent + time.monotonic() - start
            if self.step % 20 == 0:
                print(
                    f"step {self.step}/{settings.steps}  loss {np.mean(losses):.4f}"
                    f"  {self.seconds:.0f} s",
                    flush=True,
                )
                losses = []
            if self.step % save_every == 0:
                self.save()
        self.save()


def add_settings(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    """Give a parser one option for each of the settings."""
    for name, value in asdict(defaults).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=type(value), default=value)


def run_command(
    prog: str, description: str, run: Callable[[Path, Any], BaseRun], settings: type[Settings]
) -> None:
    """The command line of a training program."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the checkpoint; training goes on from one that is there",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after so many minutes (and save)"
    )
    parser.add_argument("--stop", type=int, help="stop after this step (and save)")
    parser.add_argument("--threads", type=int, default=1)
    add_settings(parser, settings())
    values = vars(parser.parse_args())
    folder, minutes, stop = values.pop("out"), values.pop("minutes"), values.pop("stop")
    torch.set_num_threads(values.pop("threads"))
    run(folder, settings(**values)).go_on(minutes, stop)
