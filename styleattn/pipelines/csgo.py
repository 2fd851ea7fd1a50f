"""CSGO's three ways of working: a content picture, an edited content picture, or text alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from styleattn.inversion import read_picture
from styleattn.inversion.host import Picture, default_size
from styleattn.methods import CSGO
from styleattn.processors import apply
from styleattn.references import Reference

from .drawing import Drawing
from .sampling import Sampling, generate

MODES = {"image": 0.6, "edit": 0.4, "text": 0.01}
"""How strongly the ControlNet speaks: the content as it is, the content under another prompt, and a
black picture under a prompt."""

_STEP = 16
_PAPER = Sampling(num_inference_steps=50, guidance_scale=10.0)


def csgo_pictures(
    pipe: Any,
    method: CSGO,
    style: Reference | Picture,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling = _PAPER,
    *,
    content: Reference | Picture | None = None,
    mode: str | None = None,
    controlnet_conditioning_scale: float | None = None,
    backend: str | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Pictures with the content of a picture or a text, and the style of a picture.

    "image" wants a caption of the content as its prompt, "edit" a prompt that says what is to be
    different; "text" has no content, and a black picture takes its place in the ControlNet.

    Args:
        pipe: an SDXL pipeline with a tile ControlNet; for "text" any SDXL pipeline.
        method: its scales, adapter and encoder; its references are put in here.
        style, content: pictures, or references with pictures.
        prompts, seeds: one for each picture.
        sampling: the size is the content's where none is given: the longer side as long as the
            pipeline's own, both multiples of 16.
        mode: "image", "edit" or "text"; None is "image" with content and "text" without.
        controlnet_conditioning_scale: None is the mode's own, of `MODES`.
        backend: of the attention.
        callback: called with (steps done, steps).

    Raises:
        ValueError: a mode that does not go with the pictures, or is none.
        TypeError: a pipeline without a ControlNet, where there is content.
        FileNotFoundError: no such picture.

    Source: Xing et al., CSGO, arXiv 2408.16766, sec. 4; instantX-research/CSGO, infer/.
    """
    mode = mode or ("text" if content is None else "image")
    if mode not in MODES:
        raise ValueError(f"csgo_pictures: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if (mode == "text") != (content is None):
        needs = "no content" if mode == "text" else "a content picture"
        raise ValueError(f"csgo_pictures: mode {mode!r} needs {needs}")
    shown = _reference("style", style)
    references = (shown,) if content is None else (_reference("content", content), shown)
    longest = max(default_size(pipe))
    if content is None:
        height, width = (s or longest for s in (sampling.height, sampling.width))
        picture = Image.new("RGB", (width, height))
    else:
        own = read_picture(references[0].image)
        width, height = fitted(own.size, longest)
        height, width = sampling.height or height, sampling.width or width
        picture = own.resize((width, height), Image.Resampling.BICUBIC)
    arguments: dict[str, Any] = {}
    if content is not None or getattr(pipe, "controlnet", None) is not None:
        strength = controlnet_conditioning_scale
        arguments["image"] = [picture] * len(prompts)
        arguments["controlnet_conditioning_scale"] = MODES[mode] if strength is None else strength
    with apply(pipe, replace(method, references=references), backend=backend):
        return generate(
            pipe,
            prompts,
            seeds,
            replace(sampling, height=height, width=width),
            callback=callback,
            **arguments,
        )


def draw(drawing: Drawing) -> list[Image.Image]:
    """A batch of `csgo_pictures` where the pipeline has a ControlNet; without one the pictures that
    the prompts alone give shape."""
    if getattr(drawing.pipe, "controlnet", None) is None:
        return drawing.generate()
    *contents, style = drawing.method.references
    return csgo_pictures(
        drawing.pipe,
        drawing.method,
        style,
        drawing.prompts,
        drawing.seeds,
        drawing.sampling,
        content=contents[0] if contents else None,
        controlnet_conditioning_scale=drawing.control_scale,
        backend=drawing.backend,
        callback=drawing.callback,
    )


def fitted(size: tuple[int, int], longest: int, multiple: int = _STEP) -> tuple[int, int]:
    """A size of the same shape whose longer side is `longest`, both rounded down to multiples."""
    scale = longest / max(size)
    width, height = (max(multiple, int(s * scale) // multiple * multiple) for s in size)
    return width, height


def _reference(role: str, given: Reference | Picture) -> Reference:
    reference = given if isinstance(given, Reference) else Reference(image=given)
    if reference.image is None:
        raise ValueError(f"csgo_pictures: the {role} needs a picture")
    return reference
