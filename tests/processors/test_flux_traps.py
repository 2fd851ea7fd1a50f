"""What breaks attention processors on FLUX, one test each: adapters, fusing, LoRA, quantisation,
offload, sharded heads, backends."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import random_flux
import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from random_flux import (
    EACH,
    PROMPTS,
    TOKENS,
    load_ip_adapter,
    processors,
    relative,
    run,
)

from styleattn.methods import IPAdapter, Redux, StyleAligned
from styleattn.processors import apply, remove
from styleattn.processors._flux_attention import FluxStyleIPAdapterProcessor
from styleattn.references import Reference

torch.set_num_threads(1)
GUIDED = {"negative_prompt": ["ugly"] * 3, "true_cfg_scale": 2.0}
STYLE = StyleAligned(shared_score_shift=0.3)
REDUX = Redux(references=(Reference(embeds=TOKENS, weight=0.6),))


@pytest.fixture(scope="module")
def shared():
    return random_flux.flux()


@pytest.fixture
def pipe():
    return random_flux.flux()


@pytest.fixture(scope="module")
def xlabs(shared, tmp_path_factory):
    from safetensors.torch import save_file

    parts = random_flux.ip_adapter(shared.transformer)
    path = tmp_path_factory.mktemp("xlabs") / "adapter.safetensors"
    save_file({f"{part}.{n}": t for part, x in parts.items() for n, t in x.items()}, path)
    return path


def shown(path):
    """An adapter from a file, shown a picture."""
    picture = Reference(embeds=EACH[0, 0], negative=torch.zeros(32))
    return IPAdapter(adapter=path, references=(picture,))


# IP-Adapters that diffusers loads


EMBEDS = {"ip_adapter_image_embeds": [EACH[:1]]}
NEGATIVE = {"negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 32)]}
FAINT = StyleAligned(adain_queries=False, adain_keys=False, references=(Reference(weight=1e-30),))


def test_ip_adapter_before_or_after(pipe):
    """Loading makes processors anew: the style is there all the same, and so is the adapter."""
    other = random_flux.flux()
    apply(pipe, STYLE)
    plain = run(pipe)
    load_ip_adapter(pipe)
    load_ip_adapter(other)
    apply(other, STYLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        after, before = (run(p, **EMBEDS, **NEGATIVE) for p in (pipe, other))
    assert torch.equal(after, before)
    assert relative(after, plain) > 1e-3
    pipe.unload_ip_adapter()
    assert torch.equal(run(pipe), plain)
    remove(pipe)
    assert {type(p) for p in processors(pipe).values()} == {FluxAttnProcessor}


def test_ip_adapter_is_what_diffusers_makes_of_it(pipe):
    """Under a method that changes nothing, our call of the adapter equals theirs."""
    load_ip_adapter(pipe)
    loaded = processors(pipe)
    pipe.set_ip_adapter_scale([0.7, 0.4])
    expected = run(pipe, **EMBEDS, **NEGATIVE)
    assert relative(expected, run_without(pipe)) > 1e-3
    with apply(pipe, FAINT):
        assert relative(run(pipe, **EMBEDS, **NEGATIVE), expected) <= 1e-5
        pipe.set_ip_adapter_scale(0.0)
        nothing = run(pipe, **EMBEDS, **NEGATIVE)
        pipe.set_ip_adapter_scale([0.7, 0.4])
        assert relative(run(pipe, **EMBEDS, **NEGATIVE), expected) <= 1e-5
    assert relative(nothing, run_without(pipe)) <= 1e-5
    assert all(p is loaded[n] for n, p in processors(pipe).items())
    assert loaded["transformer_blocks.0.attn.processor"].scale == [0.7]


def run_without(pipe):
    pipe.set_ip_adapter_scale(0.0)
    out = run(pipe, **EMBEDS, **NEGATIVE)
    pipe.set_ip_adapter_scale([0.7, 0.4])
    return out


def test_ip_adapter_masks_are_honoured(pipe):
    """diffusers takes them and does nothing; under a style they act where they say."""
    load_ip_adapter(pipe)
    masks = {
        m: {"joint_attention_kwargs": {"ip_adapter_masks": [torch.full((1, 1, 4, 4), m)]}}
        for m in (0.0, 1.0)
    }
    both = {**EMBEDS, **NEGATIVE}
    expected = run(pipe, **both)
    assert torch.equal(run(pipe, **both, **masks[0.0]), expected)  # diffusers' fault, as it is
    with apply(pipe, FAINT):
        assert relative(run(pipe, **both, **masks[1.0]), expected) <= 1e-5
        nothing = run(pipe, **both, **masks[0.0])
        wrong = {"joint_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 4, 4)] * 2}}
        with pytest.raises(ValueError, match="2 ip_adapter_masks for 1"):
            run(pipe, **both, **wrong)
    assert relative(nothing, run_without(pipe)) <= 1e-5


def test_every_prompt_has_its_own_image(pipe):
    """diffusers shows every row all images; with a handle they go to their prompts."""
    load_ip_adapter(pipe)
    each = {"ip_adapter_image_embeds": [EACH]}
    with apply(pipe, StyleAligned(references=(Reference(weight=0.0),))):
        together = run(pipe, **each, **NEGATIVE)
        twice = run(pipe, PROMPTS, num_images_per_prompt=2, **each, **NEGATIVE)
        with pytest.raises(ValueError, match="image embeddings"):
            run(pipe, PROMPTS[:2], **each, **NEGATIVE)
    for i in range(3):
        one = {"ip_adapter_image_embeds": [EACH[i : i + 1]]}
        assert relative(together[i], run(pipe, **one, **NEGATIVE)[i]) <= 1e-5
        rows = run(pipe, num_images_per_prompt=2, **one, **NEGATIVE)
        assert relative(twice[2 * i + 1], rows[2 * i + 1]) <= 1e-5


def test_ip_adapter_weights_stay_modules(pipe):
    """Adapter weights stay registered: they are saved, moved and cast with the model."""
    load_ip_adapter(pipe)
    keys = list(pipe.transformer.state_dict())
    with apply(pipe, STYLE):
        assert sorted(pipe.transformer.state_dict()) == sorted(keys)
        found = pipe.transformer.transformer_blocks[0].attn.processor
        assert isinstance(found, (FluxStyleIPAdapterProcessor, FluxIPAdapterAttnProcessor))
        pipe.transformer.to(torch.float64)
        assert found.to_k_ip[0].weight.dtype == torch.float64
    pipe.transformer.to(torch.float32)


def test_ip_adapter_without_image_says_so(pipe):
    load_ip_adapter(pipe)
    with apply(pipe, STYLE), pytest.raises(ValueError, match="ip_adapter_image"):
        run(pipe)


def test_two_ip_adapters_with_scales_of_their_own(pipe):
    """A list per adapter, one number per double block: what diffusers writes on our stand-ins."""
    load_ip_adapter(pipe, seeds=(0, 1))
    scales = [[0.7, 0.0], [0.2, 0.9]]
    given = {"ip_adapter_image_embeds": [EACH[:1], EACH[1:2]]}
    given["negative_ip_adapter_image_embeds"] = [torch.zeros(1, 1, 32)] * 2
    pipe.set_ip_adapter_scale(scales)
    expected = run(pipe, **given)
    pipe.set_ip_adapter_scale([0.5, 0.5])
    assert relative(run(pipe, **given), expected) > 1e-3
    with apply(pipe, FAINT):
        pipe.set_ip_adapter_scale(scales)
        assert relative(run(pipe, **given), expected) <= 1e-5


# What diffusers does to processors


def test_processors_that_are_replaced(pipe):
    """The style is put back, and says so once; slicing is not FLUX's and changes nothing."""
    with apply(pipe, STYLE):
        expected = run(pipe)
        pipe.enable_attention_slicing()
        assert torch.equal(run(pipe), expected)
        pipe.disable_attention_slicing()
        pipe.transformer.set_attn_processor(FluxAttnProcessor())
        with pytest.warns(UserWarning, match="replaced by FluxAttnProcessor"):
            assert torch.equal(run(pipe), expected)


class Packed(torch.nn.Module):
    """Attention of another library: nunchaku's, for example."""

    def get_processor(self):
        return object()

    def set_processor(self, processor):
        raise AssertionError("touched")


def test_attention_of_other_libraries_is_refused_whole(pipe):
    before = processors(pipe)
    block = pipe.transformer.single_transformer_blocks[1]
    block.attn = Packed()
    with pytest.raises(TypeError, match="1 of its 4 attention layers are Packed"):
        apply(pipe, STYLE)
    kept = [n for n in before if not n.startswith("single_transformer_blocks.1")]
    assert all(processors(pipe)[n] is before[n] for n in kept)


# What diffusers does to projections


@pytest.mark.parametrize("order", ["fused first", "styled first"])
def test_fused_projections(pipe, order):
    with apply(pipe, STYLE):
        expected = run(pipe)
    if order == "fused first":
        pipe.transformer.fuse_qkv_projections()
    handle = apply(pipe, STYLE)
    if order == "styled first":
        pipe.transformer.fuse_qkv_projections()
    asked = []
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("to_qkv", "to_added_qkv")):
            module.register_forward_hook(lambda *_: asked.append(1))
    assert relative(run(pipe), expected) <= 1e-5
    assert len(asked) == 3 * 6  # both streams of two double blocks, two single blocks
    pipe.transformer.unfuse_qkv_projections()
    assert relative(run(pipe), expected) <= 1e-5
    handle.remove()


def test_lora_on_and_off_is_seen(pipe):
    from peft import LoraConfig

    with apply(pipe, STYLE):
        plain = run(pipe)
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "add_k_proj", "to_out.0", "to_add_out"]
    pipe.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    changed = run(pipe)
    with apply(pipe, FAINT):
        assert relative(run(pipe), changed) <= 1e-5
    with apply(pipe, STYLE):
        assert relative(run(pipe), plain) > 1e-3
        pipe.transformer.disable_adapters()
        assert relative(run(pipe), plain) <= 1e-5


def test_fusing_after_a_lora(pipe):
    """diffusers leaves the LoRA out then, as it does without us."""
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    pipe.transformer.add_adapter(config)
    with apply(pipe, FAINT):
        with_lora = run(pipe)
    pipe.transformer.fuse_qkv_projections()
    expected = run(pipe)
    assert relative(expected, with_lora) > 1e-3
    with apply(pipe, FAINT):
        assert relative(run(pipe), expected) <= 1e-5


class Quantised(torch.nn.Linear):
    """A linear layer that computes, and whose weight nobody may read, as torchao's and GGUF's."""

    def __init__(self, inner):
        torch.nn.Module.__init__(self)
        object.__setattr__(self, "inner", inner)

    @property
    def weight(self):
        raise NotImplementedError("a quantised weight was read")

    bias = weight

    def forward(self, x):
        return self.inner(x)


def test_weights_are_never_read(pipe, xlabs):
    methods = (STYLE, REDUX, shown(xlabs))
    with apply(pipe, *methods):
        expected = run(pipe)
    for module in list(pipe.transformer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and (name.startswith(("to_", "add_"))):
                setattr(module, name, Quantised(child))
    with apply(pipe, *methods):
        assert torch.equal(run(pipe), expected)


def test_layerwise_casting(pipe, xlabs):
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    plain = run(pipe)
    with apply(pipe, FAINT):
        assert relative(run(pipe), plain) <= 1e-5
    with apply(pipe, STYLE, REDUX, shown(xlabs)) as handle:
        assert relative(run(pipe), plain) > 1e-3
        (prompt,) = handle._controller.prompts.of[2]
        assert prompt.tokens.dtype == torch.float32  # its file is not read into the storage's type


@pytest.mark.parametrize("order", ["before", "after"])
def test_sequential_offload(pipe, order):
    from accelerate import cpu_offload

    with apply(pipe, STYLE, REDUX):
        expected = run(pipe)
    if order == "before":
        handle = apply(pipe, STYLE, REDUX)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    if order == "after":
        handle = apply(pipe, STYLE, REDUX)
    assert pipe.transformer.proj_out.weight.is_meta
    assert relative(run(pipe), expected) <= 1e-5
    assert "by device" in {r.backend for r in handle.explain().rows}
    handle.remove()


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offload(pipe, level, xlabs):
    methods = (STYLE, REDUX, shown(xlabs))
    with apply(pipe, *methods):
        expected = run(pipe)
    with apply(pipe, *methods):
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=level,
            num_blocks_per_group=1 if level == "block_level" else None,
        )
        assert relative(run(pipe), expected) <= 1e-5


def test_heads_that_are_sharded(pipe):
    """Tensor parallel: each rank has half the heads, the output projections add up."""
    x = random_flux.inputs(batch=3)
    attn = pipe.transformer.transformer_blocks[0].attn
    seen, rotary = [], pipe.transformer.pos_embed(torch.cat([x["txt_ids"], x["img_ids"]]))
    image, text = torch.randn(3, 12, 32), torch.randn(3, 7, 32)

    def of_layer(module, args, kwargs, output):
        inputs = {"image_rotary_emb": rotary, "encoder_hidden_states": text}
        seen.append(attn.processor(attn, image, **inputs))

    hook = pipe.transformer.x_embedder.register_forward_hook(of_layer, with_kwargs=True)
    with apply(pipe, STYLE), torch.no_grad():
        pipe.transformer(**x)
        columns = [
            getattr(attn, n)
            for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        ]
        rows = [attn.to_out[0], attn.to_add_out]
        whole = [(m.weight.data, m.bias.data) for m in (*columns, *rows)]
        for rank in (0, 1):
            half = slice(16 * rank, 16 * rank + 16)
            for m, (weight, bias) in zip((*columns, *rows), whole, strict=True):
                cut = m in columns
                m.weight.data = weight[half] if cut else weight[:, half]
                m.bias.data = bias[half] if cut else bias / 2
            kept, pipe.transformer.transformer_blocks[0].forward = (
                pipe.transformer.transformer_blocks[0].forward,
                lambda hidden_states, encoder_hidden_states, **_: (
                    encoder_hidden_states,
                    hidden_states,
                ),
            )
            pipe.transformer(**x)
            pipe.transformer.transformer_blocks[0].forward = kept
    hook.remove()
    for i in (0, 1):
        assert relative(seen[1][i] + seen[2][i], seen[0][i]) <= 1e-5


def halved(attn):
    """One of two ranks: half the heads of every projection."""
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        m = getattr(attn, name)
        m.weight.data, m.bias.data = m.weight.data[:16], m.bias.data[:16]
    for m in (attn.to_out[0], attn.to_add_out):
        m.weight.data = m.weight.data[:, :16]


def test_image_prompts_on_sharded_heads_are_refused(pipe, xlabs):
    """What they add is not split: said at once where diffusers tells, else at the first layer."""
    before = processors(pipe)
    pipe.transformer._parallel_config = SimpleNamespace(tensor_parallel_config=object())
    with pytest.raises(ValueError, match="do not go with tensor parallelism"):
        apply(pipe, shown(xlabs))
    assert processors(pipe) == before
    pipe.transformer._parallel_config = None
    halved(pipe.transformer.transformer_blocks[0].attn)
    words = r"blocks.0.attn: 2 heads of an image for 1 .* tensor parallelism"
    with apply(pipe, shown(xlabs)), pytest.raises(RuntimeError, match=words):
        run(pipe)
    load_ip_adapter(pipe)
    with apply(pipe, STYLE), pytest.raises(RuntimeError, match=words):
        run(pipe, **EMBEDS, **NEGATIVE)


def test_context_parallelism_is_refused_while_a_style_is_at_work(pipe):
    with apply(pipe, STYLE) as handle:
        for processor in processors(pipe).values():
            processor._parallel_config = object()
        with pytest.raises(RuntimeError, match="context parallelism"):
            run(pipe)
    assert all(p._parallel_config is not None for p in processors(pipe).values())
    assert not handle.active


def test_attention_backends_are_those_of_the_plain_processors(pipe):
    """What `set_attention_backend` writes while a style is on holds after it."""
    before = processors(pipe)
    with apply(pipe, STYLE):
        expected = run(pipe)
        pipe.transformer.set_attention_backend("_native_math")
        assert torch.equal(run(pipe), expected)  # styled layers run styleattn
    assert {p._attention_backend.value for p in before.values()} == {"_native_math"}
    pipe.transformer.reset_attention_backend()
    from diffusers.models import attention_dispatch as dispatcher

    dispatcher._AttentionBackendRegistry._active_backend = dispatcher.AttentionBackendName.NATIVE
