"""The name `styleattn` in diffusers' attention dispatcher and in transformers' attention interface:
plain attention of whole models through this package, with no method applied."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models import attention_dispatch as dispatcher
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor

from styleattn.attention import attention
from styleattn.backends import Unsupported
from styleattn.branch import Branch, Segment
from styleattn.errors import describe

_NAMES: Any = dispatcher.AttentionBackendName
_REGISTRY: Any = dispatcher._AttentionBackendRegistry
_SPOKEN_FOR = ("eager", "sdpa", "flash", "flex", "paged")
"""Parts of names that transformers gives a meaning of its own."""

_registered: dict[str, Registration] = {}


class Registration:
    """A name at work in diffusers and transformers. Leave its `with` block, or call `remove`, to
    take it out."""

    def __init__(self, name: str):
        self.name = name
        self._default = _REGISTRY._active_backend
        self._member = _register_with_diffusers(name)
        _register_with_transformers(name)

    @property
    def active(self) -> bool:
        """Whether the name is still known."""
        return _registered.get(self.name) is self

    def remove(self) -> None:
        """Take the name out again; nothing if it is out.

        diffusers' process-wide default becomes what it was before the registration, where it is
        this name now. Attention modules that were set to it go back to the default, and
        transformers models to "sdpa".
        """
        if not self.active:
            return
        del _registered[self.name]
        for module in _attention_modules():
            if getattr(module.processor, "_attention_backend", None) is self._member:
                module.processor._attention_backend = None
        if _REGISTRY._active_backend is self._member:
            _REGISTRY._active_backend = self._default
        _take_out_of_diffusers(self._member)
        _take_out_of_transformers(self.name)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<styleattn.Registration {self.name}{'' if self.active else ', removed'}>"


def register_backend(name: str = "styleattn") -> Registration:
    """Make a name usable wherever diffusers and transformers let users choose their attention.

    In diffusers: `model.set_attention_backend(name)` and `attention_backend(name)`, for models that
    use the dispatcher (FLUX does, the UNets do not). It takes no mask, or one per key; masks per
    query or head, causality, dropout and context parallelism are refused, with every reason.

    In transformers: `model.set_attn_implementation(name)`. Padding masks become biases per key.
    What is per query or per head there (the causal masks of CLIP's text model, T5's position
    biases) and dropout in training stay with PyTorch's attention: such a layer runs as under
    "sdpa".

    Args:
        name: lower case. Registering it twice is registering it once.

    Returns:
        what takes it out again: `remove()`, or a `with` block.

    Raises:
        ValueError: a name that is not one, or that means something else already.
    """
    known = _registered.get(name) if isinstance(name, str) else None
    if known is not None:
        return known
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise ValueError(f"register_backend: name must be a lower-case identifier, got {name!r}")
    taken = {str(n.value) for n in _NAMES} | set(_transformers_names())
    if name in taken or any(word in name for word in _SPOKEN_FOR):
        raise ValueError(f"register_backend: {name!r} means something else already")
    _registered[name] = Registration(name)
    return _registered[name]


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
    reasons: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """What `torch.nn.functional.scaled_dot_product_attention` takes, through `styleattn.attention`.

    Args:
        query: [B, H, L, D]; key, value: [B, H, S, D], or fewer heads where `grouped`.
        mask: bool (True: seen) or additive; one number per key: [B or 1, 1, 1, S], [B, S], or
            expanded from those. Which shape is looked at, never the numbers.
        reasons: why the call is refused anyhow.

    Returns:
        out [B, H, L, D] and its log-sum-exp [B, H, L]. A row that sees no key gets zeros.

    Raises:
        Unsupported: with every reason at once.
    """
    refused = list(reasons)
    bias, why = per_key(mask, query, key)
    refused += why
    if dropout:
        refused.append(f"dropout {dropout}")
    if causal:
        refused.append("a causal mask has another bias per query")
    ratio, rest = divmod(query.shape[1], key.shape[1])
    if rest or (ratio != 1 and not grouped):
        refused.append(f"{query.shape[1]} query heads for {key.shape[1]} key heads")
    if refused:
        shapes = ", ".join(describe(t) for t in (query, key, value))
        lines = "".join(f"\n    {reason}" for reason in refused)
        raise Unsupported(f"styleattn cannot run this attention:{lines}\n  inputs: {shapes}")
    batch, heads, length, dim = query.shape
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if ratio != 1:  # the queries of a group are further queries of its head
        q = q.unflatten(1, (-1, ratio)).flatten(2, 3)
    segment = Segment(k, v, key_bias=bias)
    out, lse = attention(q, (Branch((segment,)),), softmax_scale=scale, return_lse=True)
    if ratio != 1:
        out = out.unflatten(2, (ratio, length)).reshape(batch, heads, length, dim)
    return out, lse[0].reshape(batch, heads, length)


def per_key(
    mask: Tensor | None, query: Tensor, key: Tensor
) -> tuple[Tensor | None, tuple[str, ...]]:
    """A mask as additive biases [S] or [B, S], or why it is not one."""
    if mask is None:
        return None, ()
    batch, length = query.shape[0], key.shape[2]
    if mask.ndim == 2 and tuple(mask.shape) == (batch, length) and query.shape[2] != batch:
        mask = mask[:, None, None]
    while mask.ndim < 4:
        mask = mask[None]
    reasons = []
    if mask.ndim != 4 or mask.shape[-1] != length or mask.shape[0] not in (1, batch):
        reasons.append(f"a mask {describe(mask)} for {batch} rows of {length} keys")
    for dim, what in ((1, "head"), (2, "query")):
        if mask.shape[dim] != 1 and mask.stride(dim) != 0:
            reasons.append(f"a mask per {what}: {describe(mask)}; a bias per key is what it takes")
    if reasons:
        return None, tuple(reasons)
    row = mask[:, 0, 0]
    if row.dtype == torch.bool:
        row = torch.zeros_like(row, dtype=torch.float32).masked_fill(~row, -torch.inf)
    return (row[0] if row.shape[0] == 1 else row), ()


def _for_diffusers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """diffusers' side: [B, S, H, D] in and out, the log-sum-exp [B, S, H]."""
    parallel = () if _parallel_config is None else ("context parallelism is not supported",)
    out, lse = plain_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask,
        dropout=dropout_p,
        causal=is_causal,
        scale=scale,
        grouped=enable_gqa,
        reasons=parallel,
    )
    return (out.transpose(1, 2), lse.transpose(1, 2)) if return_lse else out.transpose(1, 2)


def _register_with_diffusers(name: str) -> Any:
    """The dispatcher knows names by a closed Enum: a new member, made by hand."""
    member = str.__new__(_NAMES, name)
    member._name_, member._value_ = name.upper(), name
    member._sort_order_ = len(_NAMES._member_names_)
    _NAMES._member_names_.append(member._name_)
    _NAMES._member_map_[member._name_] = member
    _NAMES._value2member_map_[name] = member
    type.__setattr__(_NAMES, member._name_, member)
    _REGISTRY.register(member, constraints=[])(_for_diffusers)
    return member


def _take_out_of_diffusers(member: Any) -> None:
    for table in (_REGISTRY._backends, _REGISTRY._constraints, _REGISTRY._supported_arg_names):
        table.pop(member, None)
    _NAMES._member_names_.remove(member._name_)
    del _NAMES._member_map_[member._name_], _NAMES._value2member_map_[member._value_]
    type.__delattr__(_NAMES, member._name_)


def _attention_modules() -> list[Any]:
    """Every attention module of the process that chooses its backend."""
    return [o for o in gc.get_objects() if issubclass(type(o), AttentionModuleMixin)]


def _transformers_names() -> list[str]:
    if find_spec("transformers") is None:
        return []
    from transformers.modeling_utils import AttentionInterface

    return list(AttentionInterface._global_mapping)


def _register_with_transformers(name: str) -> None:
    if find_spec("transformers") is None:
        return
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(name, _for_transformers)
    AttentionMaskInterface.register(name, _mask_for_transformers)


def _take_out_of_transformers(name: str) -> None:
    if find_spec("transformers") is None:
        return
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    for found in [o for o in gc.get_objects() if issubclass(type(o), PreTrainedModel)]:
        if getattr(found.config, "_attn_implementation", None) == name:
            found.set_attn_implementation("sdpa")
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def _for_transformers(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' side: [B, H, S, D] in, [B, S, H, D] out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    declared: Any = getattr(module, "is_causal", True)
    causal = declared if is_causal is None else is_causal
    dense = (
        position_bias is not None
        or bool(per_key(attention_mask, query, key)[1])
        or (causal and attention_mask is None and query.shape[2] > 1)
    )
    if dense or dropout or value.shape[-1] != key.shape[-1] or others.get("cache") is not None:
        given = {} if position_bias is None else {"position_bias": position_bias}
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **given,
            **others,
        )
        return out
    mixed, _ = plain_attention(query, key, value, attention_mask, scale=scaling, grouped=True)
    return mixed.transpose(1, 2).contiguous(), None


def _mask_for_transformers(*args: Any, **kwargs: Any) -> Any:
    """transformers' mask for its SDPA; a padding mask stays one number per key."""
    from transformers import masking_utils

    everything = getattr(masking_utils, "bidirectional_mask_function", None)
    chosen = kwargs.get("mask_function")
    if not args and chosen is not None and chosen is everything and "q_length" in kwargs:
        kwargs["q_length"] = 1
    return masking_utils.sdpa_mask(*args, **kwargs)
