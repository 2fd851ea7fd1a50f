"""Pictures in context on FLUX: in the sequence of every call, or run on their own and kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from styleattn.inversion import encode_picture, read_picture
from styleattn.inversion.flow_host import image_ids, packed
from styleattn.inversion.host import vae_scale
from styleattn.methods._base import off
from styleattn.methods._joint import JointCall, JointMethod, Tokens
from styleattn.methods._shown import PictureMethod, Shown
from styleattn.references import Reference

from ._flux_apart import Pair, recorded, restore, tuned, without
from ._flux_attention import JointSite
from ._flux_clean import Clean
from ._flux_controller import PARAMETERS, FluxController, FluxNow
from ._flux_rows import RESIDUALS

PICTURES = "pictures"
PIXELS = 2**20
"""Of the largest picture that is taken as it is."""
KEPT = 2
"""Calls of which the keys and values are kept: those of true guidance."""


@dataclass(frozen=True)
class Picture:
    """A picture as the model takes it: tokens [M, C], rows and columns of the first of them."""

    tokens: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Kept:
    """Keys and values of the pictures in every layer, and what they were made with.

    Args:
        told: the tensors that the model is told besides, and their versions.
        level: the noise level of the last step that used them.
        pairs: per reference, by layer.
    """

    told: tuple[tuple[weakref.ref[Tensor], int], ...]
    level: float
    place: tuple[torch.device, torch.dtype]
    pairs: tuple[Mapping[str, Pair] | None, ...]

    def was_told(self, told: Sequence[Tensor]) -> bool:
        """Whether it was made with the very tensors, as they are."""
        return len(self.told) == len(told) and all(
            r() is x and version == x._version
            for (r, version), x in zip(self.told, told, strict=True)
        )


class PictureController(FluxController):
    """Styles one FLUX transformer, with one method that has pictures in context."""

    shown = 0
    pictures: tuple[Picture | None, ...] = ()
    spans: tuple[slice | None, ...] = ()
    pairs: tuple[Mapping[str, Pair] | None, ...] = ()
    kept: tuple[Kept, ...] = ()
    loras: tuple[tuple[Any, Any], ...] = ()
    clean: Clean | None = None

    def begin(
        self, index: int, pictures: Sequence[Picture | None], layers: Mapping[str, Any]
    ) -> None:
        """Which method it is, its pictures, and every layer of the model."""
        self.shown, self.pictures, self.layers = index, tuple(pictures), dict(layers)
        method = self.methods[index]
        self.clean = Clean(method.guidance, method.lora) if method.clean else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kept": (), "pairs": ()}

    def install(self, model: torch.nn.Module) -> None:
        """Processors and hooks; the pictures' LoRA leaves the image alone."""
        super().install(model)
        if self.clean is not None:
            self._hooks += self.clean.install(model)
        lora = self.methods[self.shown].lora
        self.loras = () if lora is None else without(tuned(model, lora), lora)

    def uninstall(self, model: torch.nn.Module) -> None:
        """Nothing of it is left."""
        super().uninstall(model)
        restore(self.loras)
        self.loras = self.kept = ()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The model as it was, for a while; the LoRA too."""
        loras, self.loras = self.loras, ()
        restore(loras)
        try:
            with super().paused():
                yield
        finally:
            if loras:
                without([module for module, _ in loras], self.methods[self.shown].lora)
            self.loras = loras

    # What the processors ask

    def _active(self, site: JointSite, entry: Any, now: FluxNow) -> bool:
        if entry.method != self.shown:
            return super()._active(site, entry, now)
        method = self.methods[self.shown]
        if method.apart:
            gate, strengths = self.strengths(entry, now)
            there = zip(self.pairs, strengths, strict=True)
            return not off(gate) and any(p is not None and not off(s) for p, s in there)
        if not any(self.spans):
            return False
        _, strengths = self.strengths(entry, now)
        plain = all(not isinstance(s, Tensor) and s == 1.0 for s in strengths)
        masked = any(r.mask is not None for r in self.references[self.shown])
        return not (plain and method.idle) or masked

    def joint_calls(
        self, site: JointSite, tokens: Mapping[str, Tokens]
    ) -> Iterator[tuple[JointMethod, JointCall]]:
        """What every method of a layer is asked now."""
        for method, call in super().joint_calls(site, tokens):
            if method is self.methods[self.shown]:
                call = replace(call, pictures=site.kept[PICTURES])
            yield method, call

    def _at(self, layer: str) -> Iterator[Shown | None]:
        """The pictures at a layer."""
        if self.methods[self.shown].apart:
            for pairs in self.pairs:
                yield None if pairs is None else Shown(None, *pairs[layer])
        else:
            for span in self.spans:
                yield None if span is None else Shown(span)

    # The hooks around the transformer

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: the pictures in the sequence, or what they are to every layer."""
        self.spans = self.pairs = ()
        given = super().before(module, args, kwargs)
        now = self.now
        if given is None or not isinstance(now, FluxNow):
            return given
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "styleattn: pictures in context need the whole transformer outside the compiler;"
                " compile its blocks (compile_repeated_blocks)"
            )
        inputs, there = given[1], self._there(now)
        if not self.methods[self.shown].apart:
            inputs = self._joined(inputs, now, there)
            if self.clean is not None:
                self.clean.begin(module, inputs, self._present())
            self._tell_layers()
            return (), inputs
        asked = {**dict(zip(PARAMETERS, args, strict=False)), **kwargs}
        told = [asked[n] for n in ("pooled_projections", "guidance") if asked.get(n) is not None]
        self.pairs = self._made(module, inputs, now, told, there)
        self._tell_layers()
        return (), inputs

    def _present(self) -> list[slice]:
        """Where the pictures of this call are among the tokens in context."""
        return [span for span in self.spans if span is not None]

    def _tell_layers(self) -> None:
        """Every layer's own pictures, where compiled blocks of a kind find them alike."""
        sites: list[tuple[Any, Any]] = list(self.sites)
        for _, site in sites:
            site.kept[PICTURES] = tuple(self._at(site.layer.name))

    def _there(self, now: FluxNow) -> list[bool]:
        """Whether each picture is seen at this step."""
        gate, weights = now.gates[self.shown], now.weights[self.shown]
        pairs = zip(self.references[self.shown], weights, strict=True)
        return [not (off(gate) or off(w) or off(r.weight)) for r, w in pairs]

    def _placed(self, now: FluxNow, like: Tensor) -> list[Tensor]:
        """The positions [M, 3] of every picture's tokens."""
        found = [p for p in self.pictures if p is not None]
        places = now.places if now.places is not None else torch.zeros(1, 2)
        rows, columns = (int(n) + 1 for n in places.amax(0))
        places = self.methods[self.shown].places((rows, columns), [p.size for p in found])
        ids = [image_ids(2 * p.size[0], 2 * p.size[1], like.device) for p in found]
        return [
            (x + torch.tensor(place, device=x.device, dtype=x.dtype)).to(like.dtype)
            for x, place in zip(ids, places, strict=True)
        ]

    def _joined(
        self, inputs: dict[str, Any], now: FluxNow, there: Sequence[bool]
    ) -> dict[str, Any]:
        """The call with the pictures behind the image's tokens."""
        lengths = dict(now.lengths or {})
        before = start = lengths.get("reference", 0)
        if all(p is None for p in self.pictures):  # those of the pipeline's call
            if not start:
                raise ValueError(
                    f"{self.methods[self.shown].name} has no picture: the call brings none, and its"
                    " references neither"
                )
            self.spans = (slice(0, start),)
            return inputs
        hidden, ids = inputs["hidden_states"], inputs["img_ids"]
        tokens, positions = [hidden], [ids]
        spans: list[slice | None] = []
        placed = self._placed(now, ids)
        for seen, picture, place in zip(there, self.pictures, placed, strict=True):
            if picture is None or not seen:
                spans.append(None)
                continue
            spans.append(slice(start, start + len(picture.tokens)))
            start += len(picture.tokens)
            tokens.append(picture.tokens.to(hidden).expand(hidden.shape[0], -1, -1))
            positions.append(place.expand(*ids.shape[:-2], -1, -1))
        if start == before:
            return inputs
        self.spans = tuple(spans)
        self.now = replace(now, lengths={**lengths, "reference": start})
        more: dict[str, Any] = {"hidden_states": torch.cat(tokens, 1)}
        for name in RESIDUALS:
            if inputs.get(name) is not None:  # none for the pictures
                given = inputs[name]
                more[name] = type(given)(F.pad(x, (0, 0, 0, start - before)) for x in given)
        return {**inputs, **more, "img_ids": torch.cat(positions, -2)}

    def after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: the output without the pictures' tokens."""
        if self.clean is not None:
            self.clean.end()
        now, spans = self.now, self._present()
        own = spans and any(p is not None for p in self.pictures)
        if own and isinstance(now, FluxNow):
            length = (now.lengths or {})["image"] + min(s.start for s in spans)
            if isinstance(output, tuple):
                output = (output[0][:, :length], *output[1:])
            else:
                output = type(output)(sample=output.sample[:, :length])
        found = super().after(module, args, output)
        return output if found is None else found

    # Pictures on their own

    def _made(
        self,
        module: Any,
        inputs: Mapping[str, Any],
        now: FluxNow,
        told: Sequence[Tensor],
        there: Sequence[bool],
    ) -> tuple[Mapping[str, Pair] | None, ...]:
        """What the pictures are to every layer: kept from an earlier step of the run, which the
        level falls along, or made."""
        hidden, method = inputs["hidden_states"], self.methods[self.shown]
        level, place = float(now.time), (hidden.device, hidden.dtype)
        for n, kept in enumerate(self.kept):
            fits = all(p is not None or not t for p, t in zip(kept.pairs, there, strict=True))
            later = level < kept.level and place == kept.place
            if method.cache and fits and later and kept.was_told(told):
                self.kept = (*self.kept[:n], replace(kept, level=level), *self.kept[n + 1 :])
                return kept.pairs
        pairs: list[Mapping[str, Pair] | None] = []
        placed = self._placed(now, inputs["img_ids"])
        for seen, picture, ids in zip(there, self.pictures, placed, strict=True):
            if picture is None or not seen:
                pairs.append(None)
            else:
                pairs.append(self._record(module, (picture.tokens, ids), inputs))
        if method.cache:
            alive = [k for k in self.kept if all(r() is not None for r, _ in k.told)]
            others = [k for k in alive if not k.was_told(told)]
            key = tuple((weakref.ref(x), x._version) for x in told)
            self.kept = (*others[1 - KEPT :], Kept(key, level, place, tuple(pairs)))
        return tuple(pairs)

    def _record(
        self, module: Any, picture: tuple[Tensor, Tensor], inputs: Mapping[str, Any]
    ) -> dict[str, Pair]:
        """What one picture is to every layer; other methods do not act on it."""
        now, self.now = self.now, None
        method = self.methods[self.shown]
        more = (method.lora, self.backend, method.guidance)
        try:
            return recorded(module, self.layers, picture, inputs, *more)
        finally:
            self.now = now


# What is checked before anything is touched


def picture_method(methods: Sequence[Any], model: Any) -> int | None:
    """The position of the method with pictures in context.

    Raises:
        ValueError: several, or a LoRA that is not loaded.
    """
    found = [i for i, m in enumerate(methods) if isinstance(m, PictureMethod)]
    if len(found) > 1:
        names = " and ".join(methods[i].name for i in found)
        raise ValueError(f"{names} exclude each other: one method has all pictures in context")
    if not found:
        return None
    lora = methods[found[0]].lora
    if lora is not None and not tuned(model, lora):
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ValueError(f"{methods[found[0]].name}: no LoRA {lora!r} is loaded; there are {known}")
    return found[0]


def pictures_of(
    method: Any, references: Sequence[Reference], model: Any, pipe: Any
) -> list[Picture | None]:
    """The pictures of a method's references; None for the one that the pipeline's call brings.

    Raises:
        ValueError: no picture where there has to be one, no VAE to encode it, or latents of another
            width than the model's.
    """
    lacking = [i for i, r in enumerate(references) if r.image is None and r.latents is None]
    if lacking and (method.apart or method.clean or len(references) > 1):
        raise ValueError(
            f"{method.name}: every reference needs a picture or latents; {lacking} have none"
        )
    return [None if lacking else _picture(method, r, model, pipe) for r in references]


def fitted(height: int, width: int, unit: int) -> tuple[int, int]:
    """The size in which a picture is taken: at most a megapixel, in whole tokens."""
    scale = min(1.0, (PIXELS / (height * width)) ** 0.5)
    high, wide = (max(unit, int(side * scale) // unit * unit) for side in (height, width))
    return high, wide


def _picture(method: Any, reference: Reference, model: Any, pipe: Any) -> Picture:
    latents: Any = reference.latents
    if latents is None:
        if getattr(pipe, "vae", None) is None:
            where = "there is no pipeline" if pipe is None else "the pipeline has none"
            raise ValueError(
                f"{method.name}: a picture needs a VAE, and {where}; give the reference `latents`"
            )
        unit = 2 * vae_scale(pipe)
        image = read_picture(reference.image)
        latents = encode_picture(pipe, image, *fitted(image.height, image.width, unit))
    tokens = packed(latents[None])[0]
    if tokens.shape[-1] != model.config.in_channels:
        raise ValueError(
            f"{method.name}: a token of the pictures has {tokens.shape[-1]} channels, one of the"
            f" model {model.config.in_channels}"
        )
    return Picture(tokens, (latents.shape[1] // 2, latents.shape[2] // 2))
