"""A folder of styled pictures: written batch by batch, whole or not at all, and taken up where it
stopped."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Mapping
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
class Job:
    """What to make: everything that the pictures depend on, apart from the model and the reference.

    Args:
        prompts: one picture each; picture i is drawn from ``seed + i``.
        reference_prompt: what the reference shows.
        model: what the user calls the model; for the manifest.
        batch_size: pictures per pipeline call. It changes results by rounding only.
    """

    prompts: tuple[str, ...]
    reference_prompt: str = ""
    method: Any = TRANSFER
    sampling: Sampling = field(default_factory=Sampling)
    inversion: Inversion = field(default_factory=Inversion)
    seed: int = 0
    batch_size: int = 4
    backend: str | None = None
    model: str = ""

    def settings(self) -> dict[str, Any]:
        """All settings, JSON-ready."""
        plain = {
            f: getattr(self, f)
            for f in ("reference_prompt", "seed", "batch_size", "backend", "model")
        }
        return {
            **plain,
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
    reference: Picture | None = None,
    bank: StyleBank | None = None,
    progress: Progress = lambda stage, done, total: None,
    started: float | None = None,
) -> dict[str, Any]:
    """Make the pictures of a job: a PNG per prompt, a contact sheet, a manifest, and the reference
    as a bank.

    A picture that is there, whole, and made with the same settings is left alone; a batch that
    lacks one is made again as a whole, so that a run that was interrupted ends with the same bits
    as one that was not.

    Args:
        reference: a picture or path; without it and without a bank the reference is made from its
            prompt.
        bank: a ready bank in place of a reference.
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
    ready = bank if bank is not None else _bank(folder, reference)
    folder.manifest["seconds"]["reference"] = time.perf_counter() - start
    folder.manifest["reference"] = {"fingerprint": _bank_key(ready), **dict(ready.metadata)}
    keys = [_key(folder, ready, i) for i in range(len(job.prompts))]
    names = [f"{i:04d}-{_slug(prompt)}.png" for i, prompt in enumerate(job.prompts)]
    _pictures(folder, ready, runs, keys, names)
    cells = [
        Cell(_shown(out / name), prompt) for name, prompt in zip(names, job.prompts, strict=True)
    ]
    shown = None if reference is None else read_picture(reference)
    first = Cell(shown, f"reference: {job.reference_prompt}" if shown else job.reference_prompt)
    _write_sheet(out / SHEET, [first, *cells] if shown else cells)
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


def _bank(folder: _Folder, reference: Picture | None) -> StyleBank:
    """The bank of this reference: the one in the folder if it is the same, else a new one."""
    pipe, job, path = folder.pipe, folder.job, folder.out / BANK
    identity = _identity(folder, reference)
    if path.exists():
        try:
            found = StyleBank.load(path)
        except ValueError:
            found = None  # damaged or foreign: made anew
        if found is not None and found.metadata.get("identity") == identity:
            return found
    trajectory = make_trajectory(
        pipe,
        reference,
        job.reference_prompt,
        job.sampling,
        job.inversion,
        seed=job.seed,
        checkpoint=folder.out / f"{_CHECKPOINT}.{identity[:16]}",
        callback=lambda done, total: folder.progress("reference", done, total),
    )
    bank = make_bank(
        pipe,
        trajectory,
        job.method,
        offset=job.inversion.offset,
        negative_prompt=job.sampling.negative_prompt,
    )
    bank = replace(bank, metadata={**dict(bank.metadata), "identity": identity})
    bank.save(path)
    return bank


def _identity(folder: _Folder, reference: Picture | None) -> str:
    """A name for everything that the reference's trajectory depends on."""
    pipe, job = folder.pipe, folder.job
    pixels = None
    if reference is not None:
        picture = read_picture(reference)
        pixels = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    size = [job.sampling.height, job.sampling.width]
    facts = {
        "format": FORMAT,
        "pixels": pixels,
        "prompt": job.reference_prompt,
        "unet": folder.manifest["unet"],
        "dtype": folder.manifest["dtype"],
        "device": folder.manifest["device"]["type"],
        "timesteps": timesteps_of(pipe, job.sampling.num_inference_steps),
        "size": [a or b for a, b in zip(size, default_size(pipe), strict=True)],
        "inversion": asdict(job.inversion),
        "method": job.method.to_dict(),
        "negative_prompt": job.sampling.negative_prompt,
        "sampled": None if reference is not None else [job.seed, job.sampling.guidance_scale],
    }
    return _digest(facts)


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
