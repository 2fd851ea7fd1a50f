"""Train the IP-Adapter of `tiny-flux`, which stays as it is: `python -m
styleattn.tiny.train_adapter --out DIR`; an interrupted run goes on."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import load, training
from .adapter_model import READ, ImagePrompts, Shown, show_pictures
from .captions import caption
from .drawings import CONTENTS, STYLES, draw
from .flux_model import image_ids, tokens_of, without_means
from .train_flux import compile_blocks, encoded
from .training import BaseRun, run_command, spread_levels


@dataclass(frozen=True)
class Settings(training.Settings):
    """The settings of the adapter.

    Args:
        shift: s, the noise levels are s u / (1 + (s - 1) u) for u even in 0..1.
        same: share of the rows whose picture shows what is drawn, in the same style (drawn again);
            the others' picture shows another content in that style.
        unseen: share of the rows without a picture.
        reading: weight of the loss of the heads that read from the embedding what the picture
            shows.
        guidance: the embedded guidance scale that the model is told.
        compiled: run the blocks through `torch.compile`; the rounding differs from the eager run's.
    """

    shift: float = 2.5
    same: float = 1.0
    unseen: float = 0.1
    reading: float = 0.02
    guidance: float = 3.0
    compiled: bool = False


@dataclass
class Batch:
    """Clean tokens, noise, noise levels, prompts; the pictures shown, their classes [B, 4] in the
    order of `READ`, and which rows see theirs."""

    tokens: torch.Tensor
    noise: torch.Tensor
    levels: torch.Tensor
    prompts: list[str]
    pictures: torch.Tensor
    classes: torch.Tensor
    seen: torch.Tensor


def make_batch(settings: Settings, step: int) -> Batch:
    """The drawings, captions, pictures, noise and noise levels of one step."""
    rng = np.random.default_rng([settings.seed, step])
    count = settings.batch
    styles = [STYLES[i] for i in rng.integers(len(STYLES), size=count)]
    contents = rng.integers(len(CONTENTS), size=count)
    others = (contents + rng.integers(1, len(CONTENTS), size=count)) % len(CONTENTS)
    shown = np.where(rng.random(count) < settings.same, contents, others)
    drawn, pictures = (
        _as_pixels([draw(CONTENTS[c], s, rng) for c, s in zip(chosen, styles, strict=True)])
        for chosen in (contents, shown)
    )
    prompts = [
        caption(CONTENTS[c], s, rng, settings.styled) if rng.random() >= settings.dropped else ""
        for c, s in zip(contents, styles, strict=True)
    ]
    spread = spread_levels(rng, count)
    levels = settings.shift * spread / (1 + (settings.shift - 1) * spread)
    seen = rng.random(count) >= settings.unseen
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    tokens = tokens_of(drawn)
    noise = torch.randn(tokens.shape, generator=generator)
    classes = [
        [names.index(name) for names, name in zip(READ, (CONTENTS[c], *astuple(s)), strict=True)]
        for c, s in zip(shown, styles, strict=True)
    ]
    return Batch(
        tokens,
        noise,
        torch.from_numpy(levels).float(),
        prompts,
        pictures,
        torch.tensor(classes),
        torch.from_numpy(seen).float(),
    )


def _as_pixels(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Run(BaseRun):
    """A training run of the adapter."""

    settings: Settings

    def new_model(self) -> ImagePrompts:
        model = ImagePrompts()
        self.pipe = load("tiny-flux")
        for part in (self.pipe.transformer, self.pipe.text_encoder, self.pipe.text_encoder_2):
            part.requires_grad_(False)
        self.shown = Shown()
        show_pictures(self.pipe.transformer, model.adapter, self.shown)
        if self.settings.compiled:
            compile_blocks(self.pipe.transformer)
        return model

    def is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        """The matrices of the encoder's layers and of keys and values."""
        return parameter.ndim == 2 and name.startswith(("encoder.encoder.", "adapter.pairs."))

    def loss(self) -> torch.Tensor:
        """The error of the velocity; and `detail` times what is left of the error without its mean
        over the 4 x 4 pixels of a token, and `reading` times the error of the heads."""
        settings = self.settings
        batch = make_batch(settings, self.step)
        levels = batch.levels[:, None, None]
        noisy = (1 - levels) * batch.tokens + levels * batch.noise
        embeds = self.model.embed(batch.pictures)
        self.shown.tokens = self.model.tokens(embeds, batch.seen)
        error = self._velocity(noisy, batch) - (batch.noise - batch.tokens)
        loss = error.square().mean()
        if settings.detail:
            loss = loss + settings.detail * without_means(error).square().mean()
        if settings.reading:
            loss = loss + settings.reading * self.model.misread(embeds, batch.classes)
        return loss

    def _velocity(self, noisy: torch.Tensor, batch: Batch) -> torch.Tensor:
        pipe = self.pipe
        with torch.no_grad():
            hidden = pipe.text_encoder_2(encoded(pipe.tokenizer_2, batch.prompts))[0]
            pooled = pipe.text_encoder(encoded(pipe.tokenizer, batch.prompts)).pooler_output
        velocity: torch.Tensor = pipe.transformer(
            noisy,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            timestep=batch.levels,
            guidance=torch.full_like(batch.levels, self.settings.guidance),
            img_ids=image_ids(),
            txt_ids=torch.zeros(hidden.shape[1], 3),
            return_dict=False,
        )[0]
        return velocity


def train(
    folder: Path, settings: Settings, minutes: float = float("inf"), stop: int | None = None
) -> Run:
    """Train until `settings.steps` steps are done, or up to `stop`, or for so many minutes; a later
    call goes on where this one stopped, with its own settings."""
    run = Run(folder, settings)
    run.go_on(minutes, stop)
    return run


def main() -> None:
    about = "Train the IP-Adapter of tiny-flux."
    run_command("python -m styleattn.tiny.train_adapter", about, Run, Settings)


if __name__ == "__main__":
    main()
