"""The demonstration: an embedded model, a few references, prompts with and without their style."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from styleattn import tiny
from styleattn.inversion.files import write_atomic, write_json

from .models import TINY, ModelRefused, hushed, load_model, versions
from .sampling import generate
from .settings import merged, styled_method
from .sheet import Cell, contact_sheet
from .style_aligned import make_trajectory, transfer
from .stylize import inversion_of, sampling_of

SHEET, FACTS = "demo.png", "demo.json"
_REFERENCES = 3


def run_demo(
    out: Path,
    *,
    model: str = TINY,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    progress: Callable[[str, int, int], object] = lambda stage, done, total: None,
) -> Path:
    """Write ``out/demo.png``: one row of prompts without style, then one row for each reference
    picture.

    Every column starts from the same noise, so that only the reference differs. ``out/demo.json``
    says how it was made.

    Args:
        model: an embedded model.
        seed: picture i is drawn from ``seed + i``.
        steps: None for what suits the model.
        progress: called with (stage, done, total), in denoising steps.

    Returns:
        the path of the picture.

    Raises:
        OSError: the folder cannot be written.
        ModelRefused: no such embedded model, a damaged one, or no such device.
    """
    if model not in tiny.MODELS:
        raise ModelRefused(f"demo draws with {' or '.join(tiny.MODELS)}, not {model!r}")
    settings = merged({"model": model, "steps": steps}, None)
    method = styled_method(settings, ())
    sampling, inversion = sampling_of(settings), inversion_of(settings)
    out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"model": model, "seed": seed, "steps": sampling.num_inference_steps}
    write_json(out / FACTS, {**facts, "complete": False})
    started = time.perf_counter()
    with hushed():
        pipe = load_model(model, device=device)
    prompts, references = list(tiny.prompts()), list(tiny.references())[:_REFERENCES]
    total = sampling.num_inference_steps * (1 + 2 * len(references))
    base = 0

    def report(done: int, _: int) -> None:
        progress("demo", base + done, total)

    plain = generate(pipe, prompts, range(seed, seed + len(prompts)), sampling, callback=report)
    rows = [_row(Cell(label="without style"), prompts, plain)]
    for reference in references:
        base += sampling.num_inference_steps
        trajectory = make_trajectory(
            pipe, reference.image, reference.prompt, sampling, inversion, callback=report
        )
        base += sampling.num_inference_steps
        styled = transfer(
            pipe,
            trajectory,
            prompts,
            method=method,
            sampling=sampling,
            inversion=inversion,
            seed=seed,
            batch_size=len(prompts),
            callback=report,
        )
        rows.append(_row(Cell(reference.image, f"reference: {reference.name}"), prompts, styled))
    buffer = io.BytesIO()
    contact_sheet(rows, title="styleattn: prompts in the style of a picture").save(buffer, "PNG")
    write_atomic(out / SHEET, lambda stream: stream.write(buffer.getvalue()))
    facts |= {
        "complete": True,
        "prompts": prompts,
        "references": [{"name": r.name, "prompt": r.prompt} for r in references],
        "method": method.to_dict(),
        "versions": versions(),
        "seconds": time.perf_counter() - started,
    }
    write_json(out / FACTS, facts)
    return out / SHEET


def _row(first: Cell, prompts: list[str], pictures: list[Image.Image]) -> list[Cell]:
    return [first, *(Cell(picture, p) for p, picture in zip(prompts, pictures, strict=True))]
