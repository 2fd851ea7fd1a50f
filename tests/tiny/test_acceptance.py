"""StyleAligned, AlignedGen, IP-Adapter and InstantStyle on the embedded models: prompts drawn in
the style of a reference, measured.

As a program it prints the measurements that the model cards state:

    python tests/tiny/test_acceptance.py --count 200 [--setup tiny-flux]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from styleattn import Reference, apply, tiny
from styleattn.methods import AlignedGen, InstantStyle, IPAdapter, StyleAligned
from styleattn.pipelines.sampling import Sampling, generate
from styleattn.pipelines.style_aligned import Inversion, transfer
from styleattn.tiny import measure
from styleattn.tiny.trials import PER_REFERENCE, Trial, trials


@dataclass(frozen=True)
class Setup:
    """How images are made: a model, and the settings that the command line uses for it. Without an
    inversion the reference is shown to the method's image encoder. `style` and `content` are what
    must be reached on 200 images; `few` images are looked at quickly."""

    model: str
    sampling: Sampling
    inversion: Inversion | None
    method: Any
    style: float = 0.8
    content: float = 0.9
    few: int = 8


ADAPTER: dict[str, Any] = {
    "adapter": tiny.adapter_path(),
    "image_encoder": tiny.adapter_path() / "image_encoder",
}
FLOW = Sampling(16, 3.0, true_guidance=3.0), Inversion(1.0, kind="noise")
SETUPS = {
    "tiny-sdxl": Setup(
        "tiny-sdxl",
        Sampling(20, 3.0),
        Inversion(1.0, offset=0),
        StyleAligned(shared_score_shift=log(2)),
    ),
    "tiny-flux": Setup("tiny-flux", *FLOW, StyleAligned()),
    "tiny-flux-aligned-gen": Setup("tiny-flux", *FLOW, AlignedGen()),
    "tiny-flux-ip-adapter": Setup("tiny-flux", FLOW[0], None, IPAdapter(**ADAPTER), 0.7, few=16),
    "tiny-flux-instant-style": Setup(
        "tiny-flux", FLOW[0], None, InstantStyle(**ADAPTER), 0.45, few=16
    ),
}


def without(pipe: Any, job: Trial, setup: Setup) -> tuple[list[Any], Any]:
    return generate(pipe, job.prompts, job.seeds, setup.sampling), job.reference.style


def from_picture(pipe: Any, job: Trial, setup: Setup) -> tuple[list[Any], Any]:
    """The reference is a drawing, inverted or shown; its style is the one it was drawn in."""
    reference = job.reference
    if setup.inversion is None:
        method = replace(setup.method, references=(Reference(image=reference.image),))
        with apply(pipe, method):
            return generate(pipe, job.prompts, job.seeds, setup.sampling), reference.style
    images = transfer(
        pipe,
        reference.image,
        job.prompts,
        reference_prompt=reference.prompt,
        method=setup.method,
        sampling=setup.sampling,
        inversion=setup.inversion,
        seed=job.seed,
        batch_size=PER_REFERENCE,
    )
    return images, reference.style


def from_prompt(pipe: Any, job: Trial, setup: Setup) -> tuple[list[Any], Any]:
    """The reference is made from its prompt; its style is the one that is seen in it."""
    with apply(pipe, setup.method):
        prompts = [job.styled_prompt, *job.prompts]
        first, *images = generate(pipe, prompts, range(job.seed - 1, job.seed + 4), setup.sampling)
    return images, measure.read([first])[0]


WAYS = {"without": without, "from a picture": from_picture, "from a prompt": from_prompt}


def measured(pipe: Any, way: str, found: Sequence[Trial], setup: Setup) -> measure.Score:
    pictures, prompted, styles, contents = [], [], [], []
    for job in found:
        images, style = WAYS[way](pipe, job, setup)
        pictures += images
        prompted += job.contents
        styles += [style] * len(images)
        contents += [job.reference.content] * len(images)
    return measure.score(pictures, prompted, styles, contents)


def quiet_pipe(model: str) -> Any:
    torch.set_num_threads(1)
    pipe = tiny.load(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", SETUPS)
def test_a_few_images_of_the_shipped_weights(name: str) -> None:
    """A few references: a quick look that the weights and the way to them are right."""
    setup = SETUPS[name]
    pipe, found = quiet_pipe(setup.model), trials(setup.few)
    styled = measured(pipe, "from a picture", found, setup)
    assert styled.style_match >= setup.style - 0.05 and styled.content_accuracy >= 0.75, (
        styled.as_dict()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SETUPS)
def test_the_style_comes_from_the_reference_and_the_content_from_the_prompt(name: str) -> None:
    """What the model cards state, on 200 images of held-out seeds."""
    pipe, found, setup = quiet_pipe(SETUPS[name].model), trials(200), SETUPS[name]
    plain = measured(pipe, "without", found, setup)
    styled = measured(pipe, "from a picture", found, setup)
    report = json.dumps({"without": plain.as_dict(), "styled": styled.as_dict()}, indent=1)
    assert plain.style_match <= 0.3, report
    assert styled.style_match >= setup.style, report
    assert styled.content_accuracy >= setup.content, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup", default="tiny-sdxl", choices=list(SETUPS))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--steps", type=int, help="default: the setup's")
    parser.add_argument("--guidance", type=float, help="default: the setup's; on FLUX the true one")
    values = parser.parse_args()
    setup = SETUPS[values.setup]
    guidance = "true_guidance" if setup.model == "tiny-flux" else "guidance_scale"
    changes = {"num_inference_steps": values.steps, guidance: values.guidance}
    changes = {name: value for name, value in changes.items() if value is not None}
    setup = replace(setup, sampling=replace(setup.sampling, **changes))
    pipe, found = quiet_pipe(setup.model), trials(values.count, values.seed)
    print("measure:", json.dumps(measure.validate()), flush=True)
    for way in values.ways:
        if way == "from a prompt" and setup.inversion is None:
            continue  # a picture is all that an encoder sees
        print(f"{way}:", json.dumps(measured(pipe, way, found, setup).as_dict()), flush=True)


if __name__ == "__main__":
    main()
