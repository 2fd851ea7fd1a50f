"""Methods on hosts: `apply` switches them on in a diffusers pipeline, `remove` gives back what was
there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from styleattn.backends import MODULES as BACKENDS
from styleattn.methods import METHODS, BlockMethod, EncoderMethod, JointMethod, Method
from styleattn.references import StyleBank

from . import flux, unet
from ._attention import CONTROLLER
from ._caller import Caller, from_layout, unwrapped
from ._controller import Controller
from ._explain import Explanation, LayerReport, explanation
from ._features import FeatureCache

HOSTS: tuple[Any, ...] = (unet, flux)
"""One module per host family: `matches`, `plan`, `COMPONENT`, `SUPPORTED`, `TAKES`."""

KINDS = (Method, EncoderMethod, JointMethod, BlockMethod)

__all__ = ["Explanation", "Handle", "LayerReport", "apply", "explain", "paused", "remove"]


class Handle:
    """A style at work on a model. Leave its `with` block, or call `remove`, to take it off.

    Bound to the model, not to the pipeline: pipelines that share the model share the style.
    """

    def __init__(self, model: torch.nn.Module, controller: Controller):
        self.model = model
        self._controller = controller

    @property
    def active(self) -> bool:
        """Whether this is what styles the model (a later `apply` replaces it)."""
        return _controller(self.model) is self._controller

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods at work."""
        return tuple(self._controller.methods)

    def remove(self) -> None:
        """Give the model back as it was; nothing if another `apply` has replaced this one."""
        if self.active:
            self._controller.uninstall(self.model)

    def update(self, method: Method) -> None:
        """Change numbers of an applied method (for StyleAligned its score scale and shift) without
        a new plan: a compiled model is not compiled again.

        Raises:
            ValueError: the method differs in anything else.
        """
        self._controller.update(method)

    def explain(self) -> Explanation:
        """What runs on each attention layer, and why."""
        return explanation(self.model)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within: the model as it was."""
        with self._controller.paused():
            yield

    @contextmanager
    def layout(
        self,
        chunks: int,
        *,
        timesteps: Tensor | None = None,
        references: tuple[int, ...] | None = None,
    ) -> Iterator[None]:
        """Within: calls of the model outside a pipeline, whose batch is `chunks` copies of the
        rows.

        Args:
            chunks: 1 without guidance, 2 for [uncond, cond].
            timesteps: [N] the run's noise levels; needed for schedules over steps.
            references: rows of each chunk that are references; None for the first ones.

        Raises:
            ValueError: chunks or timesteps that have no meaning.
        """
        with self._controller.layout(from_layout(chunks, timesteps, references)):
            yield

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        names = ", ".join(m.name for m in self.methods)
        state = "" if self.active else ", removed"
        return f"<styleattn.Handle {names} on {type(self.model).__name__}{state}>"


def apply(
    pipe_or_model: Any,
    *methods: Method | EncoderMethod | JointMethod | BlockMethod,
    bank: StyleBank | FeatureCache | None = None,
    backend: str | None = None,
) -> Handle:
    """Switch methods on in a diffusers pipeline (or its denoiser); the pipeline call stays as it
    is.

    Without a bank the first prompt of the call is the reference (of several references, the first
    prompts). With a bank the call has only the prompts to be styled; the references are added
    inside the denoiser.

    Args:
        pipe_or_model: a pipeline, or its UNet or FLUX transformer. Pipelines that share it share
            the style.
        methods: at least one; on a self-attention layer at most one may be at work, on a
            cross-attention layer any number. On FLUX any number whose references are tokens, and
            one that reads other images of the batch.
        bank: references made ready by `build_bank`; or what StyleID reads of them, by
            `styleattn.processors.features.cache_features`.
        backend: of `styleattn.attention`; None for the best that can run.

    Returns:
        a handle, also a context manager. `apply` on a styled model replaces the style.

    Raises:
        TypeError: a host, method, bank or processor that is not supported; says what is.
        ValueError: settings that do not fit the model. In every case the model is left as it was.
    """
    model, host, pipe = _resolve(pipe_or_model)
    if not methods:
        raise TypeError(f"apply needs at least one method; there are {', '.join(METHODS)}")
    for method in methods:
        if isinstance(method, type) or not isinstance(method, KINDS):
            got = (
                f"the class {method.__name__}"
                if isinstance(method, type)
                else f"a {type(method).__name__}"
            )
            raise TypeError(f"apply takes methods such as styleattn.StyleAligned(), got {got}")
        if not isinstance(method, host.TAKES):
            raise TypeError(f"{method.name} does not work on a {type(model).__name__}")
    if isinstance(bank, FeatureCache) and host is not unet:
        raise TypeError(f"features are kept of UNets, not of a {type(model).__name__}")
    if bank is not None and not isinstance(bank, (StyleBank, FeatureCache)):
        raise TypeError(
            f"bank must be a StyleBank (StyleBank.load reads one), got a {type(bank).__name__}"
        )
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    controller = host.plan(model, methods, bank, backend, pipe)
    previous = _controller(model)
    if previous is not None:
        previous.uninstall(model)
    try:
        controller.install(model)
    except BaseException:
        if previous is not None:
            previous.install(model)
        raise
    return Handle(model, controller)


def remove(pipe_or_model: Any) -> None:
    """Give back exactly what was there before `apply`: the same processor objects, no hooks.
    Nothing if there is no style.

    Raises:
        TypeError: a host that is not supported.
    """
    model, _, _ = _resolve(pipe_or_model)
    controller = _controller(model)
    if controller is not None:
        controller.uninstall(model)


def explain(pipe_or_model: Any) -> Explanation:
    """What runs on each attention layer: method, processor, backend or fallback, and why. Prints as
    a table.

    Raises:
        TypeError: a host that is not supported.
    """
    return explanation(_resolve(pipe_or_model)[0])


def paused(pipe_or_model: Any) -> Any:
    """A context manager: within, the model is as it was without styles. Nothing to do where there
    are none."""
    controller = _controller(_resolve(pipe_or_model)[0])
    return nullcontext() if controller is None else controller.paused()


@contextmanager
def differentiable(
    pipe_or_model: Any, *, unconditional: bool, timesteps: Tensor | None
) -> Iterator[None]:
    """Within: calls of the denoiser with the rows of one chunk of guidance, whose gradients are
    computed within too: blocks that are computed again for them (gradient checkpointing) see the
    style as it was. Nothing to do where there are no styles.

    Args:
        unconditional: whether it is the unconditional chunk.
        timesteps: [N] the run's noise levels; needed for schedules over steps.

    Raises:
        TypeError: a host that is not supported.
    """
    controller = _controller(_resolve(pipe_or_model)[0])
    if controller is None:
        yield
        return
    controller.holding = True
    try:
        with controller.layout(Caller(1, 1, (unconditional,), timesteps)):
            yield
    finally:
        controller.holding, controller.now = False, None


def _controller(model: torch.nn.Module) -> Controller | None:
    return model.__dict__.get(CONTROLLER)


def _resolve(pipe_or_model: Any) -> tuple[Any, Any, Any]:
    """The denoiser, its host module, and the pipeline it was found in (or None)."""
    for host in HOSTS:
        inside = unwrapped(getattr(pipe_or_model, host.COMPONENT, None))
        if host.matches(unwrapped(pipe_or_model)):
            return unwrapped(pipe_or_model), host, None
        if not isinstance(pipe_or_model, torch.nn.Module) and host.matches(inside):
            return inside, host, pipe_or_model
    supported = ", ".join(host.SUPPORTED for host in HOSTS)
    raise TypeError(
        f"styleattn cannot style a {type(pipe_or_model).__name__}; it supports {supported}"
    )
