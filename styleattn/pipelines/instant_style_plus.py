"""InstantStyle-Plus: a picture drawn again from its own noise, in the style of another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from styleattn.adapters import CSD, load_csd
from styleattn.inversion import read_picture
from styleattn.inversion.host import Picture, device_of
from styleattn.methods import InstantStylePlus
from styleattn.processors import apply
from styleattn.references import Reference

from .drawing import Drawing
from .hosts import size_of
from .sampling import generate
from .sources import Job
from .style_guidance import Aim, led

CONTROL_SCALE = 0.4
"""How strongly the tile ControlNet speaks."""


def draw(drawing: Drawing) -> list[Image.Image]:
    """Pictures with the content's structure and the style of another picture.

    From the content's noise, under the content's caption where there is no other prompt; a tile
    ControlNet sees the content, where the pipeline has one; content and style are shown to the
    cross-attention; and CSD leads the steps, where the method asks for it.

    Raises:
        ValueError: no content, or a file that is not CSD's.
        FileNotFoundError: no such file.

    Source: Wang et al., InstantStyle-Plus, arXiv 2407.00788.
    """
    content, picture, pipe = drawing.content, drawing.picture, drawing.pipe
    if content is None or picture is None:
        raise ValueError(f"{drawing.method.name} needs a content picture")
    style = drawing.method.references[-1]
    method = replace(drawing.method, references=(Reference(image=picture), style))
    arguments: dict[str, Any] = {}
    if getattr(pipe, "controlnet", None) is not None:
        height, width = size_of(pipe, drawing.sampling.height, drawing.sampling.width)
        fitted = ImageOps.fit(read_picture(picture), (width, height), Image.Resampling.LANCZOS)
        scale = drawing.control_scale
        arguments["image"] = [fitted] * len(drawing.prompts)
        arguments["controlnet_conditioning_scale"] = CONTROL_SCALE if scale is None else scale
    aim = _aim(pipe, method, picture, style.image) if method.guided else None
    with (
        apply(pipe, method, backend=drawing.backend),
        contextlib.nullcontext() if aim is None else led(pipe, aim),
    ):
        return generate(
            pipe,
            [prompt or content.prompt for prompt in drawing.prompts],
            drawing.seeds,
            drawing.sampling,
            callback=drawing.callback,
            latents=drawing.start(content.latents[0]),
            **arguments,
        )


def check(job: Job) -> None:
    """Read CSD's file, where the method names one: it is refused before anything is computed.

    Raises:
        ValueError: not CSD's.
        FileNotFoundError: no such file.
    """
    if job.method.guided:
        _csd(job.method.csd)


def _csd(given: Any) -> CSD:
    """CSD's model, its file read once."""
    if isinstance(given, CSD):
        return given
    facts = os.stat(given)
    return _read(os.path.realpath(given), facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=1)
def _read(path: str, changed: int, size: int) -> CSD:
    """A file as it was at a time of change."""
    return load_csd(path, dtype=torch.float32)


def _aim(pipe: Any, method: InstantStylePlus, content: Picture, style: Any) -> Aim:
    """What CSD sees in the two pictures."""
    csd = _csd(method.csd).to(device_of(pipe)).eval()
    (_, _, wanted), (_, kept, _) = (look(csd, [picture]) for picture in (style, content))
    return Aim(csd, wanted[0], kept[0], method.style_guidance, method.content_guidance)


def look(csd: CSD, pictures: Sequence[Picture]) -> tuple[torch.Tensor, ...]:
    """CSD's feature and embeddings of content and style, of pictures of one size."""
    pixels = torch.stack(
        [
            torch.from_numpy(np.asarray(read_picture(p), dtype=np.float32) / 255).permute(2, 0, 1)
            for p in pictures
        ]
    )
    with torch.no_grad():
        found: tuple[torch.Tensor, ...] = csd(csd.prepare(pixels.to(csd.last_layer_style)))
    return found
