"""A folder of styled pictures: written batch by batch, whole or not at all, and taken up where it
stopped."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from styleattn.inversion.files import write_atomic, write_json
from styleattn.inversion.host import (
    Picture,
    default_size,
    device_of,
    fingerprint,
    read_picture,
    timesteps_of,
)
from styleattn.processors import apply
from styleattn.references import StyleBank

from .models import device_name, versions
from .sheet import Cell, contact_sheet
from .style_aligned import (
    TRANSFER,
    Inversion,
    Sampling,
    batches,
    generate,
    make_bank,
    make_trajectory,
)

FORMAT = 1
BANK, MANIFEST, SHEET = "reference.safetensors", "manifest.json", "contact_sheet.png"
_CHECKPOINT = ".inversion"
_CHUNK = "styleattn"  # of the PNG: which settings made it
Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Source:
    """A reference: a picture or path, or None to make it from ``prompt``; and its weight."""

    picture: Picture | None = None
    prompt: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Job:
    """What to make: everything that the pictures depend on, apart from model and references.

    Args:
        prompts: one picture each; picture i is drawn from ``seed + i``.
        model: what the user calls the model; for the manifest.
        batch_size: pictures per pipeline call. It changes results by rounding only.
    """

    prompts: tuple[str, ...]
    method: Any = TRANSFER
    sampling: Sampling = field(default_factory=Sampling)
    inversion: Inversion = field(default_factory=Inversion)
    seed: int = 0
    batch_size: int = 4
    backend: str | None = None
    model: str = ""

    def settings(self) -> dict[str, Any]:
        """All settings, JSON-ready."""
        return {
            **{f: getattr(self, f) for f in ("seed", "batch_size", "backend", "model")},
            "method": self.method.to_dict(),
            "sampling": asdict(self.sampling),
            "inversion": asdict(self.inversion),
        }


@dataclass
class _Folder:
    """One run of a job in its folder."""

    pipe: Any
    job: Job
    out: Path
    progress: Progress
    manifest: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        write_json(self.out / MANIFEST, self.manifest)


def run_folder(
    pipe: Any,
    job: Job,
    out: Path,
    *,
    sources: Sequence[Source] = (),
    bank: StyleBank | None = None,
    progress: Progress = lambda stage, done, total: None,
    started: float | None = None,
) -> dict[str, Any]:
    """Make the pictures of a job: a PNG per prompt, a contact sheet, a manifest, and the references
    as a bank.

    A picture that is there, whole, and made with the same settings is left alone; a batch that
    lacks one is made again as a whole, so that a run that was interrupted ends with the same bits
    as one that was not.

    Args:
        sources: the references, at least one without a bank.
        bank: a ready bank in place of sources.
        progress: called with (stage, done, total); stages are "reference" and "pictures", in steps.
        started: ``time.perf_counter()`` when the user began to wait.

    Returns:
        the manifest, as written.

    Raises:
        OSError: the folder cannot be written; every file in it is whole.
        HostUnsupported, ValueError: inputs without meaning.
    """
    began = time.perf_counter() if started is None else started
    runs = batches(len(job.prompts), job.batch_size)
    _check(pipe, job)
    if not sources and bank is None:
        raise ValueError("no reference: at least one source, or a bank, is needed")
    out.mkdir(parents=True, exist_ok=True)
    folder = _Folder(pipe, job, out, progress)
    device = device_of(pipe)
    folder.manifest = {
        "format": FORMAT,
        "complete": False,
        "settings": job.settings(),
        "scheduler": _scheduler(pipe),
        "unet": fingerprint(pipe.unet),
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "device": {"type": device.type, "name": device_name(device)},
        "versions": versions(),
        "reference": None,
        "pictures": [],
        "seconds": {"before": time.perf_counter() - began},
    }
    folder.save()  # a folder that cannot be written is found out before anything is computed
    start = time.perf_counter()
    ready = bank if bank is not None else _bank(folder, sources)
    folder.manifest["seconds"]["reference"] = time.perf_counter() - start
    folder.manifest["reference"] = {"fingerprint": _bank_key(ready), **dict(ready.metadata)}
    keys = [_key(folder, ready, i) for i in range(len(job.prompts))]
    names = [f"{i:04d}-{_slug(prompt)}.png" for i, prompt in enumerate(job.prompts)]
    _pictures(folder, ready, runs, keys, names)
    cells = [
        Cell(_shown(out / name), prompt) for name, prompt in zip(names, job.prompts, strict=True)
    ]
    shown = [Cell(read_picture(s.picture), f"reference: {s.prompt}") for s in sources if s.picture]
    _write_sheet(out / SHEET, [*shown, *cells])
    folder.manifest["complete"] = True
    folder.manifest["seconds"]["all"] = time.perf_counter() - began
    folder.save()
    return folder.manifest


def _check(pipe: Any, job: Job) -> None:
    """Find out before anything is computed or written that a method does not fit the model."""
    if not job.prompts:
        raise ValueError("no prompts")
    if not 0 <= job.seed < 2**63 - len(job.prompts):
        raise ValueError(f"seed must lie in 0..{2**63 - len(job.prompts) - 1}, got {job.seed}")
    offset, steps = job.inversion.offset, job.sampling.num_inference_steps
    if offset is not None and not 0 <= offset < steps:
        raise ValueError(f"offset must lie in 0..{steps - 1}, got {offset}")
    apply(pipe, job.method, backend=job.backend).remove()


def _bank(folder: _Folder, sources: Sequence[Source]) -> StyleBank:
    """The bank of these references: the one in the folder if it is the same, else a new one."""
    pipe, job, path = folder.pipe, folder.job, folder.out / BANK
    identity = _identity(folder, sources)
    if path.exists():
        try:
            found = StyleBank.load(path)
        except ValueError:
            found = None  # damaged or foreign: made anew
        if found is not None and found.metadata.get("identity") == identity:
            return found
    steps = job.sampling.num_inference_steps
    trajectories = []
    for i, source in enumerate(sources):
        trajectories.append(
            make_trajectory(
                pipe,
                source.picture,
                source.prompt,
                job.sampling,
                job.inversion,
                seed=job.seed + i,
                checkpoint=folder.out / f"{_CHECKPOINT}.{i}.{identity[:16]}",
                callback=lambda done, _, before=i * steps: folder.progress(  # type: ignore[misc]
                    "reference", before + done, len(sources) * steps
                ),
            )
        )
    bank = make_bank(
        pipe,
        trajectories,
        job.method,
        weights=[source.weight for source in sources],
        offset=job.inversion.offset,
        negative_prompt=job.sampling.negative_prompt,
    )
    bank = replace(bank, metadata={**dict(bank.metadata), "identity": identity})
    bank.save(path)
    return bank


def _identity(folder: _Folder, sources: Sequence[Source]) -> str:
    """A name for everything that the references' trajectories depend on."""
    pipe, job = folder.pipe, folder.job
    size = [job.sampling.height, job.sampling.width]
    facts = {
        "format": FORMAT,
        "sources": [[_pixels(s.picture), s.prompt, s.weight] for s in sources],
        "unet": folder.manifest["unet"],
        "dtype": folder.manifest["dtype"],
        "device": folder.manifest["device"]["type"],
        "timesteps": timesteps_of(pipe, job.sampling.num_inference_steps),
        "size": [a or b for a, b in zip(size, default_size(pipe), strict=True)],
        "inversion": asdict(job.inversion),
        "method": job.method.to_dict(),
        "negative_prompt": job.sampling.negative_prompt,
        "sampled": [job.seed, job.sampling.guidance_scale],
    }
    if all(source.picture is not None for source in sources):
        del facts["sampled"]
    return _digest(facts)


def _pixels(picture: Picture | None) -> str | None:
    if picture is None:
        return None
    image = read_picture(picture)
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def _bank_key(bank: StyleBank) -> str:
    return str(bank.metadata.get("identity") or bank.fingerprint)


def _key(folder: _Folder, bank: StyleBank, index: int) -> str:
    """A name for everything that picture ``index`` depends on, its batch apart."""
    settings = folder.job.settings()
    settings["seed"] = folder.job.seed + index
    for name in ("batch_size", "model"):
        settings.pop(name)
    fixed = {name: folder.manifest[name] for name in ("scheduler", "unet", "dtype", "versions")}
    facts = {
        **fixed,
        "format": FORMAT,
        "device": folder.manifest["device"]["type"],
        "settings": settings,
        "prompt": folder.job.prompts[index],
        "bank": [_bank_key(bank), bank.offset, [r.to_dict() for r in bank.references]],
    }
    return _digest(facts)


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _scheduler(pipe: Any) -> dict[str, Any]:
    config = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    return {"class": type(pipe.scheduler).__name__, **json.loads(json.dumps(config, default=str))}


def _pictures(
    folder: _Folder, bank: StyleBank, runs: list[range], keys: list[str], names: list[str]
) -> None:
    """Make what is missing, batch by batch."""
    job, steps = folder.job, folder.job.sampling.num_inference_steps
    done = [_key_of(folder.out / name) == key for name, key in zip(names, keys, strict=True)]
    entries: list[dict[str, Any]] = folder.manifest["pictures"]
    total = len(runs) * steps
    for number, run in enumerate(runs):
        missing = [i for i in run if not done[i]]
        seconds = 0.0
        if missing:
            start = time.perf_counter()
            pictures = _generate(folder, bank, run, (number * steps, total))
            seconds = (time.perf_counter() - start) / len(run)
            for i in missing:
                facts = {"key": keys[i], "prompt": job.prompts[i], "seed": job.seed + i}
                _write_png(folder.out / names[i], pictures[i - run.start], facts)
        for i in run:
            data = (folder.out / names[i]).read_bytes()
            entries.append(
                {
                    "file": names[i],
                    "prompt": job.prompts[i],
                    "seed": job.seed + i,
                    "batch": number,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "key": keys[i],
                    "found": i not in missing,
                    "seconds": seconds,
                }
            )
        folder.progress("pictures", (number + 1) * steps, total)
        folder.save()


def _generate(
    folder: _Folder, bank: StyleBank, run: range, progress: tuple[int, int]
) -> list[Image.Image]:
    """One batch, styled."""
    before, total = progress

    def report(step: int, steps: int) -> None:
        folder.progress("pictures", before + step, total)

    job = folder.job
    with apply(folder.pipe, job.method, bank=bank, backend=job.backend):
        return generate(
            folder.pipe,
            [job.prompts[i] for i in run],
            [job.seed + i for i in run],
            job.sampling,
            callback=report,
        )


def _write_png(path: Path, picture: Image.Image, facts: Mapping[str, Any]) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(_CHUNK, json.dumps(dict(facts), ensure_ascii=False, sort_keys=True))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    write_atomic(path, lambda stream: stream.write(buffer.getvalue()))


def _write_sheet(path: Path, cells: list[Cell], columns: int = 6) -> None:
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    buffer = io.BytesIO()
    contact_sheet(rows).save(buffer, "PNG")
    write_atomic(path, lambda stream: stream.write(buffer.getvalue()))


def _key_of(path: Path) -> str | None:
    """The key that a whole PNG of ours carries, else None."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return str(json.loads(picture.text[_CHUNK])["key"])  # type: ignore[attr-defined]
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _shown(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "picture"
