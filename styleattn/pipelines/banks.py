"""Bank files: built so that an interrupted build goes on, and described."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from styleattn.inversion import Trajectory, flow_restore, round_trip_error
from styleattn.inversion.ddim import relative_error
from styleattn.inversion.host import Picture
from styleattn.references import StyleBank

from .hosts import host_of, max_tokens
from .sampling import Sampling
from .style_aligned import TRANSFER, Inversion, make_bank, make_trajectory


def build_bank_file(
    pipe: Any,
    picture: Picture,
    prompt: str,
    path: Path,
    sampling: Sampling,
    inversion: Inversion,
    *,
    check: bool = False,
    progress: Callable[[str, int, int], object] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Invert a picture into a bank file.

    Args:
        path: of the bank; ``<path>.partial`` is the checkpoint of an interrupted build.
        check: also sample back from the noise and put the relative error into the bank's facts.
        progress: called with (stage, done, total).

    Returns:
        the facts of the bank (:func:`bank_facts`).

    Raises:
        OSError: the file cannot be written; nothing is half-written.
        HostUnsupported, ValueError: see :func:`styleattn.inversion.ddim_invert`.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else "has no directory to stand in"
        raise ValueError(f"cannot write the bank: {path} {what}")
    trajectory = make_trajectory(
        pipe,
        picture,
        prompt,
        sampling,
        inversion,
        checkpoint=path.with_name(path.name + ".partial"),
        callback=lambda done, total: progress("reference", done, total),
    )
    if check:
        trajectory = trajectory.with_round_trip_error(_way_back(pipe, trajectory))
    bank = make_bank(pipe, trajectory, TRANSFER, offset=inversion.offset)
    facts = {**dict(bank.metadata), "round_trip_error": trajectory.round_trip_error}
    bank = replace(bank, metadata=facts)
    bank.save(path)
    return bank_facts(bank)


def _way_back(pipe: Any, trajectory: Trajectory) -> float:
    """‖z_0' - z_0‖ / ‖z_0‖ of what sampling makes of a trajectory's noise."""
    if host_of(pipe) == "unet":
        return round_trip_error(pipe, trajectory)
    found = flow_restore(pipe, trajectory, max_sequence_length=max_tokens(pipe))
    return relative_error(found, trajectory.latents[-1:])


def bank_facts(bank: StyleBank) -> dict[str, Any]:
    """What is in a bank, JSON-ready."""
    timesteps = bank.timesteps.tolist()
    spread = bank.latents.double().std(dim=(2, 3, 4)).mean(dim=0)
    return {
        "fingerprint": bank.fingerprint,
        "references": [r.to_dict() for r in bank.references],
        "latents": list(bank.latents.shape),
        "timesteps": [len(timesteps), timesteps[0], timesteps[-1]],
        "offset": bank.offset,
        "nbytes": bank.nbytes,
        "std": {"noise": _number(spread[0]), "data": _number(spread[-1])},
        **dict(bank.metadata),
    }


def _number(x: Any) -> float | None:
    value = float(x)
    return round(value, 4) if math.isfinite(value) else None
