"""`styleattn stylize --method fill_diptych`: what FLUX.1 Fill paints into, from options to
panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from styleattn.inversion import read_picture
from styleattn.inversion.host import Picture, vae_scale
from styleattn.methods import FillDiptych
from styleattn.references import Reference
from styleattn.tiny import MODELS

from .additions import file_digest
from .diptych import Canvas, fill_canvas, fill_diptych, grid_of
from .settings import Refused, make_method
from .sources import Job, Source, pixels_key

if TYPE_CHECKING:
    from .drawing import Drawing

METHOD = FillDiptych.name
_OPTIONS = ("mask", "strength", "canvas")


@dataclass(frozen=True)
class Filling:
    """What belongs to a canvas beside its two pictures.

    Args:
        mask: of the content picture; white is painted. None paints all of it.
        strength: how far the canvas is taken from what it shows; None is `fill_canvas`' own.
        whole: whether the whole canvas is written too.
        redux: the method that shows the reference to the text, or None.
    """

    mask: Picture | None = None
    strength: float | None = None
    whole: bool = False
    redux: Any = None

    @property
    def methods(self) -> tuple[Any, ...]:
        """What is at work next to the job's method."""
        return () if self.redux is None else (self.redux,)

    def facts(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        redux, files = None, {}
        if self.redux is not None:
            redux = self.redux.to_dict()
            files = {k: file_digest(getattr(self.redux, k)) for k in ("adapter", "image_encoder")}
        return {
            "mask": pixels_key(self.mask),
            "strength": self.strength,
            "canvas": self.whole,
            "redux": redux,
            "redux_files": files,
        }


def filling_of(
    options: Mapping[str, Any], method: Any, sources: Sequence[Source], contents: Sequence[Source]
) -> Filling | None:
    """What the options say of a canvas; None for other methods.

    Raises:
        Refused: options that do not go with the method, with every reason.
        ValueError: pictures, mask and strength that make no canvas, with every reason.
        FileNotFoundError: no such mask.
    """
    given = [f"--{name}" for name in _OPTIONS if options[name] not in (None, False)]
    if options["method"] != METHOD:
        if given:
            raise Refused(f"{', '.join(given)}: only {METHOD} paints on a canvas")
        return None
    if options["model"] in MODELS:  # their defaults would speak for the user
        raise Refused(
            f"{METHOD} needs a directory of FLUX.1 Fill; {options['model']} does not fill"
        )
    reasons = []
    if len(sources) != 1 or sources[0].picture is None:
        reasons.append(f"{METHOD} takes one --reference, a picture")
    if options["reference_prompt"] or options["content_prompt"]:
        reasons.append("pictures have no prompts of their own; --prompts say what is painted")
    if options["negative_prompt"] is not None or options["true_guidance"] != 1.0:
        reasons.append("FLUX.1 Fill has no negative prompt and no true guidance")
    if options["adapter"] is None and (options["image_encoder"] or options["reference_weight"]):
        reasons.append("--image-encoder and --reference-weight are Redux', which needs --adapter")
    if method.split != FillDiptych.split:
        reasons.append("split follows from the pictures")
    if reasons:
        raise Refused("; ".join(reasons))
    redux = None
    if options["adapter"] is not None:
        shown = Reference(image=sources[0].picture, weight=sources[0].weight)
        files = {name: options[name] for name in ("adapter", "image_encoder")}
        redux = make_method("redux", (), {**files, "references": (shown,)})
    mask, strength = options["mask"], options["strength"]
    mask = None if mask is None else read_picture(mask)
    found = Filling(
        mask, None if strength is None else float(strength), bool(options["canvas"]), redux
    )
    for content in contents:
        _canvas(found, method, sources[0], content.picture)
    return found


def _canvas(
    filling: Filling, method: Any, source: Source, picture: Picture | None, **size: Any
) -> Canvas:
    if source.picture is None:
        raise ValueError(f"{METHOD} needs a reference picture")
    return fill_canvas(
        source.picture,
        picture,
        mask=filling.mask,
        strength=filling.strength,
        arrangement=method.arrangement,
        **size,
    )


def check(job: Job) -> None:
    """Refuse a job that has no canvas.

    Raises:
        ValueError: its `filling` is missing.
    """
    if not isinstance(job.filling, Filling):
        raise ValueError(f"{METHOD} needs a job with a `filling`; see `fill_diptych` in Python")


def draw(drawing: Drawing) -> list[Image.Image]:
    """Panel B of the content's canvas, painted for every prompt."""
    filling, pipe, sampling = drawing.filling, drawing.pipe, drawing.sampling
    canvas = _canvas(
        filling,
        drawing.method,
        drawing.sources[0],
        drawing.picture,
        height=sampling.height,
        width=sampling.width,
        multiple=grid_of(pipe),
        longest=pipe.default_sample_size * vae_scale(pipe) * 3 // 4,
    )
    return fill_diptych(
        pipe,
        canvas,
        drawing.prompts,
        drawing.seeds,
        (drawing.method, *filling.methods),
        sampling,
        backend=drawing.backend,
        callback=drawing.callback,
        whole=drawing.whole if filling.whole else None,
    )
