"""Guidance by CSD: every step is led to a style and a content, by gradients through the UNet."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from styleattn.adapters import CSD
from styleattn.inversion.ddim import MIN_ALPHA, to_epsilon
from styleattn.inversion.host import Schedule, in_fp32, schedule_of, unscaled
from styleattn.processors import differentiable
from styleattn.processors._rows import named

LAYERS = ("ResnetBlock2D", "BasicTransformerBlock", "Upsample2D", "Downsample2D")
"""Classes of a UNet's and of a VAE's layers that are computed again for the gradients."""


@dataclass(frozen=True)
class Aim:
    """What pictures are led to.

    Args:
        csd: the model that compares.
        style, content: embeddings [out] of norm 1; None where there is no such aim.
        style_scale, content_scale: how strongly.
    """

    csd: CSD
    style: Tensor | None = None
    content: Tensor | None = None
    style_scale: float = 0.0
    content_scale: float = 0.0

    def loss(self, pictures: Tensor) -> Tensor:
        """`-style_scale * <s(x), style> - content_scale * <c(x), content>`, summed over pictures
        [R, 3, H, W] in [0, 1]."""
        _, content, style = self.csd(self.csd.prepare(pictures))
        total = pictures.new_zeros(())
        for found, aim, scale in (
            (style, self.style, self.style_scale),
            (content, self.content, self.content_scale),
        ):
            if aim is not None and scale:
                total = total - scale * (found @ aim.to(found)).sum()
        return total


@contextlib.contextmanager
def led(pipe: Any, aim: Aim) -> Iterator[None]:
    """Within: the pipeline's calls are guided by CSD, step by step.

        eps <- eps + r * grad_x loss( D( r * x0 + (1 - r) * x ) ),
        x0 = (x - r * eps(x)) / sqrt(abar),  r = sqrt(1 - abar)

    D decodes to pictures in [0, 1]. eps(x) is the prediction of the unconditional rows, where there
    are some, as in the authors' code; what is added is added to all rows, and so to what guidance
    makes of them. ControlNet's residuals count as constants. The gradient is exact. It is computed
    in two parts, so that the graphs of the VAE and of the UNet never live together: from the loss
    to the latents that are decoded, picture by picture; and from there by a second call of the
    UNet, of those rows alone. The layers of all three networks are computed again, not kept.

    Args:
        pipe: a pipeline of the Stable Diffusion 1, 2 or XL family.

    Source: Wang et al., InstantStyle-Plus, arXiv 2407.00788.
    """
    leader = _Leader(pipe, aim)
    unet = pipe.unet
    hooks = (
        unet.register_forward_pre_hook(leader.before, with_kwargs=True, prepend=True),
        unet.register_forward_hook(leader.after),
    )
    try:
        with lean(pipe, aim):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def lean(pipe: Any, aim: Aim) -> Iterator[None]:
    """Within: gradients through UNet, VAE and CSD keep little."""
    unet, vae = pipe.unet, pipe.vae
    layers = (*_layers(unet), *_layers(vae), *_blocks(aim.csd))
    with frozen(unet, vae, aim.csd), recomputed(layers):
        yield


class _Leader:
    """The hooks around a UNet's calls: note what it is asked, and lead what it answers."""

    def __init__(self, pipe: Any, aim: Aim):
        self.pipe, self.aim = pipe, aim
        self.schedule: Schedule = schedule_of(pipe)
        self.inputs: dict[str, Any] | None = None
        self.busy = False

    def before(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a style has changed the inputs."""
        if not self.busy:
            self.inputs = named(args, kwargs)

    def after(self, module: Any, args: Any, output: Any) -> Any:
        """The output with the guidance, in the kind of what the network predicts."""
        inputs = self.inputs
        if self.busy or inputs is None:
            return None
        first = output[0] if isinstance(output, tuple) else output.sample
        batch = first.shape[0]
        chunks = 2 if self.pipe.do_classifier_free_guidance else 1
        timestep = torch.as_tensor(inputs["timestep"]).reshape(-1)[0]
        alpha = max(self.schedule.alphas_cumprod[round(float(timestep))], MIN_ALPHA)
        self.busy = True
        try:
            mine = first_rows(inputs, batch, batch // chunks)
            change = guidance(
                self.pipe,
                self.aim,
                mine,
                first[: batch // chunks],
                alpha,
                self.schedule.prediction_type,
                unconditional=chunks > 1,
            )
        finally:
            self.busy = False
        result = first + torch.cat([change] * chunks).to(first.dtype)
        return (result, *output[1:]) if isinstance(output, tuple) else type(output)(sample=result)


def guidance(
    pipe: Any,
    aim: Aim,
    inputs: Mapping[str, Any],
    output: Tensor,
    alpha: float,
    kind: str = "epsilon",
    *,
    unconditional: bool = True,
) -> Tensor:
    """What one step's guidance adds to the network's output: see `led`.

    Args:
        inputs: of the UNet's call, by name; `sample` is [R, C, h, w].
        output: [R, C, h, w], what it predicts for them.
        alpha: the abar of the latents' noise level.
        kind: of what the network predicts: "epsilon", "v_prediction" or "sample".
        unconditional: whether the rows are the unconditional ones.
    """
    x = inputs["sample"].detach().float()

    def shown(x: Tensor, output: Tensor) -> Tensor:
        return blended(x, to_epsilon(output.float(), x, alpha, kind), alpha)

    pull = latent_gradient(pipe.vae, aim, shown(x, output))
    largest = pull.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)

    def denoise(x: Tensor) -> Tensor:
        given = {**inputs, "sample": x.to(output.dtype), "return_dict": False}
        found: Tensor = pipe.unet(**given)[0]
        return found

    timesteps = getattr(pipe.scheduler, "timesteps", None)
    with (
        differentiable(pipe, unconditional=unconditional, timesteps=timesteps),
        torch.enable_grad(),
    ):
        leaf = x.requires_grad_()
        # Scaled to 1: half precision would lose what is far below.
        (found,) = torch.autograd.grad(shown(leaf, denoise(leaf)), leaf, pull / largest)
    return as_prediction(math.sqrt(1 - alpha) * found * largest, alpha, kind)


def blended(x: Tensor, epsilon: Tensor, alpha: float) -> Tensor:
    """The latents that are compared: `s * x0 + (1 - s) * x`, s = sqrt(1 - alpha), with
    `x0 = (x - s * epsilon) / sqrt(alpha)`."""
    share = math.sqrt(1 - alpha)
    clean = (x - share * epsilon) / math.sqrt(alpha)
    return share * clean + (1 - share) * x


def latent_gradient(vae: Any, aim: Aim, latents: Tensor) -> Tensor:
    """The gradient of the aim's loss with respect to latents [R, C, h, w]; in fp32, one picture at
    a time."""
    found = []
    with in_fp32(vae), torch.enable_grad():
        for row in latents.detach().split(1):
            leaf = row.requires_grad_()
            pixels = vae.decode(unscaled(vae, leaf), return_dict=False)[0]
            found += torch.autograd.grad(aim.loss((pixels + 1) / 2), leaf)
    return torch.cat(found)


def as_prediction(change: Tensor, alpha: float, kind: str) -> Tensor:
    """What a change of the noise is as a change of the network's output."""
    if kind == "v_prediction":
        return change / math.sqrt(alpha)
    if kind == "sample":
        return -math.sqrt((1 - alpha) / alpha) * change
    return change


def first_rows(value: Any, batch: int, count: int) -> Any:
    """Every tensor with the rows of a batch cut to the first ones, wherever it is inside."""
    if isinstance(value, Tensor):
        return value[:count] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {name: first_rows(x, batch, count) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(first_rows(x, batch, count) for x in value)
    return value


@contextlib.contextmanager
def frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """Within: no gradients of parameters, and nothing kept for them."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def recomputed(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within: where gradients are asked for, a layer keeps its inputs alone and is computed again
    for them."""
    chosen = tuple(layers)
    before = [layer.__dict__.get("forward") for layer in chosen]
    for layer in chosen:
        layer.forward = _again(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(chosen, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (m for m in model.modules() if type(m).__name__ in LAYERS)


def _blocks(csd: CSD) -> Iterator[torch.nn.Module]:
    return csd.backbone.transformer["resblocks"].children()
