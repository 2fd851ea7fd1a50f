"""Train `tiny-flux` from nothing on drawings made on the fly: `python -m
styleattn.tiny.train_flux --out DIR --steps 4500`; an interrupted run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import training
from .captions import MAX_TOKENS
from .flux_model import FluxDenoiser, new_word_tokenizer, tokens_of, without_means
from .flux_sharing import FluxGroups, share_flux_in_groups
from .model import new_tokenizer
from .training import BaseRun, draw_scenes, run_command, spread_levels

GUIDANCE = (1.0, 5.0)


@dataclass(frozen=True)
class Settings(training.GroupSettings):
    """The settings of `tiny-flux`.

    Args:
        shift: s, the noise levels are s u / (1 + (s - 1) u) for u even in 0..1.
        aligned: share of the steps with groups that share as AlignedGen does.
        guided, guided_from: share of the steps, from `guided_from` on, that teach what the embedded
            guidance scale does.
        compiled: run the blocks through `torch.compile`; the rounding differs from the eager run's.
    """

    shift: float = 2.0
    aligned: float = 0.5
    guided: float = 0.0
    guided_from: int = 0
    compiled: bool = False


@dataclass
class Batch:
    """Clean tokens, noise, noise levels and the levels told to the model, token ids of both
    encoders, guidance scales, which rows count, and how the rows form groups."""

    tokens: torch.Tensor
    noise: torch.Tensor
    levels: torch.Tensor
    told: torch.Tensor
    ids: torch.Tensor
    ids_2: torch.Tensor
    guidance: torch.Tensor
    counts: torch.Tensor
    groups: int
    aligned: bool
    guided: bool


def encoded(tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """Token ids [B, MAX_TOKENS], as `FluxPipeline` makes them."""
    return tokenizer(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def make_batch(settings: Settings, step: int, tokenizer: Any, tokenizer_2: Any) -> Batch:
    """The drawings, captions, noise and noise levels of one step.

    In a step with shared attention the batch is in groups of 4 drawings of one style that are told
    one noise level. The first of a group, which the others attend to, is in a share of the groups
    cleaner than it is told, as a reference held ahead of the others is; such a row has no loss.
    """
    rng = np.random.default_rng([settings.seed, step])
    shared = rng.random() < settings.shared and step >= settings.shared_from
    scenes = draw_scenes(settings, rng, 4 if shared else 1)
    prompts = [
        p if c >= settings.dropped else ""
        for p, c in zip(scenes.prompts, scenes.chance, strict=True)
    ]
    spread = spread_levels(rng, scenes.count)
    levels = settings.shift * spread / (1 + (settings.shift - 1) * spread)
    told = levels.repeat(scenes.size)
    levels, counts = told.copy(), np.ones(len(told))
    if shared:
        cleaner = rng.random(scenes.count) < settings.shared_clean
        factors = np.where(cleaner, rng.random(scenes.count), 1.0)
        levels[:: scenes.size] *= factors
        counts[:: scenes.size] = ~cleaner
    aligned, guided = rng.random() < settings.aligned, rng.random() < settings.guided
    low, high = GUIDANCE
    guidance = low + (high - low) * rng.random(scenes.count).repeat(scenes.size)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    tokens = tokens_of(scenes.pictures)
    return Batch(
        tokens,
        torch.randn(tokens.shape, generator=generator),
        torch.from_numpy(levels).float(),
        torch.from_numpy(told).float(),
        encoded(tokenizer, prompts),
        encoded(tokenizer_2, prompts),
        torch.from_numpy(guidance).float(),
        torch.from_numpy(counts).float(),
        scenes.count if shared else 0,
        aligned,
        guided and step >= settings.guided_from,
    )


def compile_blocks(transformer: Any) -> None:
    """Run every block of the transformer through `torch.compile`."""
    torch._dynamo.config.recompile_limit = 64  # every block, plain and in groups
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(transformer, name):
            block.compile()


class Run(BaseRun):
    """A training run of `tiny-flux`."""

    settings: Settings

    def new_model(self) -> FluxDenoiser:
        self.tokenizer = new_tokenizer(self.folder / "tokenizer")
        self.tokenizer_2 = new_word_tokenizer(self.folder / "tokenizer_2")
        model = FluxDenoiser(self.tokenizer, self.tokenizer_2)
        self.groups = FluxGroups()
        share_flux_in_groups(model.transformer, self.groups)
        if self.settings.compiled:
            compile_blocks(model.transformer)
        return model

    def is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        """The matrices inside the transformer's blocks."""
        return "transformer_blocks." in name and parameter.ndim == 2

    def loss(self) -> torch.Tensor:
        """The error of the velocity; and `detail` times what is left of the error without its mean
        over the 4 x 4 pixels of a token."""
        settings = self.settings
        batch = make_batch(settings, self.step, self.tokenizer, self.tokenizer_2)
        levels = batch.levels[:, None, None]
        noisy = (1 - levels) * batch.tokens + levels * batch.noise
        velocity = batch.noise - batch.tokens
        self.groups.count, self.groups.aligned = batch.groups, batch.aligned
        text = self.model.embed(batch.ids, batch.ids_2)
        guidance = batch.guidance
        if settings.guided and self.step >= settings.guided_from and not batch.guided:
            guidance = torch.ones_like(guidance)
        if batch.guided:
            velocity = velocity + self._guidance(batch, noisy, text)
        error = self.model(noisy, batch.told, guidance, text) - velocity
        error = error * batch.counts[:, None, None]
        loss = error.square().mean()
        if settings.detail:
            loss = loss + settings.detail * without_means(error).square().mean()
        return loss

    @torch.no_grad()
    def _guidance(
        self, batch: Batch, noisy: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """What classifier-free guidance would add to the velocity: (g - 1) times the difference
        that the prompt makes at g = 1."""
        ones = torch.ones_like(batch.guidance)
        empty = [""] * len(ones)
        nothing = self.model.embed(encoded(self.tokenizer, empty), encoded(self.tokenizer_2, empty))
        with_prompt = self.model(noisy, batch.told, ones, text)
        without = self.model(noisy, batch.told, ones, nothing)
        return (batch.guidance - 1)[:, None, None] * (with_prompt - without)


def train(
    folder: Path, settings: Settings, minutes: float = float("inf"), stop: int | None = None
) -> Run:
    """Train until `settings.steps` steps are done, or up to `stop`, or for so many minutes; a later
    call goes on where this one stopped, with its own settings."""
    run = Run(folder, settings)
    run.go_on(minutes, stop)
    return run


def main() -> None:
    run_command("python -m styleattn.tiny.train_flux", "Train tiny-flux.", Run, Settings)


if __name__ == "__main__":
    main()
