"""The name in diffusers' dispatcher and transformers' interface: stock outputs, and no trace."""

from __future__ import annotations

import pytest
import random_flux
import random_pipelines
import torch
import transformers
from diffusers.models import attention_dispatch as dispatcher
from diffusers.models.attention_dispatch import attention_backend
from torch.nn import functional as F
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import styleattn
from styleattn.processors import dispatch
from styleattn.processors.dispatch import plain_attention

torch.set_num_threads(1)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def state():
    """Everything that a registration touches."""
    names, registry = dispatcher.AttentionBackendName, dispatcher._AttentionBackendRegistry
    return (
        list(names),
        list(names._member_names_),
        sorted(names._value2member_map_),
        sorted(n for n in vars(names) if n.isupper()),
        set(registry._backends),
        set(registry._constraints),
        set(registry._supported_arg_names),
        registry._active_backend,
        set(AttentionInterface._global_mapping),
        set(AttentionMaskInterface._global_mapping),
    )


@pytest.fixture(autouse=True)
def nothing_remains():
    before = state()
    yield
    for registration in list(dispatch._registered.values()):
        registration.remove()
    assert state() == before


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the queries that reach our operation."""
    seen = []
    original = dispatch.attention

    def counting(query, *args, **kwargs):
        seen.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(dispatch, "attention", counting)
    return seen


@pytest.fixture(scope="module")
def flux():
    return random_flux.transformer()


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def test_flux_by_set_attention_backend(flux, calls):
    inputs = random_flux.inputs(batch=2)
    expected = run(flux, **inputs)
    with styleattn.register_backend() as registration:
        assert registration.active and registration.name == "styleattn"
        flux.set_attention_backend("styleattn")
        assert relative(run(flux, **inputs), expected) <= 1e-5
        assert calls == [(2, 2, 19, 16)] * 4
        flux.reset_attention_backend()  # leaves the process-wide default: the undoing must not
    calls.clear()
    assert torch.equal(run(flux, **inputs), expected) and not calls


def test_flux_by_context_manager(flux, calls):
    inputs = random_flux.inputs()
    expected = run(flux, **inputs)
    registration = styleattn.register_backend("house_attention")
    with attention_backend("house_attention"):
        assert relative(run(flux, **inputs), expected) <= 1e-5
    assert len(calls) == 4
    assert torch.equal(run(flux, **inputs), expected) and len(calls) == 4
    registration.remove()
    registration.remove()
    assert not registration.active
    with pytest.raises(ValueError), attention_backend("house_attention"):
        pass


def test_undoing_sets_models_free(flux):
    """Whoever still uses the name goes back to the default: diffusers and transformers alike."""
    inputs, encoder = random_flux.inputs(), random_flux.siglip()
    expected = run(flux, **inputs)
    with styleattn.register_backend():
        flux.set_attention_backend("styleattn")
        encoder.set_attn_implementation("styleattn")
    assert {p._attention_backend for p in flux.attn_processors.values()} == {None}
    assert encoder.config._attn_implementation == "sdpa"
    assert torch.equal(run(flux, **inputs), expected)
    with torch.no_grad():
        encoder(torch.zeros(1, 3, 32, 32))


def test_a_default_chosen_later_is_kept():
    registry, names = dispatcher._AttentionBackendRegistry, dispatcher.AttentionBackendName
    before = registry._active_backend
    with styleattn.register_backend():
        registry._active_backend = names.FLEX
    assert registry._active_backend is names.FLEX
    registry._active_backend = before


def test_registering_twice_is_registering_once():
    first = styleattn.register_backend()
    assert styleattn.register_backend() is first
    second = styleattn.register_backend("another")
    assert second is not first and second.active and first.active


@pytest.mark.parametrize("name", ["native", "sdpa", "my_sdpa", "Styleattn", "two words", "", None])
def test_names_that_are_refused(name):
    with pytest.raises(ValueError, match="register_backend"):
        styleattn.register_backend(name)


def encoders():
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, 6:] = 0
    text = {"input_ids": tokens, "attention_mask": padding}
    return {
        "siglip": (random_flux.siglip, {"pixel_values": pixels}, 2),
        "clip vision": (random_flux.clip_vision, {"pixel_values": pixels}, 2),
        "clip text": (random_pipelines.text_encoder, {"input_ids": tokens}, 0),
        "clip text padded": (random_pipelines.text_encoder, text, 0),
        "t5": (random_flux.t5, {"input_ids": tokens}, 0),
        "t5 padded": (random_flux.t5, text, 0),
        # before transformers 5, BERT has attention classes of its own
        "bert padded": (bert, text, 2 if int(transformers.__version__.split(".")[0]) >= 5 else 0),
    }


def bert():
    """An encoder without causality and position biases: its padding masks are one number per
    key."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    return BertModel(config).eval()


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
@pytest.mark.parametrize("which", list(encoders()))
def test_transformers(which, stock, calls):
    make, inputs, ours = encoders()[which]
    model = make()
    model.set_attn_implementation(stock)
    with torch.no_grad():
        expected = (
            model(**inputs).last_hidden_state if which != "clip vision" else model(**inputs)[0]
        )
        with styleattn.register_backend():
            model.set_attn_implementation("styleattn")
            got = model(**inputs)
    got = got[0] if which == "clip vision" else got.last_hidden_state
    seen = inputs.get("attention_mask", torch.ones(got.shape[:2])).bool() if got.ndim == 3 else ...
    assert relative(got[seen], expected[seen]) <= 1e-5
    assert len(calls) == ours  # layers that run here; the others run as under "sdpa"


MASKS = {
    "bool": lambda g: torch.rand(2, 1, 1, 11, generator=g) > 0.3,
    "bool one row": lambda g: torch.rand(1, 1, 1, 11, generator=g) > 0.3,
    "additive": lambda g: torch.randn(2, 1, 1, 11, generator=g),
    "two dims": lambda g: torch.rand(2, 11, generator=g) > 0.3,
    "expanded": lambda g: (torch.rand(2, 1, 1, 11, generator=g) > 0.3).expand(2, 4, 5, 11),
    "none": lambda g: None,
}


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kind", list(MASKS))
def test_it_takes_what_sdpa_takes(kind, scale):
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, n, 4, 8, generator=g).transpose(1, 2) for n in (5, 11, 11))
    k = k.transpose(2, 3).contiguous().transpose(2, 3)  # strides of any kind
    mask = MASKS[kind](g)
    wide = mask[:, None, None] if kind == "two dims" else mask
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=wide, scale=scale)
    got, lse = plain_attention(q, k, v, mask, scale=scale)
    assert relative(got, expected) <= 1e-5
    logits = q @ k.transpose(-1, -2) * (8**-0.5 if scale is None else scale)
    if wide is not None:
        logits = (
            logits.masked_fill(~wide, -torch.inf) if wide.dtype == torch.bool else logits + wide
        )
    assert relative(lse, logits.logsumexp(-1)) <= 1e-5


def test_grouped_heads():
    g = torch.Generator().manual_seed(2)
    q = torch.randn(2, 6, 5, 8, generator=g)
    k, v = (torch.randn(2, 2, 7, 8, generator=g) for _ in range(2))
    mask = torch.rand(2, 1, 1, 7, generator=g) > 0.2
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert relative(plain_attention(q, k, v, mask, grouped=True)[0], expected) <= 1e-5


def test_every_reason_at_once():
    q = torch.zeros(2, 4, 5, 8)
    with pytest.raises(styleattn.Unsupported) as error:
        plain_attention(
            q,
            q[:, :3],
            q[:, :3],
            torch.zeros(2, 4, 5, 5),
            dropout=0.1,
            causal=True,
            reasons=("context parallelism",),
        )
    for reason in ("parallel", "per head", "per query", "dropout 0.1", "causal", "4 query heads"):
        assert reason in str(error.value), reason


def test_dense_masks_in_diffusers_are_refused(flux):
    inputs = random_flux.inputs()
    dense = {"joint_attention_kwargs": {"attention_mask": torch.zeros(19, 19)}}
    refused = pytest.raises(styleattn.Unsupported, match="per query")
    with styleattn.register_backend(), attention_backend("styleattn"), refused:
        run(flux, **inputs, **dense)


def test_one_graph_under_a_compiler():
    from torch._dynamo.testing import CompileCounter

    flux = random_flux.transformer(num_layers=1, num_single_layers=1)
    inputs, counter = random_flux.inputs(), CompileCounter()
    expected = run(flux, **inputs)
    with styleattn.register_backend(), attention_backend("styleattn"):
        compiled = torch.compile(flux, backend=counter, fullgraph=True)
        for _ in range(2):
            assert relative(run(compiled, **inputs), expected) <= 1e-5
    assert counter.frame_count == 1
