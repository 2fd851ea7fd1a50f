"""Train the IP-Adapter of an embedded model, which stays as it is: `python -m
styleattn.tiny.train_adapter --model tiny-sdxl --out DIR`; an interrupted run goes on."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import training
from .adapter_model import READ, Batch, Host, ImagePrompts
from .captions import caption
from .drawings import CONTENTS, SIZE, STYLES, draw
from .flux_adapter import FluxHost
from .sdxl_adapter import SdxlHost
from .training import BaseRun, run_command, spread_levels

HOSTS: dict[str, type[Host]] = {host.model: host for host in (FluxHost, SdxlHost)}
"""The models that an adapter is trained for."""


@dataclass(frozen=True)
class Settings(training.Settings):
    """The settings of an adapter.

    Args:
        model: the model that it is for.
        shift: s, the noise levels are s u / (1 + (s - 1) u) for u even in 0..1.
        same: share of the rows whose picture shows what is drawn, in the same style (drawn again);
            the others' picture shows another content in that style.
        unseen: share of the rows without a picture.
        reading: weight of the loss of the heads that read from the embedding what the picture
            shows.
        compiled: on `tiny-flux`, run the blocks through `torch.compile`; the rounding differs from
            the eager run's.
    """

    model: str = "tiny-flux"
    shift: float = 2.5
    same: float = 1.0
    unseen: float = 0.1
    reading: float = 0.02
    compiled: bool = False


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
    noise = torch.randn(count, 3 * SIZE**2, generator=generator)
    classes = [
        [names.index(name) for names, name in zip(READ, (CONTENTS[c], *astuple(s)), strict=True)]
        for c, s in zip(shown, styles, strict=True)
    ]
    return Batch(
        drawn,
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
    """A training run of an adapter."""

    settings: Settings

    def new_model(self) -> ImagePrompts:
        kind = HOSTS[self.settings.model]
        model = kind.new_prompts()
        self.host = kind()
        self.host.begin(model)
        if self.settings.compiled:
            self.host.compile()
        return model

    def is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        """The matrices of the encoder's layers and of keys and values."""
        inner = ".encoder.layers." in name or name.startswith("adapter.pairs.")
        return inner and parameter.ndim == 2

    def loss(self) -> torch.Tensor:
        """The model's own loss; and `reading` times the error of the heads."""
        settings = self.settings
        batch = make_batch(settings, self.step)
        embeds = self.model.embed(batch.pictures)
        self.host.shown.tokens = self.model.tokens(embeds, batch.seen)
        loss = self.host.loss(batch, settings.detail)
        if settings.reading:
            loss = loss + settings.reading * self.model.misread(embeds, batch.classes)
        return loss


def train(
    folder: Path, settings: Settings, minutes: float = float("inf"), stop: int | None = None
) -> Run:
    """Train until `settings.steps` steps are done, or up to `stop`, or for so many minutes; a later
    call goes on where this one stopped, with its own settings."""
    run = Run(folder, settings)
    run.go_on(minutes, stop)
    return run


def main() -> None:
    about = "Train the IP-Adapter of an embedded model."
    run_command("python -m styleattn.tiny.train_adapter", about, Run, Settings)


if __name__ == "__main__":
    main()
