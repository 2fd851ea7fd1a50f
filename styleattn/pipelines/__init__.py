"""End-to-end recipes: what needs more than switching a method on."""

from importlib import import_module
from typing import Any

_HOMES = {
    "banks": ("bank_facts", "build_bank_file"),
    "csgo": ("csgo_pictures",),
    "demo": ("run_demo",),
    "diptych": ("Canvas", "fill_canvas", "fill_diptych", "grid_of"),
    "folder": ("run_folder",),
    "models": ("ModelRefused", "hushed", "load_model", "use_ddim"),
    "multidiffusion": ("Panorama", "panorama"),
    "pictures": ("styled_pictures",),
    "recipes": ("FLUX_RECIPES", "RECIPES", "Recipe"),
    "sampling": ("Sampling", "generate"),
    "sheet": ("Cell", "contact_sheet"),
    "stylize": ("run_stylize",),
    "sources": ("Job", "Source"),
    "style_guidance": ("Aim", "led"),
    "style_aligned": (
        "TRANSFER",
        "Inversion",
        "controlled",
        "make_bank",
        "make_trajectory",
        "transfer",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

# Imported at first use: diffusers comes with them.
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'styleattn.pipelines' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
