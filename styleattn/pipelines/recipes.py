"""Recipes by method: what `styleattn stylize --method` asks for, and who draws the pictures.

A method needs one line here; a file of its own only where drawing takes more than a bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import log
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from .drawing import Drawing


@dataclass(frozen=True)
class Recipe:
    """How pictures are made with a method.

    Args:
        home: what makes a batch of pictures: a module of `styleattn.pipelines` and its function.
        checked: what refuses a job before anything is computed or written, as `home`; "" for
            nothing of its own.
        roles: the rows of the bank, in the method's order, of "content" and "style"; () for methods
            that need no bank.
        content: every picture is made from a content picture (`--content`), its noise included.
        prompts: a file of prompts is needed; else there may be none.
        single: one picture per pipeline call.
        shown: the reference pictures are shown to the method's image encoder.
        most: how many references there may be; 0 for any number.
        beside: references that are prompts are made next to the pictures, as a batch's first rows.
        inverted: content pictures are inverted; else they are used as they are.
        own_adapter: `--adapter` and `--image-encoder` are knobs of the method.
        pipeline: the class that draws on FLUX.
        defaults: options that suit the method, below those of the embedded model.
        tiny: options that suit it on the embedded model.
        knobs: of the method, on full-sized models.
    """

    home: str = "drawing:draw"
    checked: str = ""
    roles: tuple[str, ...] = ("style",)
    content: bool = False
    prompts: bool = True
    single: bool = False
    shown: bool = False
    most: int = 0
    beside: bool = False
    inverted: bool = True
    own_adapter: bool = True
    pipeline: str = "FluxPipeline"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def draw(self) -> Callable[[Drawing], list[Image.Image]]:
        """What makes a batch of pictures."""
        function: Callable[[Drawing], list[Image.Image]] = _at(self.home)
        return function

    def check(self, job: Any) -> None:
        """Refuse a job that its method cannot do.

        Raises:
            ValueError, OSError: what is wrong.
        """
        if self.checked:
            _at(self.checked)(job)


def _at(home: str) -> Any:
    module, name = home.split(":")
    return getattr(import_module(f"styleattn.pipelines.{module}"), name)


# Each latent of a reference row has the noise level that the UNet is told; no guidance.
_ROWS = {"labels": "consistent", "offset": 0, "inversion_guidance": 1.0}
_UNGUIDED = {**_ROWS, "guidance": 1.0}

RECIPES: dict[str, Recipe] = {
    # The paper's setting for transfer from one's own picture.
    "style_aligned": Recipe(knobs={"shared_score_shift": log(2)}),
    "style_id": Recipe(
        home="style_injection:draw",
        roles=("content", "style"),
        content=True,
        prompts=False,
        defaults=_UNGUIDED,
        tiny=_UNGUIDED,
    ),
    "visual_style_prompting": Recipe(defaults={**_ROWS, "guidance": 7.0}),
    "z_star": Recipe(
        home="restyling:towards_content",
        content=True,
        prompts=False,
        single=True,
        defaults=_UNGUIDED,
        tiny=_UNGUIDED,
    ),
    "cross_image_attention": Recipe(
        home="restyling:appearance",
        checked="restyling:check",
        roles=("content", "style"),
        content=True,
        prompts=False,
        defaults=_UNGUIDED,
        tiny=_UNGUIDED,
    ),
    "mutual_attention": Recipe(
        roles=("content",), content=True, defaults={**_ROWS, "guidance": 7.5}
    ),
    "reference_only": Recipe(
        defaults={**_ROWS, "guidance": 7.5, "inversion": "noise"},
    ),
    "ip_adapter": Recipe(roles=(), shown=True, defaults={"guidance": 7.5, "steps": 30}),
    "instant_style": Recipe(roles=(), shown=True, defaults={"guidance": 5.0, "steps": 30}),
    "instant_style_plus": Recipe(
        home="instant_style_plus:draw",
        checked="instant_style_plus:check",
        roles=(),
        content=True,
        prompts=False,
        shown=True,
        most=1,
        defaults={"guidance": 5.0, "inversion": "renoise", "inversion_guidance": 1.0},
    ),
    # Two pictures are content and style, one is the style.
    "csgo": Recipe(home="csgo:draw", roles=(), shown=True, most=2, defaults={"guidance": 10.0}),
    "rb_modulation": Recipe(roles=(), shown=True, defaults={"guidance": 7.5}),
    "style_studio": Recipe(
        home="style_studio:draw", roles=(), shown=True, single=True, defaults={"guidance": 7.0}
    ),
    "deadiff": Recipe(roles=(), shown=True, defaults={"guidance": 8.0}),
    "style_shot": Recipe(roles=(), shown=True, defaults={"guidance": 7.5}),
    # Its faces come in files of identities: --set identity=FILE.
    "pulid_sdxl": Recipe(roles=(), defaults={"guidance": 7.0}),
}

PARTS = {"style_studio_teacher": "style_studio"}
"""Methods that the recipe of another one puts next to it."""

FLUX_RECIPES: dict[str, Recipe] = {
    "style_aligned": Recipe(home="drawing:beside", beside=True),
    "aligned_gen": Recipe(home="drawing:beside", beside=True),
    "style_id": Recipe(
        home="style_injection:draw",
        roles=("content", "style"),
        content=True,
        prompts=False,
        defaults={"guidance": 1.0},
    ),
    "visual_style_prompting": Recipe(),
    "reference_only": Recipe(defaults={"inversion": "noise"}),
    "redux": Recipe(roles=(), shown=True),
    # Its LoRA comes with --lora.
    "uso": Recipe(roles=(), shown=True, defaults={"steps": 25, "guidance": 4.0}),
    "ip_adapter": Recipe(roles=(), shown=True),
    "instant_style": Recipe(roles=(), shown=True),
    # Its faces come in files of identities: --set identity=FILE.
    "pulid_flux": Recipe(roles=(), defaults={"guidance": 4.0}),
    "in_context": Recipe(roles=(), shown=True),
    "easy_control": Recipe(roles=(), shown=True),
    "omini_control": Recipe(roles=(), shown=True),
    "fill_diptych": Recipe(
        home="filling:draw",
        checked="filling:check",
        roles=(),
        content=True,
        prompts=False,
        most=1,
        inverted=False,
        own_adapter=False,
        pipeline="FluxFillPipeline",
        defaults={"steps": 50, "guidance": 30.0},
    ),
}
"""Recipes on FLUX.1."""


def recipes_on(host: str) -> dict[str, Recipe]:
    """The recipes on "unet" or "flux"."""
    return FLUX_RECIPES if host == "flux" else RECIPES


def recipe_of(method: str, host: str = "unet") -> Recipe:
    """The recipe of a method on a host, "unet" or "flux".

    Raises:
        ValueError: there is none.
    """
    recipes = recipes_on(host)
    if method in PARTS and PARTS[method] in recipes:
        raise ValueError(f"{method} is a part of {PARTS[method]}: --method {PARTS[method]}")
    if method not in recipes:
        where, there = ("FLUX", "UNets") if host == "flux" else ("UNets", "FLUX")
        other = method in recipes_on("unet" if host == "flux" else "flux")
        why = f": it runs on {there}" if other else ""
        raise ValueError(
            f"stylize has no recipe for {method!r} on {where}{why}; there it has"
            f" {', '.join(recipes)}"
        )
    return recipes[method]
