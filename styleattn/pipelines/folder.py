"""A folder of styled pictures: written batch by batch, whole or not at all, and taken up where it
stopped."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from styleattn.backends import Unsupported, backends
from styleattn.inversion.files import write_atomic, write_json
from styleattn.inversion.host import device_of, fingerprint, read_picture
from styleattn.processors import apply
from styleattn.references import StyleBank

from .drawing import Drawing
from .hosts import check_sampling, denoiser, host_of
from .models import device_name, versions
from .sampling import batches
from .sheet import Cell, contact_sheet
from .sources import FORMAT, Job, Ready, Source, Workshop, bank_key, digest, shown, style_latents
from .style_aligned import check_inversion

MANIFEST, SHEET = "manifest.json", "contact_sheet.png"
_CHUNK = "styleattn"  # of the PNG: which settings made it
Progress = Callable[[str, int, int], object]


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
    contents: Sequence[Source] = (),
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
        sources: the references, at least one without a bank where the method takes a style.
        contents: for methods that restyle a picture: one for each prompt, or one for all.
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
    job = shown(replace(job, host=host_of(pipe)), sources)
    together = 1 if job.recipe.single or len(contents) > 1 else job.batch_size
    runs = batches(len(job.prompts), min(together, job.batch_size))
    _check(pipe, job, sources, contents, bank)
    out.mkdir(parents=True, exist_ok=True)
    folder = _Folder(pipe, job, out, progress)
    device, model = device_of(pipe), denoiser(pipe)
    folder.manifest = {
        "format": FORMAT,
        "complete": False,
        "settings": job.settings(),
        "scheduler": _scheduler(pipe),
        "denoiser": fingerprint(model),
        "controlnet": _control(pipe),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": {"type": device.type, "name": device_name(device)},
        "versions": versions(),
        "reference": None,
        "pictures": [],
        "seconds": {"before": time.perf_counter() - began},
    }
    folder.save()  # a folder that cannot be written is found out before anything is computed
    start = time.perf_counter()
    ready = Workshop(pipe, job, out, folder.manifest, progress).ready(sources, contents, bank)
    folder.manifest["seconds"]["reference"] = time.perf_counter() - start
    _note(folder, ready, contents)
    keys = [_key(folder, ready, i) for i in range(len(job.prompts))]
    titles = _titles(job, contents)
    names = [f"{i:04d}-{_slug(title)}.png" for i, title in enumerate(titles)]
    _pictures(folder, ready, runs, keys, names)
    cells = [Cell(_shown(out / name), title) for name, title in zip(names, titles, strict=True)]
    given = [
        Cell(read_picture(s.picture), f"{role}: {s.prompt or s.name}")
        for role, pictures in (("reference", sources), ("content", contents))
        for s in pictures
        if s.picture
    ]
    _write_sheet(out / SHEET, [*given, *cells])
    folder.manifest["complete"] = True
    folder.manifest["seconds"]["all"] = time.perf_counter() - began
    folder.save()
    return folder.manifest


def _titles(job: Job, contents: Sequence[Source]) -> list[str]:
    """What each picture is called: its prompt, or its content."""
    names = [s.name for s in contents]
    return [
        prompt or (names[i if len(names) > 1 else 0] if names else "")
        for i, prompt in enumerate(job.prompts)
    ]


def _note(folder: _Folder, ready: Ready, contents: Sequence[Source]) -> None:
    """What the pictures are made from, in the manifest."""
    bank = ready.bank
    if bank is not None:
        folder.manifest["reference"] = {"fingerprint": bank_key(bank), **dict(bank.metadata)}
    folder.manifest["contents"] = [
        {"name": source.name, "key": key, **({} if path is None else path.summary())}
        for source, key, path in zip_longest(contents, ready.keys[1:], ready.contents)
    ]


def _check(
    pipe: Any,
    job: Job,
    sources: Sequence[Source],
    contents: Sequence[Source],
    bank: StyleBank | None,
) -> None:
    """Find out before anything is computed or written that a method does not fit the model."""
    recipe, name = job.recipe, job.method.name
    if not job.prompts:
        raise ValueError("no prompts")
    if "style" in recipe.roles and not sources and bank is None:
        raise ValueError("no reference: at least one source, or a bank, is needed")
    if recipe.content != bool(contents):
        needs = "needs a content picture" if recipe.content else "takes no content picture"
        raise ValueError(f"{name} {needs} (--content)")
    if recipe.most and len(sources) > recipe.most:
        raise ValueError(f"{name} takes {recipe.most} reference pictures, got {len(sources)}")
    if job.control_scale is not None and getattr(pipe, "controlnet", None) is None:
        raise ValueError("a control scale needs a ControlNet (--controlnet)")
    if job.control_scale is not None and not 0 <= job.control_scale < inf:
        raise ValueError(f"control_scale must be finite and >= 0, got {job.control_scale}")
    if job.features is not None and not (job.host == "unet" and hasattr(job.method, "CACHED")):
        model = "FLUX" if job.host == "flux" else "UNets"
        raise ValueError(f"{name} keeps no features on {model} (--features)")
    if len(contents) not in (0, 1, len(job.prompts)):
        raise ValueError(
            f"{len(contents)} content pictures need as many prompts, got {len(job.prompts)}"
        )
    if sources and not ("style" in recipe.roles or recipe.shown or recipe.most):
        raise ValueError(f"{name} takes no reference picture")
    if bank is not None and (sources or "style" not in recipe.roles):
        raise ValueError(
            "a bank takes the place of references; give one or the other"
            if "style" in recipe.roles
            else f"{name} takes no bank"
        )
    if not 0 <= job.seed < 2**63 - len(job.prompts):
        raise ValueError(f"seed must lie in 0..{2**63 - len(job.prompts) - 1}, got {job.seed}")
    if recipe.roles and any(s.picture is not None for s in (*sources, *contents)):
        check_inversion(pipe, job.inversion)
    offset, steps = job.inversion.offset, job.sampling.num_inference_steps
    check_sampling(pipe, job.sampling, recipe.pipeline)
    if offset is not None and not 0 <= offset < steps:
        raise ValueError(f"offset must lie in 0..{steps - 1}, got {offset}")
    recipe.check(job)
    apply(pipe, job.method, *job.further, backend=job.backend).remove()
    status = None if job.backend is None else backends()[job.backend]
    if status is not None and not status.available:
        raise Unsupported(f"backend {status.name!r} cannot run here: {status.detail}")


def _key(folder: _Folder, ready: Ready, index: int) -> str:
    """A name for everything that picture ``index`` depends on, its batch apart."""
    settings, bank = folder.job.settings(), ready.bank
    settings["seed"] = folder.job.seed + index
    for name in ("batch_size", "model"):
        settings.pop(name)
    names = ("scheduler", "denoiser", "controlnet", "dtype", "versions")
    fixed = {name: folder.manifest[name] for name in names}
    facts = {
        **fixed,
        "format": FORMAT,
        "device": folder.manifest["device"]["type"],
        "settings": settings,
        "prompt": folder.job.prompts[index],
        "made_from": ready.key(index),
        "bank": None if bank is None else [bank.offset, [r.to_dict() for r in bank.references]],
    }
    return digest(facts)


def _control(pipe: Any) -> str | None:
    """A name for the pipeline's ControlNet."""
    found = getattr(pipe, "controlnet", None)
    return fingerprint(found) if isinstance(found, torch.nn.Module) else None


def _scheduler(pipe: Any) -> dict[str, Any]:
    config = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    return {"class": type(pipe.scheduler).__name__, **json.loads(json.dumps(config, default=str))}


def _pictures(
    folder: _Folder, ready: Ready, runs: list[range], keys: list[str], names: list[str]
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
            pictures = _generate(folder, ready, run, (number * steps, total), names)
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
                    **({"canvas": _canvas(names[i])} if job.canvas else {}),
                }
            )
        folder.progress("pictures", (number + 1) * steps, total)
        folder.save()


def _canvas(name: str) -> str:
    """The file of the canvas that a picture was cut from."""
    return f"{name.removesuffix('.png')}-canvas.png"


def _generate(
    folder: _Folder, ready: Ready, run: range, progress: tuple[int, int], names: Sequence[str]
) -> list[Image.Image]:
    """One batch, styled."""
    before, total = progress

    def keep(number: int, whole: Image.Image) -> None:
        _write_png(folder.out / _canvas(names[run.start + number]), whole, {})

    def report(step: int, steps: int) -> None:
        folder.progress("pictures", before + step, total)

    job, first = folder.job, run.start
    drawing = Drawing(
        pipe=folder.pipe,
        method=job.method,
        sampling=job.sampling,
        backend=job.backend,
        bank=ready.rows(folder.pipe, job, first),
        content=ready.content(first),
        style=style_latents(ready.bank),
        sources=ready.sources,
        picture=ready.picture(first),
        control_scale=job.control_scale,
        features=job.features,
        filling=job.filling,
        whole=keep,
        seed=job.seed,
        prompts=[job.prompts[i] for i in run],
        seeds=[job.seed + i for i in run],
        callback=report,
    )
    return job.recipe.draw(drawing)


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
