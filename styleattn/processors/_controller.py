"""The state of a styled UNet, outside its processors: hooks, rows, schedules, and what must be
given back."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from styleattn.methods import CrossCall, EncoderMethod, Method, NormCall, Rows
from styleattn.methods._base import Features, Number, off, without_numbers
from styleattn.references import Reference, StyleBank, always, weight_at, weight_tensor

from . import _caller
from ._attention import CONTROLLER, STATE, Site, StyleAttnProcessor
from ._caller import Caller, unseen
from ._cross import LOADED, CrossSite, Entry, StyleCrossProcessor, StyleIPAdapterProcessor
from ._features import FeatureCache, FeatureRows, maker
from ._norms import parameters
from ._prompts import Prompts
from ._rows import RESIDUALS, named, without_control

OURS = (StyleAttnProcessor, StyleCrossProcessor, StyleIPAdapterProcessor)

Strengths = tuple[Number, ...]
Work = tuple[Method, Rows, Strengths, Number, Mapping[str, Number], tuple[Tensor | None, ...]]
"""A method, the rows, strengths of its references, its gate, its numbers, its masks: one call of a
layer."""


@dataclass(frozen=True)
class Now:
    """What holds during the running denoiser call: rows, weights of methods and references at this
    step, the latents' size, rows that a bank added to every chunk, rows of each prompt."""

    rows: Rows
    gates: tuple[Number, ...]
    weights: tuple[Strengths, ...]
    size: tuple[int, int]
    added: int = 0
    each: int = 1


class Controller:
    """Styles one UNet: owns its sites, hooks and schedules. See `Handle` for what users touch.

    Args:
        methods: in the order given.
        references: per method, its references.
        bank, backend: as `apply`.
        pipe: the pipeline that was styled, weakly; None for a bare model.
        prompts: the image prompts of encoder methods.
    """

    ours: tuple[type, ...] = OURS
    loaded: tuple[type, ...] = LOADED
    companions: tuple[tuple[Any, Any], ...] = ()  # further models of the pipeline, their controller

    def __init__(
        self,
        methods: Sequence[Method | EncoderMethod],
        references: Sequence[tuple[Reference, ...]],
        bank: StyleBank | FeatureCache | None,
        backend: str | None,
        pipe: Any = None,
        prompts: Prompts | None = None,
    ):
        self.methods: list[Any] = list(methods)
        self.references = list(references)
        self.prompts = prompts or Prompts({})
        self.sites: list[tuple[Any, Site | CrossSite]] = []
        self.norms: dict[torch.nn.Module, tuple[str, Entry]] = {}
        self.backend = backend
        self.pipe = None if pipe is None else weakref.ref(pipe)
        pairs = zip(methods, references, strict=True)
        self.wanted = max((len(r) for m, r in pairs if isinstance(m, Method)), default=0)
        self.control = any(m.control_reference for m in methods if isinstance(m, Method))
        self.maker = None if bank is None else maker(bank, self.control)
        self.explicit: Caller | None = None
        self.resting = 0
        self.holding = False
        self.warned = False
        self.now: Now | None = None
        self.stripping = 0
        self.numbers = [
            {n: torch.tensor(float(getattr(m, n)), dtype=torch.float32) for n in m.NUMBERS}
            for m in methods
        ]
        self._scheduled = not all(
            always(m.steps) and all(always(r.steps) for r in refs)
            for m, refs in zip(self.methods, self.references, strict=True)
        )
        self._masks: dict[tuple[int, int, int, int, torch.device], Tensor] = {}
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model keeps its style, not the pipeline it was in."""
        return {**self.__dict__, "pipe": None, "_masks": {}, "now": None}

    # What the processors and norms ask

    def call_of(self, site: Site) -> Work | None:
        """What a layer has to do now, or None when it is left as it was: bit for bit."""
        now = self.now
        rowed = not isinstance(self.maker, FeatureRows)
        if now is None or self.resting or (rowed and now.rows.count < 2):
            return None
        gate, strengths = self.strengths(site, now)
        if off(gate) or all(off(s) for s in strengths):
            return None
        i = site.method
        masks = tuple(r.mask for r in self.references[i])
        return (self.methods[i], self._rows(i, now), strengths, gate, self.numbers_of(i), masks)

    def features(self, layer: str, query: Tensor) -> Features | None:
        """What was kept of references without rows."""
        return self.maker.features(layer, query) if isinstance(self.maker, FeatureRows) else None

    def working(self, site: CrossSite) -> bool:
        """Whether a method is at work on a cross-attention layer; if not it is left as it was."""
        now = self.now
        if now is None or self.resting:
            return False
        return any(site.awake(e, _times(e.gate, now.gates[e.method])) for e in site.entries)

    def cross_calls(
        self, site: CrossSite, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None
    ) -> Iterator[tuple[EncoderMethod, CrossCall]]:
        """What every method of a cross-attention layer is asked now."""
        if self.now is not None:
            yield from self.prompts.calls(self, self.now, site, (query, key, value, key_bias))

    def strengths(self, site: Site | Entry, now: Now) -> tuple[Number, Strengths]:
        """A method's weight at a layer and step, and those of its references."""
        gate = _times(site.gate, now.gates[site.method])
        steps = now.weights[site.method]
        weights = zip(site.weights, steps, strict=True)
        return gate, tuple(_times(w, _times(gate, d)) for w, d in weights)

    def _rows(self, method: int, now: Now) -> Rows:
        rows = now.rows
        return replace(rows, references=rows.references[: len(self.references[method])])

    def numbers_of(self, method: int) -> Mapping[str, Number]:
        if torch.compiler.is_compiling():
            return self.numbers[method]
        return {name: getattr(self.methods[method], name) for name in self.numbers[method]}

    def mask_bias(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """log of a mask on a layer's grid, [N]."""
        if mask is None or self.now is None:
            return None
        height, width = self.now.size
        down = 1
        while -(-height // down) * -(-width // down) > tokens and down < max(height, width):
            down *= 2
        grid = (-(-height // down), -(-width // down))
        if grid[0] * grid[1] != tokens:
            raise ValueError(
                f"styleattn: a mask needs the grid of a layer of {tokens} tokens; latents {height}"
                f" x {width}"
                " do not scale to it by a power of 2"
            )
        small = F.interpolate(mask.to(torch.float32)[None, None], grid, mode="area")
        return torch.log(small.flatten())

    def norm(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of a GroupNorm."""
        now = self.now
        if now is None or self.resting or now.rows.count < 2:
            return None
        _, entry = self.norms[module]
        method = entry.method
        _, strengths = self.strengths(entry, now)
        if all(off(s) for s in strengths):
            return None
        own = (module.num_groups, *parameters(module, output), module.eps)
        rows = self._rows(method, now)
        call = NormCall(args[0], output, *own, rows, strengths, self.backend)
        return self.methods[method].group_norm(call)

    # The hooks around the denoiser

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: who is who in this call, how strong, and the bank's rows."""
        self.now, self.stripping = None, 0
        if self.resting:
            return None
        if not torch.compiler.is_compiling():
            self.keep()
        inputs = named(args, kwargs)
        caller = _caller.find(module, self.explicit, self.pipe)
        sample = inputs["sample"]
        batch, size = sample.shape[0], (sample.shape[2], sample.shape[3])
        if batch % caller.chunks:
            raise RuntimeError(
                f"styleattn: a batch of {batch} rows is not {caller.chunks} equal chunks of"
                " guidance"
            )
        count, each = batch // caller.chunks, caller.images_per_prompt
        if why := unseen(self.methods, self.references, count // each):
            self.warn(why)
        gates, weights = self._schedule(inputs["timestep"], caller)
        inputs = self.prompts.take(inputs, caller, count)
        added = 0 if self.maker is None else self.maker.count
        if self.maker is not None:
            references: tuple[int, ...] = tuple(range(added))
            inputs = self.maker.add(inputs, caller)
            self.stripping = caller.chunks
        else:
            references = caller.references or tuple(r * each for r in range(self.wanted))
            self._check_rows(references, self.wanted, count)
        rows = Rows(caller.chunks, count + added, references, caller.unconditional)
        if (
            self.maker is None
            and references
            and not self.control
            and any(inputs.get(name) is not None for name in RESIDUALS)
        ):
            inputs = without_control(inputs, rows.is_reference())
        self.now = Now(rows, gates, weights, size, added, each)
        return (), inputs

    def _check_rows(self, references: tuple[int, ...], wanted: int, count: int) -> None:
        if len({r for r in references if r < count}) != wanted or len(references) != wanted:
            raise ValueError(
                f"styleattn: {wanted} references at rows {list(references)} of {count} rows per"
                " chunk: the prompts of"
                " the references come first in the call, or a bank brings them"
                " (styleattn.build_bank)"
            )

    def _schedule(
        self, timestep: Any, caller: Caller
    ) -> tuple[tuple[Number, ...], tuple[Strengths, ...]]:
        """Weights of methods and references at this step: numbers, or tensors under a compiler."""
        if not self._scheduled:
            return tuple(1.0 for _ in self.methods), tuple(
                tuple(1.0 for _ in r) for r in self.references
            )
        if caller.timesteps is None or not len(caller.timesteps):
            raise RuntimeError(
                "styleattn: a schedule over steps needs the run's timesteps; call the model within"
                " `with handle.layout(chunks=..., timesteps=scheduler.timesteps)`"
            )
        if torch.compiler.is_compiling():
            fraction = _caller.fraction_of(timestep, caller.timesteps)

            def weigh(steps: Any) -> Number:
                return 1.0 if always(steps) else weight_tensor(steps, fraction)
        else:
            step = _caller.step_of(timestep, caller.timesteps) / len(caller.timesteps)

            def weigh(steps: Any) -> Number:
                return weight_at(steps, step)

        gates = tuple(weigh(m.steps) for m in self.methods)
        return gates, tuple(tuple(weigh(r.steps) for r in refs) for refs in self.references)

    def after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: the output without the bank's rows."""
        chunks, self.stripping = self.stripping, 0
        if not self.holding:
            self.now = None
        if self.maker is None or not chunks:
            return None
        return self.maker.strip(output, chunks)

    def keep(self) -> None:
        """Put our processors back where something took them away, once with a warning."""
        for attn, site in self.sites:
            found: Any = attn.processor
            if type(found) in self.ours:
                if found.base is None:
                    found.base = site.base
                site.base = found.base
                continue
            name = type(found).__name__
            if type(found) not in site.replaceable:
                if not site.note:
                    site.note = f"left to {name}, which was set after the style"
                    self.warn(
                        f"{site.layer.name} got a {name} after styleattn.apply; the layer keeps"
                        " it, unstyled"
                    )
                continue
            unloaded = isinstance(site.base, self.loaded) and not isinstance(found, self.loaded)
            site.base, site.note = found, ""
            _put(attn, site.processor(found))
            if not (name.startswith("PAG") or isinstance(found, self.loaded) or unloaded):
                self.warn(
                    f"attention processors were replaced by {name} after styleattn.apply; the"
                    " style is kept and"
                    " its own attention used"
                )

    def warn(self, message: str) -> None:
        """A warning, once per `apply`."""
        if not self.warned:
            self.warned = True
            warnings.warn(f"styleattn: {message}", stacklevel=3)

    # Installing and giving back

    def install(self, model: torch.nn.Module) -> None:
        """Put processors and hooks in place: all of them, or none."""
        try:
            for attn, site in self.sites:
                setattr(attn, STATE, site)
                _put(attn, site.processor(site.base))
            for module in self.norms:
                self._hooks.append(module.register_forward_hook(self.norm))
            self._hooks.append(model.register_forward_pre_hook(self.before, with_kwargs=True))
            self._hooks.append(model.register_forward_hook(self.after))
            model._styleattn_controller = self  # type: ignore[assignment]
        except BaseException:
            self.uninstall(model)
            raise

    def uninstall(self, model: torch.nn.Module) -> None:
        """Give back the processors that would be there without us, the very objects, and take every
        hook out."""
        ours: dict[int, Any] = {}
        for attn, site in self.sites:
            found: Any = attn.processor
            if type(found) in self.ours:
                ours[id(found)] = site.base if found.base is None else found.base
                _put(attn, ours[id(found)])
            if getattr(attn, STATE, None) is site:
                delattr(attn, STATE)
        kept = getattr(
            model, "original_attn_processors", None
        )  # what unfuse_qkv_projections puts back
        if isinstance(kept, dict):
            for name, processor in kept.items():
                if type(processor) in self.ours:
                    kept[name] = processor.base
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if model.__dict__.get(CONTROLLER) is self:
            del model._styleattn_controller

    def update(self, method: Method) -> None:
        """Take over new numbers of a method in place.

        Raises:
            ValueError: no method here differs from the given one in numbers only.
        """
        for i, old in enumerate(self.methods):
            if without_numbers(old) == without_numbers(method):
                self.methods[i] = method
                for name, tensor in self.numbers[i].items():
                    tensor.fill_(float(getattr(method, name)))
                return
        raise ValueError(
            "Handle.update changes numbers of an applied method only; call styleattn.apply for"
            " anything else"
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The model as it was, for a while."""
        self.resting += 1
        try:
            yield
        finally:
            self.resting -= 1

    @contextmanager
    def layout(self, caller: Caller) -> Iterator[None]:
        """Calls whose layout the user names."""
        before, self.explicit = self.explicit, caller
        try:
            yield
        finally:
            self.explicit = before


def _put(attn: Any, processor: Any) -> None:
    """Set a processor, whether it and the one before are modules or plain objects."""
    attn._modules.pop("processor", None)
    attn.__dict__.pop("processor", None)
    attn.processor = processor


def _times(a: Number, b: Number) -> Number:
    """A product that stays a plain zero when one factor is known to be zero."""
    return 0.0 if off(a) or off(b) else a * b
