"""What the command line takes: prompts, knobs and settings, each checked, each refusal one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from styleattn import tiny
from styleattn.methods import METHODS

from .models import TINY, family_of
from .recipes import Recipe, recipe_of, recipes_on

if TYPE_CHECKING:
    from .sources import Source


class Refused(ValueError):
    """Something the user asked for that cannot be done; one line says what."""


# What counts is the command line, then --config, then what suits the method on the embedded model,
# then that model, then the method, then FLUX's where it is one, then these: the paper's settings
# for transfer from a picture.
DEFAULTS: dict[str, Any] = {
    "model": TINY,
    "method": "style_aligned",
    "reference": None,
    "reference_prompt": None,
    "reference_weight": None,
    "content": None,
    "content_prompt": None,
    "prompts": None,
    "out": None,
    "bank": None,
    "lora": None,
    "textual_inversion": None,
    "adapter": None,
    "image_encoder": None,
    "controlnet": None,
    "control_scale": None,
    "features": None,
    "mask": None,
    "strength": None,
    "canvas": False,
    "seed": 0,
    "steps": 50,
    "guidance": 10.0,
    "negative_prompt": None,
    "true_guidance": 1.0,
    "batch_size": 4,
    "score_shift": None,
    "score_scale": None,
    "height": None,
    "width": None,
    "inversion_guidance": 2.0,
    "inversion": "ddim",
    "labels": "paper",
    "offset": None,
    "backend": None,
    "device": "auto",
    "dtype": "auto",
    "variant": None,
    "scheduler": None,
    "offload": False,
}
TINY_DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny-sdxl": {"steps": 20, "guidance": 3.0, "inversion_guidance": 1.0, "offset": 0},
    "tiny-flux": {"steps": 16, "guidance": 3.0, "true_guidance": 3.0, "inversion": "noise"},
}
FLUX_DEFAULTS: dict[str, Any] = {
    "steps": 28,
    "guidance": 3.5,
    "inversion": "rf_solver",
    "inversion_guidance": 1.0,
}
_IMAGE_PROMPTS = ("ip_adapter", "instant_style")  # methods of the embedded models' adapters
SCHNELL_DEFAULTS: dict[str, Any] = {"steps": 4, "guidance": 0.0}
_SCALES = (
    "control_scale",
    "strength",
    "guidance",
    "true_guidance",
    "score_shift",
    "score_scale",
    "inversion_guidance",
)
_NUMBERS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("seed", "steps", "batch_size", "height", "width", "offset"), (int,)),
    **dict.fromkeys(_SCALES, (int, float)),
    "reference_weight": (int, float),
    **dict.fromkeys(("offload", "canvas"), (bool,)),
}
_REFERENCES = ("reference", "reference_prompt", "reference_weight")
_LISTS = {*_REFERENCES, "content", "content_prompt", "lora", "textual_inversion"}


def merged(given: Mapping[str, Any], config: Path | None) -> dict[str, Any]:
    """Command line over configuration file over defaults, every value of the right kind; and the
    model's ``host``."""
    chosen = {name: value for name, value in given.items() if value not in (None, [])}
    written = _read_config(config, DEFAULTS)
    knobs = written.pop("set", {})
    if not isinstance(knobs, dict):
        raise Refused(f"{config}: set must be a mapping of knobs")
    for name in _LISTS & set(written):
        if written[name] is not None and not isinstance(written[name], list):
            written[name] = [written[name]]
    for name, value in written.items():
        kinds = _NUMBERS.get(name, (str,))
        values = value if name in _LISTS and isinstance(value, list) else [value]
        right = all(
            isinstance(v, kinds) and (bool in kinds or not isinstance(v, bool)) for v in values
        )
        if value is not None and not right:
            raise Refused(f"{config}: {name} must be of type {kinds[-1].__name__}, got {value!r}")
    model, method = (
        chosen.get(name) or written.get(name) or DEFAULTS[name] for name in ("model", "method")
    )
    family = family_of(str(model))
    host = family["host"]
    recipe = recipes_on(host).get(method, Recipe())
    own = {**TINY_DEFAULTS[model], **recipe.tiny} if model in TINY_DEFAULTS else {}
    own = own if family["guided"] else SCHNELL_DEFAULTS
    usual = {**DEFAULTS, **(FLUX_DEFAULTS if host == "flux" else {})}
    asked = {**written, **chosen}
    if model in tiny.ADAPTERS and method in _IMAGE_PROMPTS and "adapter" not in asked:
        own = {**own, **_tiny_adapter(str(model))}
    found = {**usual, **recipe.defaults, **own, **asked}
    return {**found, "knobs": knobs, "host": host}


def _tiny_adapter(model: str) -> dict[str, str]:
    """The options that name an embedded model's own image adapter."""
    folder = tiny.adapter_path(model)
    return {
        "adapter": str(folder / "adapter.safetensors"),
        "image_encoder": str(folder / "image_encoder"),
    }


def sources_of(options: Mapping[str, Any]) -> list[tuple[str | None, str, float]]:
    """Path (None: made from its prompt), prompt and weight of every reference; none with a bank.

    Raises:
        Refused: no reference, or numbers of pictures, prompts and weights that do not fit.
    """
    paths, prompts, weights = (options[name] or [] for name in _REFERENCES)
    if options["bank"] is not None:
        if _recipe(options).shown:
            raise Refused(f"{options['method']} takes no --bank")
        if paths or prompts or weights:
            raise Refused("--bank excludes --reference, --reference-prompt and --reference-weight")
        return []
    count = len(paths) or len(prompts)
    recipe = _recipe(options)
    if recipe.shown and not paths:
        raise Refused(f"--reference is missing: {options['method']} is shown a picture")
    if not count:
        if "style" not in recipe.roles:
            return []
        raise Refused("no reference: give --reference, --bank or --reference-prompt")
    prompts = _for_each("reference", "--reference-prompt", prompts or [""], count)
    weights = weights or [1.0] * count
    if len(weights) != count:
        raise Refused(f"{count} references need as many --reference-weight, got {len(weights)}")
    if any(not 0 <= w < float("inf") for w in weights):
        raise Refused(f"--reference-weight must be finite and not negative, got {weights}")
    return list(zip(paths or [None] * count, prompts, map(float, weights), strict=True))


def _recipe(options: Mapping[str, Any]) -> Recipe:
    return recipe_of(options["method"], options["host"])


def _for_each(what: str, option: str, given: list[str], count: int) -> list[str]:
    """One for each, or one for all."""
    found = given * count if len(given) == 1 else given
    if len(found) != count:
        raise Refused(f"{count} {what}s need as many {option}, got {len(found)}")
    return found


def contents_of(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Path and prompt of every content picture.

    Raises:
        Refused: the method needs one, or takes none; or the numbers do not fit.
    """
    paths, prompts = options["content"] or [], options["content_prompt"] or []
    method = options["method"]
    wanted = _recipe(options).content
    if wanted and not paths:
        raise Refused(f"--content is missing: {method} restyles a picture")
    if not wanted and (paths or prompts):
        raise Refused(f"{method} takes no --content")
    prompts = _for_each("content picture", "--content-prompt", prompts or [""], len(paths))
    return list(zip(paths, prompts, strict=True))


def pictures_of(options: Mapping[str, Any]) -> tuple[list[Source], list[Source]]:
    """The references and the content pictures, read.

    Raises:
        Refused, ValueError, FileNotFoundError: as `sources_of`, `contents_of`, `read_picture`.
    """
    from styleattn.inversion import read_picture

    from .sources import Source

    references = [
        Source(None if path is None else read_picture(path), prompt, weight, _stem(path))
        for path, prompt, weight in sources_of(options)
    ]
    contents = [
        Source(read_picture(path), prompt, 1.0, _stem(path))
        for path, prompt in contents_of(options)
    ]
    return references, contents


def _stem(path: str | None) -> str:
    return "" if path is None else Path(path).stem


def prompts_of(options: Mapping[str, Any], contents: int) -> tuple[str, ...]:
    """What the pictures show: the file of prompts, or nothing for a method that needs no words.

    Raises:
        Refused: prompts are missing, or do not fit the content pictures in number.
    """
    if options["prompts"] is None:
        if _recipe(options).prompts:
            raise Refused("--prompts is missing")
        return ("",) * contents
    prompts = read_prompts(Path(options["prompts"]))
    if contents > 1 and len(prompts) == 1:
        return prompts * contents
    if contents > 1 and len(prompts) != contents:
        raise Refused(f"{contents} content pictures need as many prompts, got {len(prompts)}")
    return prompts


def styled_method(options: Mapping[str, Any], knobs: Sequence[str]) -> Any:
    """The method of the options; on full-sized models it starts from the recipe's knobs."""
    name = options["method"]
    base: dict[str, Any] = {}
    if name in METHODS and options["model"] not in TINY_DEFAULTS:
        base.update(recipes_on(options["host"]).get(name, Recipe()).knobs)
    base.update(options["knobs"])
    for option, knob in (
        ("score_shift", "shared_score_shift"),
        ("score_scale", "shared_score_scale"),
    ):
        if options[option] is not None:
            base[knob] = float(options[option])
    if recipes_on(options["host"]).get(name, Recipe()).own_adapter:
        base.update({k: options[k] for k in ("adapter", "image_encoder") if options[k] is not None})
    return make_method(name, knobs, base)


def control_scale(options: Mapping[str, Any]) -> float | None:
    """How strongly the ControlNet speaks; None for the recipe's own.

    Raises:
        Refused: a scale without meaning.
    """
    scale = options["control_scale"]
    if scale is not None and not 0 <= scale < float("inf"):
        raise Refused(f"--control-scale must be finite and not negative, got {scale}")
    return None if scale is None else float(scale)


def features_of(options: Mapping[str, Any]) -> str | None:
    """The folder of kept features.

    Raises:
        Refused: the method reads none on this model.
    """
    method, host = options["method"], options["host"]
    if options["features"] is not None and (
        host == "flux" or not hasattr(METHODS[method], "CACHED")
    ):
        raise Refused(f"{method} takes no --features on {'FLUX' if host == 'flux' else 'UNets'}")
    return str(options["features"]) if options["features"] is not None else None


def make_method(name: str, knobs: Sequence[str], base: Mapping[str, Any] | None = None) -> Any:
    """The method of that name with ``knob=value`` settings; values are YAML."""
    if name not in METHODS:
        raise Refused(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    settings = dict(base or {})
    for knob in knobs:
        key, equals, value = knob.partition("=")
        if not equals or not key.strip():
            raise Refused(f"--set takes knob=value, got {knob!r}")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise Refused(f"--set {key}: {value!r} is not a value ({error})") from error
    try:
        return METHODS[name].from_dict(settings)
    except TypeError as error:
        raise Refused(f"method {name}: {error}") from error


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines and lines that start with # do not
    count."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not a UTF-8 text file") from error
    lines = (line.strip() for line in text.splitlines())
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise Refused(f"{path} has no prompts: one a line is expected")
    return prompts


def _read_config(path: Path | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a YAML file; only known names."""
    if path is None:
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"{path} is not YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise Refused(f"{path} must hold a mapping of settings, not a {type(data).__name__}")
    settings = {str(name).replace("-", "_"): value for name, value in data.items()}
    unknown = sorted(set(settings) - set(known) - {"set"})
    if unknown:
        raise Refused(
            f"{path} has unknown settings {', '.join(unknown)}; known are {', '.join(known)}, set"
        )
    return settings
