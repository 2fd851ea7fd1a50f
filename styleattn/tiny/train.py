"""Train `tiny-sdxl` from nothing on drawings made on the fly: `python -m styleattn.tiny.train --out
DIR --steps 4500`; an interrupted run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import training
from .captions import MAX_TOKENS
from .model import Denoiser, latents_of, new_scheduler, new_tokenizer
from .shared_training import Groups, share_in_groups
from .training import BaseRun, draw_scenes, rate, run_command, spread_levels

__all__ = ["Batch", "Run", "Settings", "make_batch", "rate", "train"]


@dataclass(frozen=True)
class Settings(training.GroupSettings):
    """The settings of `tiny-sdxl`.

    Args:
        shared_power, shared_low, shared_high: the noise levels u of the groups are
            low + (high - low) u^power.
        shared_norms: share the statistics of the group norms too.
    """

    shared_power: float = 1.0
    shared_low: float = 0.0
    shared_high: float = 1.0
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
    scenes = draw_scenes(settings, rng, 4 if shared else 1)
    keep = torch.from_numpy(scenes.chance >= settings.dropped).float()
    # A few empty prompts go through the text encoders, for callers that do not replace them with
    # zeros.
    prompts = [p if c < 0.97 else "" for p, c in zip(scenes.prompts, scenes.chance, strict=True)]
    ids = tokenizer(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    spread = spread_levels(rng, scenes.count)
    if shared:
        low, high = settings.shared_low, settings.shared_high
        spread = low + (high - low) * spread**settings.shared_power
    times = (spread * 1000).astype(np.int64).repeat(scenes.size)
    if shared:
        cleaner = np.where(
            rng.random(scenes.count) < settings.shared_clean, rng.random(scenes.count), 1.0
        )
        times[:: scenes.size] = times[:: scenes.size] * cleaner
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    latents = latents_of(scenes.pictures)
    noise = torch.randn(latents.shape, generator=generator)
    groups = scenes.count if shared else 0
    return Batch(latents, noise, torch.from_numpy(times), ids, keep, groups)


def clean_loss(error: torch.Tensor, alphas: torch.Tensor, detail: float) -> torch.Tensor:
    """The error of clean latents, weighted with the signal-to-noise ratio held within 1..5; and
    `detail` times what is left of the error without its mean over 3 x 3 pixels."""
    weight = (alphas / (1 - alphas)).clamp(1, 5)
    loss = (weight * error.square()).mean()
    if detail:
        around = F.avg_pool2d(F.pad(error, (1, 1, 1, 1), mode="replicate"), 3, 1)
        loss = loss + detail * (error - around).square().mean()
    return loss


class Run(BaseRun):
    """A training run of `tiny-sdxl`."""

    settings: Settings

    def new_model(self) -> Denoiser:
        self.tokenizer = new_tokenizer(self.folder / "tokenizer")
        model = Denoiser(self.tokenizer)
        nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.groups = Groups(norms=self.settings.shared_norms)
        share_in_groups(model.unet, self.groups)
        self.alphas = new_scheduler().alphas_cumprod
        return model

    def is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        """The matrices and convolutions inside the UNet."""
        return (
            name.startswith("unet.")
            and parameter.ndim >= 2
            and "conv_in" not in name
            and "conv_out" not in name
        )

    def loss(self) -> torch.Tensor:
        settings = self.settings
        batch = make_batch(settings, self.step, self.tokenizer)
        alphas = self.alphas[batch.times][:, None, None, None]
        noisy = alphas.sqrt() * batch.latents + (1 - alphas).sqrt() * batch.noise
        self.groups.count = batch.groups
        predicted = self.model(
            noisy.contiguous(memory_format=torch.channels_last), batch.times, batch.ids, batch.keep
        )
        return clean_loss(predicted - batch.latents, alphas, settings.detail)


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
    run.go_on(minutes, stop, save_every)
    return run


def main() -> None:
    run_command("python -m styleattn.tiny.train", "Train tiny-sdxl.", Run, Settings)


if __name__ == "__main__":
    main()
