"""A method's whole recipe in one call from Python: pictures in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from styleattn.inversion.host import Picture, read_picture
from styleattn.methods import METHODS
from styleattn.references import StyleBank

from .folder import run_folder
from .hosts import host_of
from .recipes import recipe_of
from .sampling import Sampling
from .settings import DEFAULTS, FLUX_DEFAULTS, SCHNELL_DEFAULTS
from .sources import Job, Source
from .style_aligned import Inversion
from .stylize import inversion_of, sampling_of


def styled_pictures(
    pipe: Any,
    method: Any,
    prompts: str | Sequence[str] = "",
    *,
    reference: Picture | Source | Sequence[Picture | Source] = (),
    content: Picture | Source | Sequence[Picture | Source] = (),
    sampling: Sampling | None = None,
    inversion: Inversion | None = None,
    bank: StyleBank | None = None,
    seed: int = 0,
    batch_size: int = 4,
    control_scale: float | None = None,
    backend: str | None = None,
    folder: str | Path | None = None,
    features: str | Path | None = None,
    progress: Callable[[str, int, int], object] = lambda stage, done, total: None,
) -> list[Image.Image]:
    """Pictures by a method's whole recipe, as `styleattn stylize` makes them: what has to be
    inverted is inverted, the noise prepared, the method switched on, and off again.

    Args:
        pipe: a Stable Diffusion 1, 2 or XL, or a FLUX.1 pipeline, with the scheduler that it has;
            `use_ddim` gives a UNet's the command line's.
        method: an instance of one of `METHODS`, with its adapter where it has one.
            `FillDiptych` has a canvas: `fill_diptych`.
        prompts: one picture each; a single one serves every content picture.
        reference: the style: pictures, paths, or `Source` with prompt and weight.
        content: for methods that restyle a picture: one for all prompts, or one for each.
        sampling, inversion: None for what suits the method, and schnell where the pipeline is it.
        bank: a ready bank in place of references.
        seed: picture i is drawn from ``seed + i``.
        batch_size: pictures per call of the pipeline.
        control_scale: of the pipeline's ControlNet; None for the recipe's own.
        backend: of the attention.
        folder: where pictures, inversions and settings are kept, and found again by a later call;
            None keeps nothing.
        features: where StyleID and its like keep what they read of their references, for further
            calls.
        progress: called with (stage, done, total); stages are "reference" and "pictures", in steps.

    Raises:
        ValueError, TypeError, FileNotFoundError: inputs without meaning, before anything is
            computed.
    """
    if not isinstance(method, tuple(METHODS.values())):
        raise TypeError(f"styled_pictures takes a method such as StyleAligned(), got {method!r}")
    usual = _usual(pipe, method)
    contents = _sources(content)
    told = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    job = Job(
        prompts=told * len(contents) if len(told) == 1 and len(contents) > 1 else told,
        method=method,
        sampling=sampling_of(usual) if sampling is None else sampling,
        inversion=inversion_of(usual) if inversion is None else inversion,
        seed=seed,
        batch_size=batch_size,
        backend=backend,
        control_scale=control_scale,
        features=None if features is None else str(features),
    )
    with TemporaryDirectory() as passing:
        out = Path(passing if folder is None else folder)
        manifest = run_folder(
            pipe,
            job,
            out,
            sources=_sources(reference),
            contents=contents,
            bank=bank,
            progress=progress,
        )
        return [read_picture(out / picture["file"]) for picture in manifest["pictures"]]


def _usual(pipe: Any, method: Any) -> dict[str, Any]:
    """The options that suit a method on a pipeline."""
    host = host_of(pipe)
    usual = {**DEFAULTS, **(FLUX_DEFAULTS if host == "flux" else {})}
    distilled = host == "flux" and not pipe.transformer.config.guidance_embeds
    own = SCHNELL_DEFAULTS if distilled else {}
    return {**usual, **recipe_of(method.name, host).defaults, **own}


def _sources(given: Picture | Source | Sequence[Picture | Source]) -> tuple[Source, ...]:
    """Pictures as they were given, each with a name."""
    each = given if isinstance(given, (list, tuple)) else (given,)
    return tuple(x if isinstance(x, Source) else Source(x, name=_name(x)) for x in each)


def _name(picture: Picture) -> str:
    return Path(picture).stem if isinstance(picture, (str, Path)) else ""
