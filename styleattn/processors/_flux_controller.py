"""The state of a styled FLUX transformer: rows, runs of tokens, schedules, and tokens that methods
bring."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

from styleattn.methods import Rows
from styleattn.methods._base import Number, off
from styleattn.methods._blocks import BlockMethod
from styleattn.methods._images import Images
from styleattn.methods._joint import ContextMethod, JointCall, JointMethod, PanelMethod, Tokens
from styleattn.methods._shown import PictureMethod
from styleattn.references import Reference, StyleBank

from . import _caller
from ._caller import Caller, unseen
from ._controller import Controller, Now
from ._flux_attention import OURS, JointSite
from ._flux_blocks import BlockPlace, hook, unhook
from ._flux_panels import PanelOrder, Panels
from ._flux_places import Moved, share_of
from ._flux_rows import FluxRowMaker, images_of_prompts, without_control
from ._flux_tokens import put_in, served, with_tokens
from ._prompts import Prompts

PARAMETERS = tuple(inspect.signature(FluxTransformer2DModel.forward).parameters)[1:]


def reads_rows(method: Any) -> bool:
    """Whether a method of joint attention reads other images of the batch."""
    others = (ContextMethod, Images, PanelMethod, BlockMethod, PictureMethod)
    return isinstance(method, JointMethod) and not isinstance(method, others)


@dataclass(frozen=True)
class FluxNow(Now):
    """What holds during the running call, on FLUX.

    Args:
        lengths: tokens of every run, in the order of the sequence.
        runs: per method and reference, the name of the run that carries it.
        places: [N, 2] row and column of every image token.
        time: the noise level, 1 to 0.
        moved: the rotary positions of the image tokens, moved by heights and widths of the image.
        panels: how the image tokens were put in order, where a method parts the image.
        embedded: tokens of the model's own width, and where in the text they stand.
    """

    lengths: Mapping[str, int] | None = None
    runs: tuple[tuple[str | None, ...], ...] = ()
    places: Tensor | None = None
    time: Number = 1.0
    moved: Any = None
    panels: Panels | None = None
    embedded: tuple[tuple[int, Tensor], ...] = ()


class FluxController(Controller):
    """Styles one FLUX transformer.

    Args:
        methods, references, bank, backend, pipe, prompts: as for any controller.
        contexts: per method, the tokens [P, M, C] of every reference; empty for methods whose
            references are rows.
    """

    ours = OURS
    loaded = (FluxIPAdapterAttnProcessor,)

    def __init__(
        self,
        methods: Sequence[Any],
        references: Sequence[tuple[Reference, ...]],
        contexts: Sequence[tuple[Tensor, ...]],
        bank: StyleBank | None,
        backend: str | None,
        pipe: Any = None,
        prompts: Prompts | None = None,
    ):
        super().__init__(methods, references, None, backend, pipe, prompts)
        self.contexts = list(contexts)
        in_rows = [i for i in range(len(self.methods)) if self.in_rows(i)]
        self.wanted = max((len(references[i]) for i in in_rows), default=0)
        self.control = any(self.methods[i].control_reference for i in in_rows)
        self.bank_rows = None if bank is None else FluxRowMaker(bank, self.control)
        self._known_ids: tuple[Any, int, int] | None = None
        self.places: list[tuple[torch.nn.Module, BlockPlace]] = []
        self.order = PanelOrder(self.methods)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known_ids": None}

    # What the processors ask

    def in_rows(self, method: int) -> bool:
        """Whether the references of a method are rows of the batch."""
        return reads_rows(self.methods[method])

    def works(self, site: JointSite) -> bool:
        """Whether a method is at work on a layer; if not it is left as it was."""
        now = self.now
        if not isinstance(now, FluxNow) or self.resting:
            return False
        return any(self._active(site, entry, now) for entry in site.entries)

    def _active(self, site: JointSite, entry: Any, now: FluxNow) -> bool:
        if self.contexts[entry.method]:  # tokens in the sequence: even to be ignored
            return any(now.runs[entry.method])
        gate, strengths = self.strengths(entry, now)
        if entry.method == self.order.method:
            return now.panels is not None and not off(gate)
        if isinstance(self.methods[entry.method], Images):
            if self.methods[entry.method].adapter is None:
                return isinstance(site.base, self.loaded)
            return not off(gate) and not all(off(s) for s in strengths)
        return now.rows.count > 1 and not off(gate) and not all(off(s) for s in strengths)

    def runs(self) -> Mapping[str, int]:
        """Tokens of every run, in the order of the sequence."""
        return self.running().lengths or {}

    def running(self) -> FluxNow:
        if not isinstance(self.now, FluxNow):
            raise RuntimeError("styleattn: an attention layer was called outside its transformer")
        return self.now

    def joint_calls(
        self, site: JointSite, tokens: Mapping[str, Tokens]
    ) -> Iterator[tuple[JointMethod, JointCall]]:
        """What every method of a layer is asked now."""
        now = self.running()
        device = tokens["image"].value.device
        for entry in self.order.last(site.entries):
            index = entry.method
            if isinstance(self.methods[index], Images) or not self._active(site, entry, now):
                continue
            method, references = self.methods[index], self.references[index]
            gate, strengths = self.strengths(entry, now)
            context = bool(self.contexts[index])
            rows = now.rows.references[: 0 if context else len(references)]
            yield (
                method,
                JointCall(
                    site.layer,
                    tokens,
                    replace(now.rows, references=rows),
                    strengths,
                    gate,
                    self.numbers_of(index),
                    tuple(
                        None if r.mask is None else self.share(r.mask, device) for r in references
                    ),
                    now.runs[index],
                    tuple(served(r, now) for r in references) if context else (),
                    now.time,
                    now.moved,
                    self.backend,
                    None if now.panels is None else now.panels.first,
                ),
            )

    def share(self, mask: Tensor, device: torch.device) -> Tensor:
        """[N]: the mean of a mask [h, w] under every image token, wherever the token is."""
        places = self.running().places
        if places is None:
            raise RuntimeError("styleattn: a mask needs the positions of the image tokens")
        return share_of(mask.to(device, torch.float32), places.to(device))

    # The hooks around the transformer

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: who is who in this call, how strong, and the tokens of methods."""
        self.now = None
        if self.resting:
            return None
        if not torch.compiler.is_compiling():
            self.keep()
        inputs = {**dict(zip(PARAMETERS, args, strict=False)), **kwargs}
        text = inputs["encoder_hidden_states"]
        caller, level = self._caller(module, inputs["timestep"], text)
        image, batch = inputs["hidden_states"], inputs["hidden_states"].shape[0]
        gates, weights = self._schedule(level, caller)
        each = caller.images_per_prompt
        inputs, rows = self._with_rows(inputs, caller, level)
        added = rows.count - batch
        if not torch.compiler.is_compiling():
            for _, place in self.places:
                place.ready(image.device, image.dtype)
        ids = inputs["img_ids"]
        made = self._generated(ids, image.shape[1])
        inputs, panels = self.order.arrange(self.methods, inputs, made)
        ids = inputs["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        lengths = {"text": text.shape[1]}
        inputs, runs, embedded = with_tokens(
            self, inputs, lengths, (gates, weights), rows, (added, each)
        )
        lengths["image"] = made
        if made != image.shape[1]:
            lengths["reference"] = image.shape[1] - made
        self.now = FluxNow(
            rows,
            gates,
            weights,
            (0, 0),
            added,
            each,
            lengths,
            runs,
            ids[:made, 1:].long(),
            level / 1000,
            Moved(module, ids[:made]),
            panels,
            embedded,
        )
        return (), inputs

    def _with_rows(
        self, inputs: dict[str, Any], caller: Caller, level: Any
    ) -> tuple[dict[str, Any], Rows]:
        """The call with the bank's rows, and what its rows are."""
        batch, each = inputs["hidden_states"].shape[0], caller.images_per_prompt
        if why := unseen(self.methods, self.references, batch // each):
            self.warn(why)
        inputs, added = images_of_prompts(inputs, batch, each), 0
        if self.bank_rows is not None:
            added = self.bank_rows.count
            references: tuple[int, ...] = tuple(range(added))
            inputs = self.bank_rows.add(inputs, caller, level)
        else:
            references = caller.references or tuple(r * each for r in range(self.wanted))
            if references and not self.control:
                inputs = without_control(inputs, references, batch)
        self._check_rows(references, self.wanted, batch + added)
        return inputs, Rows(1, batch + added, references, caller.unconditional)

    def install(self, model: torch.nn.Module) -> None:
        """Processors and hooks, those behind blocks too."""
        super().install(model)
        self._hooks += hook(self.places)
        if any(getattr(m, "embedded", False) for m in self.methods):
            embedder: Any = model.context_embedder
            self._hooks.append(embedder.register_forward_hook(self.behind_embedder))

    def uninstall(self, model: torch.nn.Module) -> None:
        """Nothing of it is left."""
        super().uninstall(model)
        unhook(self.places)

    def behind_embedder(self, module: torch.nn.Module, args: Any, output: Tensor) -> Any:
        """Forward hook of the text embedder: the tokens that have the model's own width."""
        now = self.now
        return put_in(output, now.embedded) if isinstance(now, FluxNow) else None

    def _schedule(self, timestep: Any, caller: Caller) -> Any:
        """Weights at this step; those that are neither 0 nor 1 as tensors, so that compiled blocks
        do not take them for constants."""
        gates, weights = super()._schedule(timestep, caller)
        return tuple(map(_varying, gates)), tuple(tuple(map(_varying, w)) for w in weights)

    def after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: the image's tokens as they came, without the bank's rows."""
        now, self.now = self.now, None
        if not isinstance(now, FluxNow):
            return None
        output = output if now.panels is None else now.panels.restored(output)
        return output if self.bank_rows is None else self.bank_rows.strip(output)

    def _caller(self, module: Any, timestep: Any, text: Tensor) -> tuple[Caller, Any]:
        """Who calls, and the noise level as the scheduler has it (0 to 1000)."""
        caller, exact = self.explicit, None
        if caller is None and torch.compiler.is_compiling():
            pipe = None if self.pipe is None else self.pipe()
            caller = Caller(1, 1, (False,), None if pipe is None else pipe.scheduler.timesteps)
            if any(self.contexts) or self.places:
                raise RuntimeError(
                    "styleattn: within a compiled transformer it is unknown which of true CFG's two"
                    " calls runs; compile its blocks (compile_repeated_blocks), or call it within"
                    " `with handle.layout(1)`"
                )
        elif caller is None:
            found = _caller.running(module, "transformer")
            caller = Caller(1, 1, (False,), None)
            if found is not None:
                owner, modular, scope = found
                caller, exact = _from_running(owner, modular, scope, text)
        value = torch.as_tensor(timestep).reshape(-1)[0] * 1000
        if exact is not None:
            return caller, exact
        if caller.timesteps is not None and len(caller.timesteps):
            levels = caller.timesteps.to(value.device)
            nearest = (levels - value).abs().argmin().reshape(1)
            value = levels.index_select(0, nearest)[0]
        return caller, value

    def _generated(self, ids: Tensor, tokens: int) -> int:
        """How many of the image tokens are generated; the rest are pictures in context, whose ids
        start with another number than 0."""
        if torch.compiler.is_compiling():
            pipe = None if self.pipe is None else self.pipe()
            if pipe is not None and "Kontext" in type(pipe).__name__:
                raise RuntimeError(
                    "styleattn: within a compiled transformer the tokens of a picture in context"
                    " are unknown; compile its blocks (compile_repeated_blocks)"
                )
            return tokens
        known = self._known_ids
        if known is None or known[0]() is not ids or known[1] != ids._version:
            flat = ids[0] if ids.ndim == 3 else ids
            count = int((flat[:, 0] == 0).sum())
            self._known_ids = known = (weakref.ref(ids), ids._version, count)
        return known[2]


def _varying(weight: Number) -> Number:
    fixed = isinstance(weight, Tensor) or weight in (0.0, 1.0)
    return weight if fixed else torch.tensor(weight, dtype=torch.float32)


def _from_running(
    owner: Any, modular: bool, scope: Mapping[str, Any], text: Tensor
) -> tuple[Caller, Any]:
    """What a running pipeline says, and the noise level of its loop."""
    if modular:
        return _caller.from_modular(owner), None
    images = scope.get("num_images_per_prompt")
    images = images if isinstance(images, int) and images > 0 else 1
    negative = scope.get("negative_prompt_embeds")
    timesteps = getattr(owner.scheduler, "timesteps", None)
    return Caller(1, images, (text is negative,), timesteps), scope.get("t")
