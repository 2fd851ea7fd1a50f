"""FLUX.1 Fill on a canvas of two panels: the canvas is built, painted, and panel B cropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from styleattn.inversion import HostUnsupported, read_picture
from styleattn.inversion.host import Picture, vae_scale
from styleattn.methods import FillDiptych, Redux
from styleattn.methods.diptych import ARRANGEMENTS
from styleattn.processors import apply
from styleattn.processors._flux_panels import against_filling
from styleattn.references import Reference

from .csgo import fitted
from .sampling import Sampling, generate

FILL = Sampling(num_inference_steps=50, guidance_scale=30.0)
"""FLUX.1 Fill's own settings."""
RESTYLED = 0.6
"""How far a whole panel is taken from its picture: diffusers' image-to-image strength for FLUX."""
_PAINTED = 128  # of 255: from here on a mask says that a pixel is painted


@dataclass(frozen=True)
class Canvas:
    """A canvas [A | B].

    Args:
        reference: as it was given.
        picture: RGB, sides multiples of the packing grid.
        mask: L, of its size; white is painted, A is black.
        box: left, top, right and bottom of panel B in pixels.
        arrangement, split: of `FillDiptych`; the panels meet at a border of tokens.
        strength: of the pipeline's call.
    """

    reference: Image.Image
    picture: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]
    arrangement: str
    split: float
    strength: float = 1.0

    def crop(self, painted: Image.Image) -> Image.Image:
        """Panel B of a painted canvas."""
        return painted.crop(self.box)


def fill_canvas(
    reference: Picture,
    target: Picture | None = None,
    *,
    mask: Picture | None = None,
    height: int | None = None,
    width: int | None = None,
    arrangement: str = "side_by_side",
    strength: float | None = None,
    multiple: int = 16,
    longest: int = 768,
) -> Canvas:
    """A canvas with the reference as panel A.

    Three ways of working: without a target panel B is blank and painted whole; a target without a
    mask is restyled, which begins from its noised latents (`strength` below 1); a target with a
    mask is kept where the mask is black, and gets what the reference shows where it is white.

    Args:
        target: what panel B shows at first.
        mask: of the target's size; white is painted. A pixel of the canvas is painted where any
            part of it is.
        height, width: of panel B in pixels, rounded down to the grid; one or both at None follow
            the target's (else the reference's) proportions, both with a longer side of `longest`.
            Panel A gets the side they share and keeps its own proportions, to the nearest cell of
            the grid.
        arrangement: "side_by_side" has A on the left, "stacked" on top.
        strength: how far the canvas is taken from what it shows, 0 to 1; None is 1, and 0.6 for a
            target without a mask.
        multiple: pixels of a token's side: 16 for FLUX.1's VAE.

    Raises:
        ValueError: with every reason: a target that would be lost for want of a mask, a mask
            without a target, of another size or all black, an unknown arrangement, a strength or
            size without meaning.
        FileNotFoundError: no such picture.

    Source: the canvas of Huang et al., In-Context LoRA, arXiv 2410.23775; Song et al., Insert
        Anything, arXiv 2504.15009 (panels of 768 pixels); Black Forest Labs, FLUX.1 Fill [dev].
    """
    shown = read_picture(reference)
    kept = None if target is None else read_picture(target)
    painted = None if mask is None else _binary(mask)
    if strength is None:
        strength = RESTYLED if kept is not None and painted is None else 1.0
    reasons = [] if arrangement in ARRANGEMENTS else [f"unknown arrangement {arrangement!r}"]
    reasons += _against(kept, painted, strength)
    if any(side is not None and side < multiple for side in (height, width)):
        reasons.append(f"height and width must be at least {multiple}, got {height} and {width}")
    if reasons:
        raise ValueError(f"fill_canvas: {'; '.join(reasons)}")
    b = _panel_b((kept or shown).size, (width, height), longest, multiple)
    beside = arrangement == "side_by_side"
    shared, free = (1, 0) if beside else (0, 1)
    ratio = shown.size[free] / shown.size[shared]
    a = [0, 0]
    a[shared] = b[shared]
    a[free] = max(1, round(b[shared] * ratio / multiple)) * multiple
    size, corner = [0, 0], [0, 0]
    size[shared], size[free] = b[shared], a[free] + b[free]
    corner[free] = a[free]
    canvas = Image.new("RGB", (size[0], size[1]))
    canvas.paste(shown.resize((a[0], a[1]), Image.Resampling.LANCZOS), (0, 0))
    if kept is not None:
        canvas.paste(kept.resize((b[0], b[1]), Image.Resampling.LANCZOS), (corner[0], corner[1]))
    where = Image.new("L", canvas.size, 0)
    hole = Image.new("L", (b[0], b[1]), 255)
    if painted is not None:
        hole = painted.resize(hole.size, Image.Resampling.BOX).point(lambda x: 255 * (x > 0))
    where.paste(hole, (corner[0], corner[1]))
    box = (corner[0], corner[1], size[0], size[1])
    return Canvas(shown, canvas, where, box, arrangement, a[free] / size[free], float(strength))


def _panel_b(
    own: tuple[int, int], given: tuple[int | None, int | None], longest: int, multiple: int
) -> tuple[int, int]:
    """Width and height of panel B: as given, or of a picture's shape."""
    width, height = given
    if width is not None and height is not None:
        return width // multiple * multiple, height // multiple * multiple
    if width is not None:
        longest = round(width * max(own) / own[0])
    if height is not None:
        longest = round(height * max(own) / own[1])
    b = fitted(own, longest, multiple)
    return (
        b[0] if width is None else width // multiple * multiple,
        b[1] if height is None else height // multiple * multiple,
    )


def _binary(mask: Picture) -> Image.Image:
    return read_picture(mask).convert("L").point(lambda x: 255 * (x >= _PAINTED))


def _against(kept: Image.Image | None, painted: Image.Image | None, strength: float) -> list[str]:
    """What is wrong with a target, its mask, and the strength."""
    reasons = []
    if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        reasons.append(f"strength must lie in (0, 1], got {strength!r}")
    elif kept is None and strength < 1:
        reasons.append("a strength below 1 needs a target to begin from")
    elif kept is not None and painted is None and strength == 1:
        reasons.append(
            "the mask is missing: at strength 1 nothing of the target would remain; give a mask,"
            " or a strength below 1"
        )
    if painted is not None and kept is None:
        reasons.append("a mask needs a target")
    elif painted is not None and kept is not None and painted.size != kept.size:
        sizes = " x ".join(map(str, painted.size)), " x ".join(map(str, kept.size))
        reasons.append(f"the mask is {sizes[0]} pixels, the target {sizes[1]}")
    if painted is not None and painted.getbbox() is None:
        reasons.append("the mask is all black: nothing would be painted")
    return reasons


def fill_diptych(
    pipe: Any,
    canvas: Canvas,
    prompts: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[Any] = (FillDiptych(),),
    sampling: Sampling = FILL,
    *,
    backend: str | None = None,
    callback: Callable[[int, int], object] | None = None,
    whole: Callable[[int, Image.Image], object] | None = None,
) -> list[Image.Image]:
    """Panel B of a canvas, painted once for every prompt.

    Args:
        pipe: a FluxFillPipeline.
        canvas: of `fill_canvas`, with `multiple` as `grid_of` says.
        prompts, seeds: one for each picture.
        methods: at work; a `FillDiptych` gets the canvas' arrangement and split, a `Redux` without
            references the reference's picture. None at all is the pipeline as it is.
        sampling: its size is the canvas'; FLUX.1 Fill knows neither negative prompts nor true
            guidance.
        callback: called with (steps done, steps).
        whole: called with (number, the whole canvas painted).

    Raises:
        HostUnsupported: a pipeline that does not fill; with every reason.
        ValueError: settings that do not fit it.
    """
    reasons = against_filling(getattr(pipe, "transformer", None), pipe)
    if reasons:
        raise HostUnsupported(f"fill_diptych needs FLUX.1 Fill: {'; '.join(reasons)}")
    if sampling.negative_prompt is not None or sampling.true_guidance != 1.0:
        raise ValueError("fill_diptych: FLUX.1 Fill has no negative prompt and no true guidance")
    ready = [_fitted_to(method, canvas) for method in methods]
    count, (width, height) = len(prompts), canvas.picture.size
    with apply(pipe, *ready, backend=backend) if ready else nullcontext():
        painted = generate(
            pipe,
            prompts,
            seeds,
            replace(sampling, height=height, width=width),
            callback=callback,
            image=[canvas.picture] * count,
            mask_image=[canvas.mask] * count,
            strength=canvas.strength,
        )
    for i, picture in enumerate(painted if whole is not None else ()):
        whole(i, picture)  # type: ignore[misc]
    return [canvas.crop(picture) for picture in painted]


def grid_of(pipe: Any) -> int:
    """Pixels of a token's side: the VAE's cells, packed two by two."""
    return 2 * vae_scale(pipe)


def _fitted_to(method: Any, canvas: Canvas) -> Any:
    if isinstance(method, FillDiptych):
        return replace(method, arrangement=canvas.arrangement, split=canvas.split)
    if isinstance(method, Redux) and method.references is None:
        return replace(method, references=(Reference(image=canvas.reference),))
    return method
