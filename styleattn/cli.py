"""The command line: ``styleattn demo | stylize | methods | explain | bank | bench | doctor``.

Every bad input ends in one line on stderr and exit code 2, with nothing half-written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

_INTERRUPTED = 130
_HOSTS = ("diffusers", "transformers", "accelerate")
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Style from a picture, into a batch of prompts, with diffusion models.",
)
bank_app = typer.Typer(no_args_is_help=True, help="References made ready once.")
app.add_typer(bank_app, name="bank")

Model = Annotated[
    str, typer.Option(help="tiny-sdxl, tiny-flux, or a directory of save_pretrained.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16, bfloat16.")]
Variant = Annotated[str | None, typer.Option(help="Of the weight files, such as fp16.")]
Scheduler = Annotated[
    str | None, typer.Option(help="ddim, or pipeline: the model's own, as always on FLUX.")
]
Method = Annotated[str, typer.Option(help="See `styleattn methods`.")]
Knobs = Annotated[list[str] | None, typer.Option("--set", help="knob=value of the method; repeat.")]
References = Annotated[
    list[str] | None, typer.Option(help="The picture whose style is wanted; repeat for several.")
]
ReferencePrompts = Annotated[
    list[str] | None, typer.Option(help="What the reference shows; one for each, or one for all.")
]
Contents = Annotated[
    list[str] | None, typer.Option(help="The picture to restyle (style_id and others); repeat.")
]
ContentPrompts = Annotated[
    list[str] | None, typer.Option(help="What the content shows; one for each, or one for all.")
]
Weights = Annotated[list[float] | None, typer.Option(help="Of the reference; one for each.")]
Adapter = Annotated[str | None, typer.Option(help="Of the method: a file or folder.")]
ImageEncoder = Annotated[str | None, typer.Option(help="Its folder; the model's own if not given.")]
ControlNet = Annotated[
    str | None, typer.Option(help="Its folder: csgo and instant_style_plus, tile.")
]
Words = Annotated[list[str] | None, typer.Option(help="FILE:word, a word for prompts; repeat.")]
TrueGuidance = Annotated[float | None, typer.Option(help="FLUX: by a second call, above 1.")]
Inverting = Annotated[
    str | None,
    typer.Option(help="ddim, renoise, belm (exact); FLUX: rf_solver, euler, rf_inversion; noise."),
]
Offset = Annotated[int | None, typer.Option(help="Steps the reference is ahead at first.")]
Backend = Annotated[str | None, typer.Option(help="Of the attention; best if not given.")]
Mask = Annotated[
    str | None, typer.Option(help="fill_diptych: white is painted, of the content's size.")
]
Strength = Annotated[
    float | None, typer.Option(help="fill_diptych: 0 to 1; 1 with a mask, else 0.6.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Size = Annotated[int | None, typer.Option(help="Pixels; the model's own size if not given.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 refused, 130 interrupted."""
    try:
        result = app(
            args=None if argv is None else list(argv), prog_name="styleattn", standalone_mode=False
        )
    except KeyboardInterrupt:
        result = _INTERRUPTED
    except Exception as error:
        message = _message(error)
        if type(error).__name__ == "Abort":  # what older parsers make of an interrupt
            result = _INTERRUPTED
        elif message is None:
            raise
        else:
            return _complain(message, 2)
    if result == _INTERRUPTED:
        return _complain("interrupted; the same command goes on where it stopped", result)
    return result if isinstance(result, int) else 0


def _complain(message: str, code: int) -> int:
    print(f"styleattn: {' '.join(message.split())}", file=sys.stderr)
    return code


def _message(error: Exception) -> str | None:
    """The line for an error that is the user's to solve; None for one that is ours."""
    import torch

    from styleattn.inversion import HostUnsupported

    if hasattr(error, "format_message"):  # the command line parser's
        return str(error.format_message()) or "missing command; see styleattn --help"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory; try a smaller --batch-size or --offload ({error})"
    if isinstance(error, ModuleNotFoundError) and error.name in _HOSTS:
        return f"{error.name} is not installed: pip install 'styleattn[diffusers]'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'cannot write'}: {error.strerror}"
    if isinstance(error, (HostUnsupported, OSError, ValueError)):
        return str(error)
    return None


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr: a function of (stage, done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


@app.command()
def stylize(
    model: Annotated[
        str | None, typer.Option(help="tiny-sdxl (default), tiny-flux, or a directory.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `styleattn methods`.")] = None,
    reference: References = None,
    reference_prompt: ReferencePrompts = None,
    reference_weight: Weights = None,
    content: Contents = None,
    content_prompt: ContentPrompts = None,
    prompts: Annotated[str | None, typer.Option(help="A text file, one prompt a line.")] = None,
    out: Annotated[str | None, typer.Option(help="The folder that is written.")] = None,
    bank: Annotated[str | None, typer.Option(help="A bank, in place of --reference.")] = None,
    adapter: Adapter = None,
    image_encoder: ImageEncoder = None,
    controlnet: ControlNet = None,
    control_scale: Annotated[float | None, typer.Option(help="Of the ControlNet.")] = None,
    features: Annotated[
        str | None, typer.Option(help="style_id: a folder that keeps them for further runs.")
    ] = None,
    mask: Mask = None,
    strength: Strength = None,
    canvas: Annotated[bool | None, typer.Option(help="fill_diptych: write it whole too.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="FILE or FILE:weight; repeat.")] = None,
    textual_inversion: Words = None,
    seed: Annotated[int | None, typer.Option(help="Picture i is drawn from seed + i.")] = None,
    steps: Steps = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    true_guidance: TrueGuidance = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures at a time.")] = None,
    score_shift: Annotated[float | None, typer.Option(help="More style above 0; log 2.")] = None,
    score_scale: Annotated[float | None, typer.Option(help="0.5 for famous references.")] = None,
    set_: Knobs = None,
    config: Annotated[Path | None, typer.Option(help="YAML with any of these options.")] = None,
    height: Size = None,
    width: Size = None,
    inversion_guidance: Annotated[float | None, typer.Option(help="Of the inversion.")] = None,
    inversion: Inverting = None,
    labels: Annotated[str | None, typer.Option(help="Of ddim: paper or consistent.")] = None,
    offset: Offset = None,
    backend: Backend = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16, bfloat16.")] = None,
    variant: Variant = None,
    scheduler: Scheduler = None,
    offload: Annotated[bool | None, typer.Option(help="Keep only what computes there.")] = None,
) -> None:
    """Make a picture per prompt, or of every content picture, in the style of a reference."""
    given = {name: value for name, value in locals().items() if name not in ("config", "set_")}
    from styleattn.pipelines import run_stylize
    from styleattn.pipelines.settings import Refused, merged

    started = time.perf_counter()
    options = merged(given, config)
    if options["out"] is None:
        raise Refused("--out is missing")
    with _progress() as report:
        made = run_stylize(options, set_ or [], progress=report, started=started)
    print(made)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder that is written.")] = Path("out"),
    model: Annotated[str, typer.Option(help="tiny-sdxl or tiny-flux.")] = "tiny-sdxl",
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    steps: Steps = None,
    device: Device = "auto",
) -> None:
    """Show what it does, with a model in the package: prompts with and without style."""
    from styleattn.pipelines import run_demo

    started = time.perf_counter()
    with _progress() as report:
        path = run_demo(out, model=model, seed=seed, steps=steps, device=device, progress=report)
    print(f"{path} in {time.perf_counter() - started:.1f} s")


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the methods: what each is, what it needs, and its knobs."""
    from styleattn.methods import METHODS
    from styleattn.pipelines.recipes import FLUX_RECIPES, RECIPES

    drawn = {*RECIPES, *FLUX_RECIPES}
    knobs = {name: cls().to_dict() for name, cls in METHODS.items()}
    facts = {name: cls.facts.to_dict() for name, cls in METHODS.items()}
    if as_json:
        both = {n: {**knobs[n], "facts": {**facts[n], "stylize": n in drawn}} for n in METHODS}
        print(json.dumps(both, indent=2))
        return
    for name, cls in METHODS.items():
        print(f"{name}: {(cls.__doc__ or '').strip().splitlines()[0]}")
        for fact, text in facts[name].items():
            print(f"    {fact}: {text}")
        print(f"    command line: {'stylize' if name in drawn else 'explain'}")
        for knob, value in knobs[name].items():
            if knob != "method":
                print(f"    --set {knob}={json.dumps(value)}")


@app.command()
def explain(
    model: Model = "tiny-sdxl",
    method: Method = "style_aligned",
    set_: Knobs = None,
    reference: References = None,
    adapter: Adapter = None,
    image_encoder: ImageEncoder = None,
    backend: Annotated[str | None, typer.Option(help="Of the attention.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    variant: Variant = None,
) -> None:
    """Show, layer by layer, what a method does to a model, on which backend, and why."""
    from styleattn.inversion import read_picture
    from styleattn.pipelines import hushed, load_model
    from styleattn.pipelines.settings import make_method
    from styleattn.processors import apply
    from styleattn.references import Reference

    given: dict[str, Any] = {"adapter": adapter, "image_encoder": image_encoder}
    if reference:
        given["references"] = tuple(Reference(image=read_picture(r)) for r in reference)
    chosen = make_method(method, set_ or [], {k: v for k, v in given.items() if v is not None})
    with hushed():
        pipe = load_model(model, device=device, dtype=dtype, variant=variant)
    with apply(pipe, chosen, backend=backend) as handle:
        print(handle.explain())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    model: Annotated[str | None, typer.Option(help="Also load this directory.")] = None,
) -> int:
    """Say what can run here and what keeps the rest from it; exit code 1 if something is broken."""
    from styleattn.pipelines.doctor import examine

    checks = examine(model)
    if as_json:
        print(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        for check in checks:
            print(f"{check.state:<7} {check.name}: {check.text}")
    return int(any(check.state == "broken" for check in checks))


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> int:
    """Run the benchmarks of the repository; every argument is theirs."""
    import styleattn
    from styleattn.pipelines.settings import Refused

    script = Path(styleattn.__file__).resolve().parents[1] / "benchmarks" / "run.py"
    if not script.is_file():
        raise Refused("the benchmarks are in the repository, not in the installed package")
    return subprocess.run([sys.executable, str(script), *context.args], check=False).returncode


@bank_app.command("build")
def bank_build(
    reference: Annotated[str, typer.Option(help="The picture.")],
    out: Annotated[Path, typer.Option(help="The bank that is written (.safetensors).")],
    reference_prompt: Annotated[str, typer.Option(help="What it shows.")] = "",
    model: Model = "tiny-sdxl",
    steps: Steps = None,
    inversion_guidance: Annotated[float | None, typer.Option(help="Of the inversion.")] = None,
    labels: Annotated[str, typer.Option(help="paper or consistent.")] = "paper",
    offset: Annotated[int | None, typer.Option(help="Steps it is ahead at first.")] = None,
    check: Annotated[bool, typer.Option(help="Also sample back and report the error.")] = False,
    height: Size = None,
    width: Size = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    variant: Variant = None,
    scheduler: Scheduler = None,
) -> None:
    """Invert a picture once, for `stylize --bank`; an interrupted build goes on where it
    stopped."""
    from styleattn.inversion import read_picture
    from styleattn.pipelines import Inversion, Sampling, build_bank_file, hushed, load_model
    from styleattn.pipelines.settings import merged

    picture = read_picture(reference)
    options = merged(
        {"model": model, "steps": steps, "inversion_guidance": inversion_guidance}, None
    )
    sampling = Sampling(options["steps"], height=height, width=width)
    guidance = float(options["inversion_guidance"])
    inversion = Inversion(guidance, labels, offset, options["inversion"])
    with hushed():
        pipe = load_model(model, device=device, dtype=dtype, variant=variant, scheduler=scheduler)
    with _progress() as report:
        facts = build_bank_file(
            pipe, picture, reference_prompt, out, sampling, inversion, check=check, progress=report
        )
    print(json.dumps(facts, indent=2, ensure_ascii=False, default=str))


@bank_app.command("inspect")
def bank_inspect(file: Annotated[Path, typer.Argument(help="A bank.")]) -> None:
    """Say what is in a bank."""
    from styleattn.pipelines import bank_facts
    from styleattn.references import StyleBank

    facts = bank_facts(StyleBank.load(file))
    print(json.dumps(facts, indent=2, ensure_ascii=False, default=str))


if __name__ == "__main__":
    sys.exit(main())
