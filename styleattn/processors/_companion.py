"""A ControlNet next to a styled UNet: images of a method act in it too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import ControlNetModel

from styleattn.methods import Rows

from ._attention import CONTROLLER
from ._caller import Caller, from_modular, from_pipe, running, unwrapped
from ._controller import Controller, Now
from ._prompts import Prompts
from ._rows import named

COMPONENT = "controlnet"


def control_of(pipe: Any, methods: Iterable[Any]) -> ControlNetModel | None:
    """The pipeline's ControlNet, where a method has adapters for it; else None.

    Raises:
        TypeError: several ControlNets, or one of another kind.
    """
    wanting = [m.name for m in methods if concerns_control(m)]
    found = unwrapped(getattr(pipe, COMPONENT, None))
    if found is None or not wanting:
        return None
    if not isinstance(found, ControlNetModel):
        raise TypeError(
            f"{wanting[0]} has adapters for one ControlNetModel, the pipeline has a"
            f" {type(found).__name__}"
        )
    return found


def concerns_control(method: Any) -> bool:
    """Whether a method has adapters for a ControlNet."""
    known = COMPONENT in getattr(method, "COMPONENTS", ())
    references = range(len(method.references or ()))
    return known and any(method.adapter_of(i, COMPONENT) is not None for i in references)


class ControlController(Controller):
    """Shows images to a ControlNet; methods and their numbers are those of the UNet's controller.

    Args:
        owner: the controller of the UNet.
        prompts: the images that its methods show to the ControlNet.
    """

    def __init__(self, owner: Controller, prompts: Prompts):
        super().__init__(owner.methods, owner.references, None, owner.backend, None, prompts)
        self.methods, self.numbers, self.pipe = owner.methods, owner.numbers, owner.pipe

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: who is who in this call, and how strong."""
        self.now = None
        if self.resting:
            return None
        if not torch.compiler.is_compiling():
            self.keep()
        inputs = named(args, kwargs)
        caller = self._caller(module, inputs)
        sample = inputs["sample"]
        count = sample.shape[0] // caller.chunks
        if sample.shape[0] != caller.chunks * count:
            raise RuntimeError(
                f"styleattn: a batch of {sample.shape[0]} rows of the ControlNet is not"
                f" {caller.chunks} equal chunks of guidance"
            )
        gates, weights = self._schedule(inputs["timestep"], caller)
        rows = Rows(caller.chunks, count, (), caller.unconditional)
        size = (sample.shape[2], sample.shape[3])
        self.now = Now(rows, gates, weights, size, 0, caller.images_per_prompt)
        return None

    def _caller(self, module: torch.nn.Module, inputs: Mapping[str, Any]) -> Caller:
        """The layout of the batch; in guess mode the ControlNet sees no unconditional rows.

        Raises:
            RuntimeError: nobody knows.
        """
        if self.explicit is not None:
            caller = self.explicit
        elif torch.compiler.is_compiling() and self.pipe is not None and self.pipe() is not None:
            caller = from_pipe(self.pipe())
        else:
            found = running(module, COMPONENT)
            if found is None:
                raise RuntimeError(
                    "styleattn: the ControlNet was called outside a diffusers pipeline; call it"
                    " within `with handle.layout(chunks=...)`, or within `with handle.paused()`"
                )
            owner, modular, scope = found
            caller = from_modular(owner) if modular else from_pipe(owner, scope)
        if inputs.get("guess_mode"):
            kept = tuple(u for u in caller.unconditional if not u)
            return replace(caller, chunks=len(kept), unconditional=kept)
        return caller

    def after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: the call is over."""
        self.now = None


class PairedController(Controller):
    """The controller of a UNet whose pipeline has a ControlNet that is styled with it: both or
    none."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the UNet is not the pipeline's, and has no ControlNet."""
        return {**super().__getstate__(), "companions": ()}

    def install(self, model: torch.nn.Module) -> None:
        """Put processors and hooks in place in both: all of them, or none.

        Raises:
            ValueError: the ControlNet has a style from elsewhere.
        """
        for other, _ in self.companions:
            if CONTROLLER in other.__dict__:
                raise ValueError(
                    "the pipeline's ControlNet is styled through another UNet; remove that style"
                    " first"
                )
        super().install(model)
        try:
            for other, companion in self.companions:
                companion.install(other)
        except BaseException:
            super().uninstall(model)
            raise

    def uninstall(self, model: torch.nn.Module) -> None:
        """Give back both."""
        for other, companion in self.companions:
            companion.uninstall(other)
        super().uninstall(model)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Both as they were, for a while."""
        with ExitStack() as stack:
            stack.enter_context(super().paused())
            for _, companion in self.companions:
                stack.enter_context(companion.paused())
            yield

    @contextmanager
    def layout(self, caller: Caller) -> Iterator[None]:
        """Calls whose layout the user names."""
        with ExitStack() as stack:
            stack.enter_context(super().layout(caller))
            for _, companion in self.companions:
                stack.enter_context(companion.layout(caller))
            yield
