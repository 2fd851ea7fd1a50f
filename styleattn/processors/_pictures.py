"""Pictures to encoder outputs: with the pipeline's image encoder, or one that a method names; and
the files of adapters."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from styleattn.adapters import (
    Encoder,
    StyleAwareEncoder,
    load_csgo,
    load_deadiff,
    load_ip_adapter,
    load_pulid_sdxl,
    load_style_aware_encoder,
    load_styleshot,
    read_identity,
    style_patches,
    subtract_content,
)
from styleattn.inversion import read_picture
from styleattn.references import Reference

from ._texts import text_embedding

LOADERS: dict[str, Callable[..., Any]] = {
    "ip_adapter": load_ip_adapter,
    "instant_style": load_ip_adapter,
    "instant_style_plus": load_ip_adapter,
    "rb_modulation": load_ip_adapter,
    "csgo": load_csgo,
    "style_studio": lambda path, layers, dtype: load_csgo(path, layers, dtype=dtype).style,
    "deadiff": load_deadiff,
    "style_shot": load_styleshot,
    "pulid_sdxl": load_pulid_sdxl,
}
"""What reads the adapter file of a method, by the method's name: (path, layers, dtype=), and
control_layers= where the method acts in a ControlNet too."""

_FILES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_KEPT = 32  # encoder outputs per encoder
Shelf = OrderedDict[Any, Tensor]
_by_tower: weakref.WeakKeyDictionary[Any, Shelf] = weakref.WeakKeyDictionary()
_by_folder: dict[str, Shelf] = {}
_adapters: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


def adapter_of(
    method: Any,
    sizes: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
    control: Mapping[str, tuple[int, int]] | None = None,
) -> Any:
    """The adapter of a method, read from its file where it names one.

    A file is read once for a model of the same layers, as long as the method is there.

    Args:
        sizes: the layers of the model: (width of the keys, width of the text).
        dtype: of the weights that are read.
        control: the layers of a ControlNet in which the method acts too.

    Raises:
        FileNotFoundError: no such file, or a folder without an adapter.
        ValueError: a folder with several, a file that is no adapter for this model, or a method
            whose adapters have no files.
    """
    adapter = method.adapter
    if not isinstance(adapter, (str, os.PathLike)):
        return adapter
    if method.name not in LOADERS:
        raise ValueError(f"{method.name}: adapter must be an adapter, got the path {adapter!r}")
    layers, further = (
        tuple((name, *widths) for name, widths in (part or {}).items()) for part in (sizes, control)
    )
    more = {"control_layers": further} if further else {}
    return kept_adapter(
        method,
        (layers, further, dtype),
        lambda path: LOADERS[method.name](path, layers, dtype=dtype, **more),
    )


def kept_adapter(method: Any, like: tuple[Any, ...], read: Callable[[Path], Any]) -> Any:
    """What the adapter file of a method holds, read once as long as the method is there.

    Args:
        like: what else the result depends on.
        read: what reads the file.

    Raises:
        FileNotFoundError, ValueError: as `adapter_of`.
    """
    path = _file_in(Path(method.adapter), method.name)
    facts = path.stat()
    key = (method.name, path, facts.st_mtime_ns, facts.st_size, *like)
    found = _adapters.get(key)
    if found is None:
        found = _adapters[key] = read(path)
    object.__setattr__(method, "_read", found)
    return found


def _file_in(path: Path, name: str) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such adapter file: {path}")
        return path.resolve()
    files = sorted(p for p in path.iterdir() if p.suffix in _FILES)
    if not files:
        raise FileNotFoundError(f"{name}: the folder {path} has no adapter file")
    if len(files) > 1:
        names = ", ".join(p.name for p in files)
        raise ValueError(f"{name}: the folder {path} has several adapter files; name one: {names}")
    return files[0].resolve()


def check_adapter(name: str, adapter: Any, asked: Sequence[str] = ("tokens",)) -> None:
    """Refuse what is no adapter, such as a state dict.

    Args:
        name: the method's.
        asked: what the host asks of the adapter.

    Raises:
        ValueError: an adapter without one of them.
    """
    if any(not callable(getattr(adapter, part, None)) for part in asked):
        raise ValueError(
            f"{name}: adapter must be a file of weights or what a loader of styleattn.adapters"
            f" makes of one, got a {type(adapter).__name__}"
        )


class Eye:
    """Encodes pictures for a method: its adapter says what of the encoder's output it takes.

    Args:
        method: for its `image_encoder`, and for messages.
        adapter: what its references' pictures are encoded for.
        pipe: the pipeline that is styled; None for a bare model.
    """

    def __init__(self, method: Any, adapter: Any, pipe: Any):
        self.method, self.adapter, self.pipe = method, adapter, pipe

    def embeds(self, reference: Reference) -> Tensor:
        """The encoder's output for a reference: given, or made of its picture.

        Raises:
            ValueError: neither, or no encoder; says what is missing.
            FileNotFoundError: there is no such picture.
        """
        if reference.embeds is None and hasattr(self.method, "faces"):
            return self._identity(reference)
        if reference.embeds is None and reference.image is None:
            raise ValueError(
                f"{self.method.name}: a reference of an encoder method needs a picture (`image`) or"
                " the image encoder's output for one (`embeds`)"
            )
        seen = reference.embeds
        seen = self.look(reference.image) if seen is None else seen
        if getattr(self.method, "negative_content", None) is None:
            return seen
        content, scale = self._content(), self.method.negative_content_scale
        return subtract_content(seen[None], content, scale=scale, encoder=self._spec())[0]

    def _identity(self, reference: Reference) -> Tensor:
        """The tokens of the face in a reference's picture, or of the method's identity file.

        Raises:
            ValueError: neither, a picture without an analyser, or tokens of another adapter.
        """
        method = self.method
        if reference.image is not None and method.faces is None:
            raise ValueError(
                f"{method.name}: a picture needs `faces`, which finds its face (FaceAnalyser); or"
                " give the file of an identity, or the reference `embeds`"
            )
        if reference.image is None and method.identity is None:
            raise ValueError(
                f"{method.name}: a reference needs a picture, an identity file, or `embeds`"
            )
        if reference.image is not None:
            found = method.faces(np.asarray(read_picture(reference.image)))
        else:
            found = read_identity(method.identity)
        if isinstance(found, Tensor):
            return found
        face, vision = found
        device = next(self.adapter.parameters()).device
        with torch.no_grad():
            made = self.adapter.identity(face.to(device), [v.to(device) for v in vision])
        tokens: Tensor = made[0]
        return tokens

    def _content(self) -> Tensor:
        """The embedding of what a method subtracts from its images."""
        content, spec = self.method.negative_content, self._spec()
        if isinstance(content, Tensor):
            return content
        if isinstance(content, str):
            width = None if spec is None else spec.width
            return text_embedding(self.method, content, self.pipe, width)
        return self.look(content)

    def negative(self, reference: Reference, embeds: Tensor) -> Tensor:
        """What unconditional rows see: the reference's `negative`, or what the adapter takes for no
        image."""
        if isinstance(reference.negative, Tensor):
            return reference.negative.to(embeds)
        if reference.negative is not None:
            return self.look(reference.negative).to(embeds)
        spec = self._spec()
        unseen = getattr(self.adapter, "blank", None) is None
        if spec is not None and spec.blank in ("grey", "black") and unseen:
            return self._blank(spec).to(embeds)
        negative: Tensor = self.adapter.negative(embeds[None])[0]
        return negative

    def look(self, picture: Any) -> Tensor:
        """The encoder's output for a picture or a path: [width] or [S, width]."""
        spec = self._spec()
        if spec is None:
            raise ValueError(
                f"{self.method.name}: the adapter, a {type(self.adapter).__name__}, does not say"
                " what encodes its pictures; give the reference `embeds`"
            )
        image = read_picture(picture)
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        return self._once(
            spec, (digest, image.size), lambda tower: self._pixels(image, spec, tower)
        )

    def _blank(self, spec: Encoder) -> Tensor:
        def pixels(tower: Any) -> Tensor:
            side = _side(tower, spec)
            shape = (1, 3, side, side)
            if spec.blank == "grey":
                return torch.zeros(shape)
            mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (spec.mean, spec.std))
            return (torch.zeros(shape) - mean) / std

        return self._once(spec, spec.blank, pixels)

    def _spec(self) -> Encoder | None:
        found = getattr(self.adapter, "encoder", None)
        return found if isinstance(found, Encoder) else None

    def _once(self, spec: Encoder, what: Any, pixels: Callable[[Any], Tensor]) -> Tensor:
        """An output of the encoder, made once per picture and encoder."""
        tower = self._tower(spec)
        if isinstance(tower, str):
            kept, dtype = _by_folder.setdefault(tower, OrderedDict()), None
        else:
            kept = _by_tower.setdefault(tower, OrderedDict())
            dtype = next(tower.parameters()).dtype
        extractor = self._extractor(tower)
        how = None if extractor is None else repr(extractor)
        key = (what, spec, how, dtype)
        if key not in kept:
            loaded = _tower_in(tower, self.method.name) if isinstance(tower, str) else tower
            kept[key] = self._run(loaded, spec, pixels(loaded))
            while len(kept) > _KEPT:
                kept.popitem(last=False)
        return kept[key]

    def _tower(self, spec: Encoder) -> Any:
        """The encoder, or its folder."""
        given = getattr(self.method, "image_encoder", None)
        if isinstance(given, (str, os.PathLike)):
            return os.path.realpath(given)
        tower = given if given is not None else getattr(self.pipe, "image_encoder", None)
        if tower is None:
            where = "there is no pipeline" if self.pipe is None else "the pipeline has none"
            raise ValueError(
                f"{self.method.name}: a picture needs an image encoder, and {where}: give the"
                f" method `image_encoder` ({spec.tower}: a model or its folder), load the pipeline"
                " with `image_encoder=`, or give the reference `embeds`"
            )
        return tower

    def _extractor(self, tower: Any) -> Any:
        """The pipeline's feature extractor, which belongs to the pipeline's encoder."""
        same = tower is getattr(self.pipe, "image_encoder", None)
        return getattr(self.pipe, "feature_extractor", None) if same else None

    def _pixels(self, image: Any, spec: Encoder, tower: Any) -> Tensor:
        """[1, 3, h, w]: by the pipeline's feature extractor, or as the adapter's encoder was
        trained."""
        if isinstance(tower, StyleAwareEncoder):
            shown = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
            return shown.permute(2, 0, 1)[None]
        extractor = self._extractor(tower)
        if extractor is not None:
            pixels: Tensor = extractor(images=image, return_tensors="pt").pixel_values
            return pixels
        from transformers import CLIPImageProcessor

        side = _side(tower, spec)
        size = {"shortest_edge": side} if spec.crop else {"height": side, "width": side}
        made = CLIPImageProcessor(
            size=size,
            crop_size={"height": side, "width": side},
            do_center_crop=spec.crop,
            image_mean=list(spec.mean),
            image_std=list(spec.std),
        )
        pixels = made(images=image, return_tensors="pt").pixel_values
        return pixels

    def _run(self, tower: Any, spec: Encoder, pixels: Tensor) -> Tensor:
        weight = next(tower.parameters())
        pipe_device = getattr(self.pipe, "_execution_device", None)
        device = pipe_device if weight.is_meta and pipe_device is not None else weight.device
        if isinstance(tower, StyleAwareEncoder):
            with torch.no_grad():
                seen = tower([p.to(device) for p in style_patches(pixels)])
            return seen[0].float().cpu()
        with torch.no_grad():
            out = tower(pixels.to(device, weight.dtype), output_hidden_states=True)
        if spec.output in ("hidden", "levels"):
            found = _states(out.hidden_states, -2 if spec.layer is None else spec.layer)
        else:
            names = {
                "embeds": "image_embeds",
                "pooled": "pooler_output",
                "last": "last_hidden_state",
            }
            found = getattr(out, names[spec.output], None)
        if found is None or found.shape[-1] != spec.width:
            got = "none" if found is None else f"one of width {found.shape[-1]}"
            raise ValueError(
                f"{self.method.name}: the adapter takes the {spec.output} output of {spec.tower},"
                f" of width {spec.width}; the image encoder, a {type(tower).__name__}, has {got}"
            )
        result: Tensor = found[0].float().cpu()
        return result


def _states(states: Any, layer: int | tuple[int, ...]) -> Tensor | None:
    """Hidden states [1, S, width], several [1, L, S, width]; None from a tower of fewer layers."""
    wanted = layer if isinstance(layer, tuple) else (layer,)
    if not all(-len(states) <= i < len(states) for i in wanted):
        return None
    if isinstance(layer, int):
        one: Tensor = states[layer]
        return one
    return torch.stack([states[i] for i in layer], 1)


def _side(tower: Any, spec: Encoder) -> int:
    config = getattr(tower, "config", None)
    return int(getattr(config, "image_size", spec.image_size))


def _tower_in(folder: str, name: str) -> Any:
    """The vision tower that `save_pretrained` wrote to a folder, or StyleShot's in its file;
    nothing is downloaded."""
    if name == "style_shot":
        return load_style_aware_encoder(_file_in(Path(folder), name), dtype=torch.float32)
    from transformers import AutoConfig, CLIPVisionModelWithProjection, SiglipVisionModel

    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise FileNotFoundError(f"{name}: image_encoder: {folder} has no config.json")
    try:
        known = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        made = SiglipVisionModel if known.startswith("siglip") else CLIPVisionModelWithProjection
        tower = made.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: image_encoder: {folder}: {error}") from error
    return tower.eval()
