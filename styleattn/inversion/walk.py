"""Walking from latent to latent: progress, stopping, and files from which a walk goes on."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import load_tensors, save_tensors

Callback = Callable[[int, int], bool | None]
Advance = Callable[[list[Tensor]], Tensor]
"""The next latent, from all latents found so far (on the CPU)."""
CHECKPOINT = "styleattn.inversion-checkpoint"


class Stopped(RuntimeError):
    """A callback asked to stop; ``done`` of ``total`` moves were made."""

    def __init__(self, done: int, total: int, checkpoint: str | None):
        kept = f"; {checkpoint} resumes it" if checkpoint else ""
        super().__init__(f"stopped after {done} of {total} steps{kept}")
        self.done, self.total = done, total


def walk(
    start: Tensor,
    moves: int,
    advance: Advance,
    keeper: Checkpoint,
    callback: Callback | None,
    total: int,
) -> list[Tensor]:
    """All latents of a walk, the start included, on the CPU; goes on where the checkpoint stopped.

    Args:
        moves: how many to make; total: what progress is reported against.

    Raises:
        Stopped: the callback returned False.
        ValueError: the checkpoint belongs to another walk.
    """
    found = keeper.load() or [start.cpu()]
    with keeper.saving(found):
        while len(found) <= moves:
            found.append(advance(found).cpu())
            keeper.tick(found)
            report(callback, len(found) - 1, total, keeper)
    return found


def report(callback: Callback | None, done: int, total: int, keeper: Checkpoint | None) -> None:
    """Tell the callback, and stop where it says so.

    Raises:
        Stopped: it returned False.
    """
    if callback is not None and callback(done, total) is False and done < total:
        raise Stopped(done, total, keeper.name if keeper else None)


def identity(clean: Tensor, *settings: object) -> str:
    """A name for a walk: its start and its settings."""
    digest = hashlib.sha256(clean.cpu().numpy().tobytes())
    digest.update(repr(settings).encode())
    return digest.hexdigest()


@dataclass
class Checkpoint:
    """The latents found so far, in a file that belongs to one inversion only."""

    path: str | os.PathLike[str] | None
    identity: str
    every: int

    @property
    def name(self) -> str | None:
        return None if self.path is None else os.fspath(self.path)

    def load(self) -> list[Tensor] | None:
        if self.path is None or not Path(self.path).exists():
            return None
        tensors, metadata = load_tensors(self.path, CHECKPOINT)
        if metadata.get("identity") != self.identity:
            raise ValueError(
                f"checkpoint {self.name} belongs to another inversion "
                "(picture, prompt or settings differ); delete it"
            )
        return list(tensors["latents"].split(1))

    def save(self, found: list[Tensor]) -> None:
        if self.path is not None:
            tensors = {"latents": torch.cat(found)}
            save_tensors(self.path, tensors, CHECKPOINT, {"identity": self.identity})

    def tick(self, found: list[Tensor]) -> None:
        if (len(found) - 1) % max(1, self.every) == 0:
            self.save(found)

    @contextlib.contextmanager
    def saving(self, found: list[Tensor]) -> Iterator[None]:
        """Save what there is when the walk is left early, whatever the reason."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self.save(found)
            raise

    def remove(self) -> None:
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)
