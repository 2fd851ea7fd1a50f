"""What each block of a FLUX model takes from a picture: `python -m
styleattn.pipelines.flux_blocks`.

An IP-Adapter speaks in some of the blocks only, and what comes of it is measured. On `tiny-flux`
the truth is known: drawings have a style and a content. On other models CSD's embeddings of style
and of content are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from styleattn import tiny
from styleattn.adapters import CSD, load_csd
from styleattn.inversion import read_picture
from styleattn.methods import InstantStyle
from styleattn.processors import apply
from styleattn.processors.flux import joint_attention_layers
from styleattn.references import Reference
from styleattn.tiny import measure
from styleattn.tiny.trials import Trial, trials

from .instant_style_plus import look
from .models import hushed, load_model
from .sampling import Sampling, generate
from .settings import FLUX_DEFAULTS, TINY_DEFAULTS, read_prompts

Weights = dict[str, float]
Judge = Callable[["Setup", Weights], dict[str, float]]


@dataclass(frozen=True)
class Row:
    """What came of weights of blocks: numbers by name."""

    name: str
    weights: Weights
    found: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """How pictures are drawn: a FLUX pipeline, an image adapter (or its file) and its encoder (or
    its folder), and what all weights are multiplied by."""

    pipe: Any
    adapter: Any
    image_encoder: Any
    sampling: Sampling
    scale: float = 1.0

    def draw(
        self, picture: Any, prompts: Sequence[str], seeds: Sequence[int], weights: Weights
    ) -> list[Image.Image]:
        """Pictures of the prompts with the adapter in the blocks that have a weight."""
        if not weights:
            return generate(self.pipe, prompts, seeds, self.sampling)
        method = InstantStyle(
            blocks={block: self.scale * weight for block, weight in weights.items()},
            adapter=self.adapter,
            image_encoder=self.image_encoder,
            references=(Reference(image=picture),),
        )
        with apply(self.pipe, method):
            return generate(self.pipe, prompts, seeds, self.sampling)


def block_groups(layers: Sequence[str], parts: int | None = None) -> list[Row]:
    """Which blocks to ask: none, all, the double, the single, runs of either kind alone, and all
    but a run.

    Args:
        layers: the attention layers of the model, in their order.
        parts: how many runs the blocks of a kind are cut into; None for every block alone.
    """
    blocks = [layer.removesuffix(".attn") for layer in layers]
    double = [b for b in blocks if b.startswith("transformer_blocks.")]
    single = [b for b in blocks if not b.startswith("transformer_blocks.")]
    runs = [
        (f"{kind} {_numbered(run)}", run)
        for kind, chosen in (("double", double), ("single", single))
        for run in _cut(chosen, parts)
    ]
    asked = [("none", []), ("all", blocks), ("double", double), ("single", single)]
    asked += runs + [(f"all but {name}", [b for b in blocks if b not in run]) for name, run in runs]
    return [Row(name, dict.fromkeys(chosen, 1.0)) for name, chosen in asked]


def _cut(blocks: list[str], parts: int | None) -> list[list[str]]:
    count = len(blocks) if parts is None else min(parts, len(blocks))
    ends = [round(i * len(blocks) / count) for i in range(count + 1)] if count else [0]
    return [blocks[a:b] for a, b in pairwise(ends)]


def _numbered(run: Sequence[str]) -> str:
    first, last = (block.rpartition(".")[2] for block in (run[0], run[-1]))
    return first if first == last else f"{first}-{last}"


class Truth:
    """Judges drawings of `tiny-flux`, as shares 0..1 of the pictures: style, content and leakage
    with prompts that name another content than the reference's; and the reference's content where
    the prompt is empty (by chance one in eight)."""

    def __init__(self, found: Sequence[Trial]) -> None:
        self.trials = found

    def __call__(self, setup: Setup, weights: Weights) -> dict[str, float]:
        told: list[Image.Image] = []
        untold: list[Image.Image] = []
        for trial in self.trials:
            picture, seeds = trial.reference.image, list(trial.seeds)
            told += setup.draw(picture, trial.prompts, seeds, weights)
            untold += setup.draw(picture, [""] * len(seeds), seeds, weights)
        with_prompt = self._score(told, [c for t in self.trials for c in t.contents])
        without = self._score(untold, [t.reference.content for t in self.trials for _ in t.seeds])
        return {
            "style": with_prompt.style_match,
            "palette": with_prompt.palette_match,
            "texture": with_prompt.texture_match,
            "edge": with_prompt.edge_match,
            "content": with_prompt.content_accuracy,
            "leakage": with_prompt.leakage,
            "reference's content, no prompt": without.content_accuracy,
        }

    def _score(self, pictures: list[Image.Image], contents: list[str]) -> measure.Score:
        shown = [t.reference for t in self.trials for _ in t.seeds]
        return measure.score(
            pictures, contents, [r.style for r in shown], [r.content for r in shown]
        )


class Likeness:
    """Judges pictures of any model by the cosines of CSD's embeddings: of style with the reference,
    of content with the picture drawn without the adapter, and of content with the reference."""

    def __init__(
        self, csd: CSD, references: Sequence[Any], prompts: Sequence[str], seed: int
    ) -> None:
        self.csd, self.references, self.prompts = csd, references, prompts
        self.seeds = range(seed, seed + len(prompts))
        self._plain: torch.Tensor | None = None

    def __call__(self, setup: Setup, weights: Weights) -> dict[str, float]:
        if self._plain is None:
            self._plain = look(self.csd, setup.draw(None, self.prompts, self.seeds, {}))[1]
        found = []
        for reference in self.references:
            drawn = setup.draw(reference, self.prompts, self.seeds, weights)
            _, content, style = look(self.csd, drawn)
            _, wanted_content, wanted_style = look(self.csd, [reference])
            pairs = ((style, wanted_style), (content, self._plain), (content, wanted_content))
            found.append([F.cosine_similarity(a, b).mean().item() for a, b in pairs])
        names = ("style", "content kept", "leakage")
        return dict(zip(names, torch.tensor(found).mean(0).tolist(), strict=True))


def measured(
    setup: Setup, judge: Judge, groups: Sequence[Row], tell: Callable[[Row], object] = print
) -> list[Row]:
    """The groups with what was found, each told as it comes."""
    rows = []
    for group in groups:
        rows.append(replace(group, found=judge(setup, group.weights)))
        tell(rows[-1])
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, in hundredths."""
    names = list(rows[0].found)
    lines = [["blocks", *names], ["---"] * (1 + len(names))]
    lines += [[row.name, *(f"{100 * row.found[name]:.0f}" for name in names)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m styleattn.pipelines.flux_blocks",
        description="Measure what each block of a FLUX model takes from a picture.",
    )
    parser.add_argument("--model", default="tiny-flux", help="or a folder of save_pretrained")
    parser.add_argument("--count", type=int, default=96, help="drawings per group, on tiny-flux")
    parser.add_argument("--parts", type=int, help="runs of blocks per kind; default: every block")
    parser.add_argument("--groups", nargs="*", help="only these; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="of the adapter in its blocks")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float, help="the embedded scale")
    parser.add_argument("--true-guidance", type=float)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    own = parser.add_argument_group("models of your own")
    own.add_argument("--adapter", help="an IP-Adapter's file; on tiny-flux, default: its own")
    own.add_argument("--image-encoder", help="the folder of what the adapter was trained with")
    own.add_argument("--csd", help="CSD's file")
    own.add_argument("--reference", nargs="+", help="pictures")
    own.add_argument("--prompts", type=Path, help="a file, one prompt a line")
    own.add_argument("--height", type=int)
    own.add_argument("--width", type=int)
    own.add_argument("--device", default="auto")
    own.add_argument("--dtype", default="auto")
    own.add_argument("--offload", action="store_true")
    return parser


def _setup(values: argparse.Namespace) -> Setup:
    embedded = values.model in TINY_DEFAULTS
    usual = TINY_DEFAULTS[values.model] if embedded else FLUX_DEFAULTS
    adapter, encoder = values.adapter, values.image_encoder
    if embedded and adapter is None:
        folder = tiny.adapter_path(values.model)
        adapter, encoder = folder, folder / "image_encoder"

    def chosen(given: Any, name: str, otherwise: float) -> Any:
        return usual.get(name, otherwise) if given is None else given

    sampling = Sampling(
        chosen(values.steps, "steps", 28),
        chosen(values.guidance, "guidance", 3.5),
        None,
        values.height,
        values.width,
        chosen(values.true_guidance, "true_guidance", 1.0),
    )
    with hushed():
        pipe = load_model(
            values.model, device=values.device, dtype=values.dtype, offload=values.offload
        )
    return Setup(pipe, adapter, encoder, sampling, values.scale)


def _judge(values: argparse.Namespace, parser: argparse.ArgumentParser) -> Judge:
    if values.model == "tiny-flux":
        return Truth(trials(values.count, values.seed))
    needed = ("adapter", "image_encoder", "csd", "reference", "prompts")
    missing = [f"--{n.replace('_', '-')}" for n in needed if not getattr(values, n)]
    if missing:
        parser.error(f"{values.model} is measured with {', '.join(missing)}")
    pictures = [read_picture(path) for path in values.reference]
    csd = load_csd(values.csd, dtype=torch.float32).eval()
    return Likeness(csd, pictures, read_prompts(values.prompts), values.seed)


def main() -> None:
    parser = _arguments()
    values = parser.parse_args()
    judge = _judge(values, parser)
    setup = _setup(values)
    setup.pipe.set_progress_bar_config(disable=True)
    layers = list(joint_attention_layers(setup.pipe.transformer))
    groups = block_groups(layers, values.parts)
    names = values.groups or [group.name for group in groups]
    unknown = sorted(set(names) - {group.name for group in groups})
    if unknown:
        have = ", ".join(group.name for group in groups)
        parser.error(f"no groups {', '.join(unknown)}; there are {have}")
    chosen = [group for group in groups if group.name in names]
    rows = measured(setup, judge, chosen, lambda row: print(row.name, dict(row.found), flush=True))
    print(table(rows))
    if values.json is not None:
        values.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
