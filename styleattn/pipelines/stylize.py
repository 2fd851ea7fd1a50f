"""`styleattn stylize`: from options to a folder of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from styleattn.references import StyleBank

from .additions import Lora, Word
from .filling import filling_of
from .folder import run_folder
from .models import hushed, load_model
from .recipes import recipe_of
from .sampling import Sampling
from .settings import Refused, control_scale, features_of, pictures_of, prompts_of, styled_method
from .sources import Job
from .style_aligned import Inversion


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """How options ask for pictures to be sampled."""
    return Sampling(
        options["steps"],
        float(options["guidance"]),
        options["negative_prompt"],
        options["height"],
        options["width"],
        float(options["true_guidance"]),
    )


def inversion_of(options: Mapping[str, Any]) -> Inversion:
    """How options ask for references to be inverted."""
    return Inversion(
        float(options["inversion_guidance"]),
        options["labels"],
        options["offset"],
        options["inversion"],
    )


def run_stylize(
    options: Mapping[str, Any],
    knobs: Sequence[str],
    *,
    progress: Callable[[str, int, int], object],
    started: float,
) -> str:
    """Make the pictures that options ask for.

    Args:
        options: of the command line and its file, merged with the defaults.
        knobs: of the method, "knob=value".
        progress, started: as in `run_folder`.

    Returns:
        what was made, in one line.

    Raises:
        ValueError, OSError, TypeError: everything that cannot be done; nothing is half-written.
    """
    method = styled_method(options, knobs)
    recipe_of(options["method"], options["host"])
    if options["host"] == "unet" and getattr(method, "adapter", "") is None:
        raise Refused(f"--adapter is missing: {method.name} needs {method.facts.needs}")
    sources, contents = pictures_of(options)
    bank = None if options["bank"] is None else StyleBank.load(options["bank"])
    filling = filling_of(options, method, sources, contents)
    job = Job(
        prompts=prompts_of(options, len(contents)),
        method=method,
        sampling=sampling_of(options),
        inversion=inversion_of(options),
        seed=options["seed"],
        batch_size=options["batch_size"],
        backend=options["backend"],
        model=options["model"],
        control_scale=control_scale(options),
        features=features_of(options),
        filling=filling,
        loras=tuple(Lora.parse(x) for x in options["lora"] or ()),
        words=tuple(Word.parse(x) for x in options["textual_inversion"] or ()),
    )
    names = ("device", "dtype", "variant", "scheduler", "offload", "controlnet")
    with hushed():
        pipe = load_model(
            options["model"],
            **{name: options[name] for name in names},
            loras=job.loras,
            words=job.words,
        )
    manifest = run_folder(
        pipe,
        job,
        Path(options["out"]),
        sources=sources,
        contents=contents,
        bank=bank,
        progress=progress,
        started=started,
    )
    made = sum(not picture["found"] for picture in manifest["pictures"])
    seconds = manifest["seconds"]["all"]
    return f"{made} of {len(job.prompts)} pictures made in {seconds:.1f} s: {options['out']}"
