"""Block hooks on FLUX: image tokens that read identities between blocks."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from styleattn.adapters import load_pulid, read_identity
from styleattn.attention import attention
from styleattn.inversion import read_picture
from styleattn.methods import ImagePrompt, Layer
from styleattn.methods._base import off
from styleattn.methods._blocks import BlockCall, BlockMethod
from styleattn.references import Reference

from ._cross import Entry
from ._layers import layer_weights
from ._pictures import kept_adapter

if TYPE_CHECKING:
    from ._flux_controller import FluxController, FluxNow

KIND = "pulid-flux"
PLACES = "_styleattn_places"
_COMPUTES = ("should_compute", "gate_should_compute")
"""What the states of diffusers' block caches call it that the blocks are computed."""


@dataclass
class BlockPlace:
    """One method behind one block.

    The attention's weights are copied to where the image tokens are, for as long as the method is
    applied, and the keys and values of the identities made once.

    Args:
        controller: the one that styles the model.
        layer: the block's name and place among those behind which the adapter reads.
        entry: the method, its gate, its references' weights.
        part: the adapter's attention for this block.
        tokens: per reference [1 + P, M, C]: nobody's, then those of every prompt's identity.
    """

    controller: FluxController
    layer: Layer
    entry: Entry
    part: Any
    tokens: tuple[Tensor, ...]
    pairs: tuple[tuple[Tensor, Tensor], ...] = field(default=(), repr=False)

    def ready(self, device: torch.device, dtype: torch.dtype) -> None:
        """Weights, keys and values where the image tokens are."""
        weight = self.part.to_q.weight
        if self.pairs and (weight.device, weight.dtype) == (device, dtype):
            return
        if (weight.device, weight.dtype) != (device, dtype):
            self.part = copy.deepcopy(self.part).to(device, dtype)
        with torch.no_grad():
            self.pairs = tuple(self.part.key_value(t.to(device, dtype)) for t in self.tokens)

    def read(self, hidden: Tensor) -> Tensor:
        """The block's image tokens, of pictures in context too, with what the image read."""
        now = self.controller.now
        if now is None or self.controller.resting:
            return hidden
        image = hidden[:, : self.controller.runs()["image"]]
        if not torch.compiler.is_compiling():
            self.ready(image.device, image.dtype)
        prompts = self._prompts(now)  # type: ignore[arg-type]
        if not prompts:
            return hidden
        method = self.controller.methods[self.entry.method]
        numbers = self.controller.numbers_of(self.entry.method)
        query = self.part.query(image)
        branches = method.branches(BlockCall(self.layer, query, prompts, numbers))
        out = attention(query, branches, backend=self.controller.backend)
        assert isinstance(out, Tensor)
        image = image + self.part.out(out)
        rest = hidden[:, image.shape[1] :]
        return torch.cat([image, rest], 1) if rest.shape[1] else image

    def _prompts(self, now: FluxNow) -> tuple[ImagePrompt, ...]:
        """The identities that are at work."""
        found = []
        _, strengths = self.controller.strengths(self.entry, now)
        references = self.controller.references[self.entry.method]
        for index, (reference, strength) in enumerate(zip(references, strengths, strict=True)):
            if off(strength):
                continue
            key, value = self.pairs[index]
            mask = reference.mask
            share = None if mask is None else self.controller.share(mask, key.device)
            rows = torch.tensor(_rows(reference, now, key.shape[0] - 1))
            found.append(ImagePrompt(key, value, rows, strength, share, index))
        return tuple(found)


def hook(places: Sequence[tuple[torch.nn.Module, BlockPlace]]) -> list[Any]:
    """Let the image tokens read behind blocks; the handles of the hooks."""
    for block, place in places:
        block.__dict__.setdefault(PLACES, []).append(place)
    blocks = dict.fromkeys(block for block, _ in places)
    return [block.register_forward_hook(_behind, with_kwargs=True) for block in blocks]


def unhook(places: Sequence[tuple[torch.nn.Module, BlockPlace]]) -> None:
    """Forget them; the handles are the caller's to remove."""
    for block, _ in places:
        block.__dict__.pop(PLACES, None)


def _behind(block: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Forward hook of a block: one function for all, so that compiled blocks share a graph."""
    if _answered(block, args, kwargs, output):
        return None
    text, hidden = output
    for place in block._styleattn_places:
        hidden = place.read(hidden)
    return text, hidden


def _rows(reference: Reference, now: FluxNow, prompts: int) -> list[int]:
    """For every row of the call, the row of the identity's tokens: nobody's in the unconditional
    call, else the one of its prompt; -1 for prompts that do not see it and a bank's references.

    Raises:
        ValueError: identities of another number of prompts.
    """
    count, each = now.rows.count - now.added, now.each
    if prompts > 1 and prompts * each != count:
        raise ValueError(
            f"pulid_flux: identities of {prompts} prompts for {count // each} prompts; give one"
            " identity, or one per prompt"
        )
    found = [-1] * now.added
    for row in range(count):
        prompt = row // each
        seen = 0 if now.rows.unconditional[0] else 1 + (prompt if prompts > 1 else 0)
        known = reference.prompts is None or prompt in reference.prompts
        found.append(seen if known else -1)
    return found


def _answered(block: Any, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether a cache of diffusers answered in the place of the block or of those behind it; what
    was read is in its answer."""
    if torch.compiler.is_compiling():
        return False
    registry = getattr(block, "_diffusers_hook", None)
    for hook in () if registry is None else registry.hooks.values():
        manager = getattr(hook, "state_manager", None)
        if manager is None:
            continue
        try:
            state = manager.get_state()
        except ValueError:  # outside a cache context: nothing is kept
            continue
        if any(getattr(state, name, True) is False for name in _COMPUTES):
            return True
    given = kwargs.get("hidden_states", args[0] if args else None)
    return output[1] is given


def block_places(
    controller: FluxController, model: Any
) -> list[tuple[torch.nn.Module, BlockPlace]]:
    """What the block methods of a controller will hook; touches nothing.

    Raises:
        ValueError: no adapter or no identity, or ones that do not fit the model; layers that choose
            nothing.
        FileNotFoundError: no such file.
    """
    found = []
    for index, method in enumerate(controller.methods):
        if not isinstance(method, BlockMethod):
            continue
        adapter = _adapter(method, model)
        references = controller.references[index]
        tokens = [_tokens(method, r, adapter) for r in references]
        places = adapter.places(len(model.transformer_blocks), len(model.single_transformer_blocks))
        gates = layer_weights(method.layers, list(places))
        weights = [layer_weights(r.layers, list(places)) for r in references]
        for position, (name, number) in enumerate(places.items()):
            mine = tuple(r.weight * w[name] for r, w in zip(references, weights, strict=True))
            if gates[name] and any(mine):
                layer = Layer(name, position, len(places))
                part = adapter.attention(number)
                entry = Entry(index, gates[name], mine)
                place = BlockPlace(controller, layer, entry, part, tuple(tokens))
                found.append((model.get_submodule(name), place))
    return found


def _adapter(method: Any, model: Any) -> Any:
    """The adapter of a method, read from its file where it names one, held against the model."""
    adapter, double = method.adapter, len(model.transformer_blocks)
    if adapter is None:
        raise ValueError(
            f"{method.name} needs an adapter: styleattn.adapters.load_pulid, or a file"
        )
    if isinstance(adapter, (str, os.PathLike)):
        single = len(model.single_transformer_blocks)
        adapter = kept_adapter(
            method,
            (double, single),
            lambda path: load_pulid(path, double=double, single=single),
        )
    kind = getattr(adapter, "kind", None)
    if kind != KIND:
        raise ValueError(f"{method.name}: the adapter must be {KIND!r}, this one is {kind!r}")
    width = adapter.attention(0).to_q.in_features
    if width != model.inner_dim:
        raise ValueError(
            f"{method.name}: the adapter reads for image tokens {width} wide, the model's are"
            f" {model.inner_dim}"
        )
    return adapter


def with_identity(method: Any) -> tuple[Reference, ...]:
    """The references of a block method, of which each has an identity.

    Raises:
        ValueError: no identity, or a picture that nothing can read; all reasons at once.
    """
    lone = () if method.identity is None else (Reference(),)
    own: Sequence[Reference] = method.references or lone
    reasons = [] if own else ["no identity: it needs references, or `identity`"]
    for i, r in enumerate(own):
        if r.embeds is None and r.image is None and method.identity is None:
            reasons.append(f"references[{i}] has no identity: neither a picture nor embeds")
        if r.image is not None and method.faces is None:
            reasons.append(
                f"references[{i}].image needs `faces` to find the face: a"
                " styleattn.adapters.faces.FaceAnalyser (pip install 'styleattn[face]'); or give"
                " `embeds`"
            )
    if reasons:
        raise ValueError(f"{method.name}: " + "; ".join(reasons))
    return tuple(own)


@torch.no_grad()
def _tokens(method: Any, reference: Reference, adapter: Any) -> Tensor:
    """[1 + P, M, C]: nobody's tokens, or those given for the unconditional call, and the
    identity's.

    Raises:
        ValueError: tokens of another width than the adapter's.
    """
    if reference.embeds is not None:
        made: Any = reference.embeds
    elif reference.image is not None:
        made = method.faces(np.asarray(read_picture(reference.image)))
    else:
        made = read_identity(method.identity)
    if isinstance(made, tuple):
        weight = adapter.pulid_encoder.latents
        face, vision = made
        made = adapter.tokens(face.to(weight), [v.to(weight) for v in vision])
    made = made[None] if made.ndim == 2 else made
    nobody = reference.negative[None] if reference.negative is not None else adapter.nobody()
    width = adapter.attention(0).to_kv.in_features
    for what, x in (("embeds", made), ("negative", nobody)):
        if x.shape[-1] != width or x.shape[1] != made.shape[1]:
            raise ValueError(
                f"{method.name}: {what} must be [M, {width}], as many tokens each, got"
                f" {list(x.shape[1:])} for an identity of {list(made.shape[1:])}"
            )
    return torch.cat([nobody.to(made), made])
