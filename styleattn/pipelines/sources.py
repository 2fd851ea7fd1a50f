"""Pictures that others are made from, made ready once and kept in the folder of a job."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from styleattn.inversion import Trajectory
from styleattn.inversion.host import Picture, read_picture
from styleattn.references import Reference, StyleBank

from .additions import Lora, Word, file_digest
from .hosts import levels, size_of
from .recipes import Recipe, recipe_of
from .sampling import Sampling
from .style_aligned import TRANSFER, Inversion, make_bank, make_trajectory

FORMAT = 1
BANK, CONTENT = "reference.safetensors", "content-{}.safetensors"
_CHECKPOINT = ".inversion"
_FILES = ("adapter", "image_encoder", "csd", "identity")  # of methods


@dataclass(frozen=True)
class Source:
    """A picture or path, or None to make it from ``prompt``; its weight; and what to call it."""

    picture: Picture | None = None
    prompt: str = ""
    weight: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class Job:
    """What to make: everything that the pictures depend on, apart from model and references.

    Args:
        prompts: one picture each; picture i is drawn from ``seed + i``.
        model: what the user calls the model; for the manifest.
        batch_size: pictures per pipeline call. It changes results by rounding only.
        loras, words: what was added to the model, for the manifest; `load_model` adds them.
        control_scale: of a ControlNet; None for the recipe's own.
        features: a folder that keeps what the method reads of its references, for further runs; it
            changes results by rounding only.
        filling: what belongs to a canvas, for methods that paint on one.
        host: "unet" or "flux"; `run_folder` sets it to what its pipeline is.
    """

    prompts: tuple[str, ...]
    method: Any = TRANSFER
    sampling: Sampling = field(default_factory=Sampling)
    inversion: Inversion = field(default_factory=Inversion)
    seed: int = 0
    batch_size: int = 4
    backend: str | None = None
    model: str = ""
    loras: tuple[Lora, ...] = ()
    words: tuple[Word, ...] = ()
    control_scale: float | None = None
    features: str | None = None
    filling: Any = None
    host: str = "unet"

    @property
    def recipe(self) -> Recipe:
        """How the method's pictures are made."""
        return recipe_of(self.method.name, self.host)

    @property
    def further(self) -> tuple[Any, ...]:
        """What is at work next to the method."""
        return () if self.filling is None else tuple(self.filling.methods)

    @property
    def canvas(self) -> bool:
        """Whether whole canvases are kept."""
        return self.filling is not None and bool(self.filling.whole)

    def added(self) -> dict[str, Any]:
        """What was added to the model."""
        return {
            "loras": [x.facts() for x in self.loras],
            "textual_inversions": [x.facts() for x in self.words],
        }

    def settings(self) -> dict[str, Any]:
        """All settings, JSON-ready."""
        return {
            **{f: getattr(self, f) for f in ("seed", "batch_size", "backend", "model", "host")},
            "control_scale": self.control_scale,
            "filling": None if self.filling is None else self.filling.facts(),
            **self.added(),
            "method": self.method.to_dict(),
            "sampling": asdict(self.sampling),
            "inversion": asdict(self.inversion),
        }


@dataclass(frozen=True)
class Ready:
    """Sources made ready.

    Args:
        bank: the styles; None without any.
        contents: trajectories, one for every picture or one for all; empty without any.
        keys: a name for the styles, and one for each content.
        sources: the styles as they were given.
        pictures: the content pictures as they were given.
    """

    bank: StyleBank | None
    contents: tuple[Trajectory, ...]
    keys: tuple[str, ...]
    sources: tuple[Source, ...] = ()
    pictures: tuple[Picture | None, ...] = ()

    def picture(self, index: int) -> Picture | None:
        """The content picture of picture ``index``."""
        if not self.pictures:
            return None
        return self.pictures[index if len(self.pictures) > 1 else 0]

    def content(self, index: int) -> Trajectory | None:
        """The content of picture ``index``."""
        if not self.contents:
            return None
        return self.contents[index if len(self.contents) > 1 else 0]

    def key(self, index: int) -> list[str]:
        """A name for all that picture ``index`` is made from."""
        own = self.keys[1:]
        return [self.keys[0], *([own[index if len(own) > 1 else 0]] if own else [])]

    def rows(self, pipe: Any, job: Job, index: int) -> StyleBank | None:
        """The bank of picture ``index``: a row for each of the recipe's roles."""
        banks = []
        for role in job.recipe.roles:
            content = self.content(index)
            if role == "content" and content is not None:
                negative = job.sampling.negative_prompt
                banks.append(
                    make_bank(pipe, content, job.method, offset=0, negative_prompt=negative)
                )
            elif role == "style" and self.bank is not None:
                banks.append(self.bank)
        return joined(banks) if banks else None


def joined(banks: Sequence[StyleBank]) -> StyleBank:
    """One bank with the rows of several.

    Raises:
        ValueError: banks of other timesteps, sizes or conditions.
    """
    if len(banks) == 1:
        return banks[0]
    first = banks[0]
    for bank in banks[1:]:
        alike = (
            torch.equal(bank.timesteps, first.timesteps)
            and bank.latents.shape[1:] == first.latents.shape[1:]
            and bank.offset == first.offset
            and set(bank.conditions) == set(first.conditions)
        )
        if not alike:
            raise ValueError("content and style must share timesteps, size and offset")
    conditions = {n: torch.cat([b.conditions[n] for b in banks]) for n in first.conditions}
    references = tuple(r for b in banks for r in b.references)
    return StyleBank(
        torch.cat([b.latents for b in banks]), first.timesteps, conditions, references, first.offset
    )


@dataclass(frozen=True)
class Workshop:
    """Where sources are made ready.

    Args:
        facts: of the model and device: "denoiser", "scheduler", "dtype", "device".
        progress: called with (stage, done, total).
    """

    pipe: Any
    job: Job
    out: Path
    facts: Mapping[str, Any]
    progress: Callable[[str, int, int], object]

    def ready(
        self, sources: Sequence[Source], contents: Sequence[Source], bank: StyleBank | None
    ) -> Ready:
        """The sources, found in the folder where they are the same, else made."""
        recipe = self.job.recipe
        inverted = sources if bank is None and "style" in recipe.roles else ()
        if recipe.beside and all(source.picture is None for source in sources):
            inverted = ()
        shown = () if recipe.inverted else contents
        total = (len(inverted) + len(contents) - len(shown)) * self._steps
        styles = self._bank(inverted, total) if inverted else bank
        made = [
            self._content(i, source, (len(inverted) + i) * self._steps, total)
            for i, source in enumerate(contents if recipe.inverted else ())
        ]
        name = self._identity(sources, self.job.seed) if styles is None else bank_key(styles)
        own = [self._identity([source], self.job.seed + i) for i, source in enumerate(shown)]
        keys = (name, *(key for _, key in made), *own)
        pictures = tuple(source.picture for source in contents)
        return Ready(styles, tuple(path for path, _ in made), keys, tuple(sources), pictures)

    @property
    def _inversion(self) -> Inversion:
        """The job's, with the labels that the method insists on."""
        labels = getattr(self.job.method, "labels", None)
        return replace(self.job.inversion, labels=labels) if labels else self.job.inversion

    @property
    def _steps(self) -> int:
        return self.job.sampling.num_inference_steps

    def _trajectory(
        self, index: int, source: Source, identity: str, before: int, total: int
    ) -> Trajectory:
        return make_trajectory(
            self.pipe,
            source.picture,
            source.prompt,
            self.job.sampling,
            self._inversion,
            seed=self.job.seed + index,
            checkpoint=self.out / f"{_CHECKPOINT}.{index}.{identity[:16]}",
            callback=lambda done, _: self.progress("reference", before + done, total),
        )

    def _bank(self, sources: Sequence[Source], total: int) -> StyleBank:
        """The bank of the styles."""
        path, identity = self.out / BANK, self._identity(sources, self.job.seed)
        if path.exists():
            try:
                found = StyleBank.load(path)
            except ValueError:
                found = None  # damaged or foreign: made anew
            if found is not None and found.metadata.get("identity") == identity:
                return found
        trajectories = [
            self._trajectory(i, source, identity, i * self._steps, total)
            for i, source in enumerate(sources)
        ]
        bank = make_bank(
            self.pipe,
            trajectories,
            self.job.method,
            weights=[source.weight for source in sources],
            offset=self.job.inversion.offset,
            negative_prompt=self.job.sampling.negative_prompt,
        )
        bank = replace(bank, metadata={**dict(bank.metadata), "identity": identity})
        bank.save(path)
        return bank

    def _content(
        self, index: int, source: Source, before: int, total: int
    ) -> tuple[Trajectory, str]:
        """The trajectory of a content picture, and a name for it."""
        identity = self._identity([source], self.job.seed + index)
        path = self.out / CONTENT.format(identity[:16])
        if path.exists():
            with contextlib.suppress(ValueError):  # damaged or foreign: made anew
                return Trajectory.load(path), identity
        found = self._trajectory(index, source, identity, before, total)
        found.save(path)
        return found, identity

    def _identity(self, sources: Sequence[Source], seed: int) -> str:
        """A name for everything that the trajectories of sources depend on."""
        pipe, job = self.pipe, self.job
        facts = {
            "format": FORMAT,
            "sources": [[pixels_key(s.picture), s.prompt, s.weight] for s in sources],
            "denoiser": self.facts["denoiser"],
            **job.added(),
            "scheduler": self.facts["scheduler"],
            "dtype": self.facts["dtype"],
            "device": self.facts["device"]["type"],
            "timesteps": levels(pipe, job.sampling),
            "size": size_of(pipe, job.sampling.height, job.sampling.width),
            "inversion": asdict(self._inversion),
            "method": job.method.to_dict(),
            "files": [file_digest(getattr(job.method, k, None)) for k in _FILES],
            "negative_prompt": job.sampling.negative_prompt,
            "sampled": [seed, job.sampling.guidance_scale],
        }
        if all(source.picture is not None for source in sources):
            del facts["sampled"]
        return digest(facts)


def shown(job: Job, sources: Sequence[Source]) -> Job:
    """A job whose method is shown the reference pictures, where its recipe says so.

    Raises:
        ValueError: the method has references already.
    """
    if not job.recipe.shown or (job.method.references is not None and not sources):
        return job
    if job.method.references is not None:
        raise ValueError(f"{job.method.name} has references of its own; give them once")
    references = tuple(
        Reference(image=s.picture, prompt=s.prompt, weight=s.weight) for s in sources
    )
    return replace(job, method=replace(job.method, references=references))


def pixels_key(picture: Picture | None) -> str | None:
    """A name for a picture."""
    if picture is None:
        return None
    image = read_picture(picture)
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def bank_key(bank: StyleBank) -> str:
    """A name for a bank."""
    return str(bank.metadata.get("identity") or bank.fingerprint)


def digest(facts: Mapping[str, Any]) -> str:
    """A name for facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def style_latents(bank: StyleBank | None) -> Tensor | None:
    """The latents of the first style."""
    return None if bank is None else bank.latents[0]
