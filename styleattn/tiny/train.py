"""Train `tiny-sdxl` from nothing on drawings made on the fly: `python -m styleattn.tiny.train --out
DIR --steps 4500`.

Every batch is a function of the seed and of the number of the step, so a run that was interrupted
goes on from its last checkpoint (`DIR/checkpoint.pt`, replaced atomically) to the weights it would
have reached without the interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .captions import MAX_TOKENS, caption
from .drawings import CONTENTS, STYLES, draw
from .model import Denoiser, latents_of, new_scheduler, new_tokenizer
from .optim import Muon
from .shared_training import Groups, share_in_groups


@dataclass(frozen=True)
class Settings:
    """What a run depends on; all of it is stored in the checkpoint and goes into the model card."""

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
    shared: float = 0.0
    shared_from: int = 0
    shared_power: float = 1.0
    shared_clean: float = 0.5
    shared_low: float = 0.0
    shared_high: float = 1.0
    detail: float = 0.0
    shared_norms: bool = False


@dataclass
class Batch:
    latents: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    ids: torch.Tensor
    keep: torch.Tensor
    groups: int


def make_batch(settings: Settings, step: int, tokenizer: Any) -> Batch:
    """The drawings, captions, noise and noise levels of one step.

    In a step with shared attention the batch is in groups of 4 drawings of one style and one noise
    level; the first of a group, which the others attend to, is in half of the groups at a lower
    level.
    """
    rng = np.random.default_rng([settings.seed, step])
    shared = rng.random() < settings.shared and step >= settings.shared_from
    size = 4 if shared else 1
    styles = [
        STYLES[i]
        for i in rng.integers(len(STYLES), size=settings.batch // size)
        for _ in range(size)
    ]
    contents = [CONTENTS[i] for i in rng.integers(len(CONTENTS), size=settings.batch)]
    pictures = np.stack(
        [draw(content, style, rng) for content, style in zip(contents, styles, strict=True)]
    )
    prompts = [
        caption(content, style, rng, settings.styled)
        for content, style in zip(contents, styles, strict=True)
    ]
    chance = rng.random(settings.batch)
    keep = torch.from_numpy(chance >= settings.dropped).float()
    # A few empty prompts go through the text encoders, for callers that do not replace them with
    # zeros.
    prompts = [prompt if c < 0.97 else "" for prompt, c in zip(prompts, chance, strict=True)]
    ids = tokenizer(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    levels = settings.batch // size
    spread = (np.arange(levels) + rng.random(levels)) / levels
    if shared:
        low, high = settings.shared_low, settings.shared_high
        spread = low + (high - low) * spread**settings.shared_power
    times = (spread * 1000).astype(np.int64).repeat(size)
    if shared:
        cleaner = np.where(rng.random(levels) < settings.shared_clean, rng.random(levels), 1.0)
        times[::size] = times[::size] * cleaner
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    latents = latents_of(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)
    noise = torch.randn(latents.shape, generator=generator)
    return Batch(
        latents, noise, torch.from_numpy(times), ids, keep, settings.batch // size if shared else 0
    )


def rate(settings: Settings, step: int) -> float:
    """The factor of the learning rates: linear warm-up, constant, linear cool-down to zero."""
    start = settings.steps * (1 - settings.cooldown)
    return min(
        1.0,
        (step + 1) / settings.warmup,
        max(0.0, (settings.steps - step) / (settings.steps - start)),
    )


def optimizers_of(model: torch.nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and convolutions inside the UNet, AdamW for everything else (or AdamW
    for all)."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = (
            name.startswith("unet.")
            and parameter.ndim >= 2
            and "conv_in" not in name
            and "conv_out" not in name
        )
        (matrices if inner and settings.optimizer == "muon" else rest).append(parameter)
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    ]
    if matrices:
        found.append(Muon(matrices, lr=settings.matrix_lr))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return found


class Run:
    """A training run in a folder: model, averaged weights, optimizers and the number of the next
    step."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings, self.step, self.seconds = folder, settings, 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = new_tokenizer(folder / "tokenizer")
        torch.manual_seed(settings.seed)
        self.model = Denoiser(self.tokenizer)
        nn.Module.to(self.model, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.groups = Groups(norms=settings.shared_norms)
        share_in_groups(self.model.unet, self.groups)
        self.mean = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizers = optimizers_of(self.model, settings)
        self.alphas = new_scheduler().alphas_cumprod
        self.history: list[dict[str, Any]] = [{"step": 0, **asdict(settings)}]
        if (folder / "checkpoint.pt").exists():
            self._resume(torch.load(folder / "checkpoint.pt", weights_only=True))

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
        """One step; the loss is the error of the clean latents, weighted with the signal-to-noise
        ratio held within 1..5."""
        settings = self.settings
        batch = make_batch(settings, self.step, self.tokenizer)
        alphas = self.alphas[batch.times][:, None, None, None]
        noisy = alphas.sqrt() * batch.latents + (1 - alphas).sqrt() * batch.noise
        self.groups.count = batch.groups
        predicted = self.model(
            noisy.contiguous(memory_format=torch.channels_last), batch.times, batch.ids, batch.keep
        )
        weight = (alphas / (1 - alphas)).clamp(1, 5)
        error = predicted - batch.latents
        loss = (weight * error.square()).mean()
        if settings.detail:
            around = F.avg_pool2d(F.pad(error, (1, 1, 1, 1), mode="replicate"), 3, 1)
            loss = loss + settings.detail * (error - around).square().mean()
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


def train(
    folder: Path,
    settings: Settings,
    minutes: float = float("inf"),
    stop: int | None = None,
    save_every: int = 50,
) -> Run:
    """Train until `settings.steps` steps are done; a later call goes on where this one stopped,
    with its own settings.

    Args:
        minutes: stop earlier, after this time.
        stop: stop earlier, after this step; for a run in stages.
    """
    run = Run(folder, settings)
    start, losses = time.monotonic(), []
    spent = run.seconds
    while run.step < (stop or settings.steps) and time.monotonic() - start < 60 * minutes:
        losses.append(run.train_step())
        run.seconds = spent + time.monotonic() - start
        if run.step % 20 == 0:
            print(
                f"step {run.step}/{settings.steps}  loss {np.mean(losses):.4f}"
                f"  {run.seconds:.0f} s",
                flush=True,
            )
            losses = []
        if run.step % save_every == 0:
            run.save()
    run.save()
    return run


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Give a parser one option for each of the settings."""
    for name, value in asdict(Settings()).items():
        kind = type(value) if not isinstance(value, bool) else lambda text: text == "yes"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m styleattn.tiny.train", description="Train tiny-sdxl."
    )
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
    add_settings(parser)
    values = vars(parser.parse_args())
    folder, minutes, stop = values.pop("out"), values.pop("minutes"), values.pop("stop")
    torch.set_num_threads(values.pop("threads"))
    train(folder, Settings(**values), minutes, stop)


if __name__ == "__main__":
    main()
