"""References from pictures on FLUX: a bank's rows next to the call's, against a loop of its own."""

from __future__ import annotations

import copy
import dataclasses

import flux_bank_oracles as oracle
import flux_oracles
import pytest
import random_flux
import random_pipelines
import torch
from peft import LoraConfig
from random_flux import relative
from torch._dynamo.testing import CompileCounter

from styleattn.inversion import FileRefused, Trajectory, flow_invert, flow_sample
from styleattn.methods import (
    AlignedGen,
    IPAdapter,
    Redux,
    ReferenceOnly,
    StyleAligned,
    StyleID,
    VisualStylePrompting,
)
from styleattn.processors import apply, remove
from styleattn.processors._caller import from_layout
from styleattn.processors.bank import build_bank, reference_callback
from styleattn.references import Reference, StyleBank

torch.set_num_threads(1)
TEXT, GRID, PROMPT, PROMPTS = 16, (8, 8), "a toy train", ("a cat", "a house on a hill")
OPTIONS = {"num_inference_steps": 3, "max_sequence_length": TEXT}
CLEAN = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def pipe():
    return random_flux.flux()


@pytest.fixture(scope="module")
def trajectories(pipe):
    return [
        flow_invert(pipe, z, p, **OPTIONS) for z, p in zip(CLEAN, (PROMPT, "a dog"), strict=True)
    ]


@pytest.fixture(scope="module")
def bank(pipe, trajectories):
    return build_bank(
        pipe, Reference(latents=trajectories[0]), StyleAligned(), max_sequence_length=16
    )


@pytest.fixture(scope="module")
def pair(pipe, trajectories):
    both = [Reference(latents=t) for t in trajectories]
    return build_bank(pipe, both, StyleAligned(), max_sequence_length=16)


def pictures(trajectories):
    return [(t.latents, t.prompt) for t in trajectories]


def run(pipe, prompts=PROMPTS, **arguments):
    return random_flux.run(pipe, prompts, **arguments)


MASK = (torch.arange(64) % 8 < 4).float().reshape(8, 8)
SHARE = MASK.flatten()
GUIDED = {"negative": ["ugly", "grey"], "scale": 2.0}
SINGLE = [
    ("style_aligned", StyleAligned(shared_score_shift=0.3), flux_oracles.style_aligned(shift=0.3)),
    ("aligned_gen", AlignedGen(), flux_oracles.aligned_gen(GRID)),
    ("swap", VisualStylePrompting(), oracle.Injection(oracle.swap, 1)),
    (
        "swap_half",
        VisualStylePrompting(layers=[1.0, 0.5, 0.0, 1.0]),
        None,
    ),
    (
        "swap_mask",
        VisualStylePrompting(layers="all", references=(Reference(mask=MASK),)),
        oracle.Injection(oracle.swap, 1, (0, 1, 2, 3), SHARE),
    ),
    (
        "swap_weight",
        VisualStylePrompting(references=(Reference(weight=0.4),)),
        oracle.Injection(oracle.swap, 1, share=0.4),
    ),
    (
        "reference_only",
        ReferenceOnly(style_fidelity=0.3),
        oracle.Injection(oracle.reference_only(0.3), 1, (0, 1, 2, 3)),
    ),
    (
        "reference_only_twice",
        ReferenceOnly(style_fidelity=1.0, references=(Reference(weight=2.0),)),
        oracle.Injection(oracle.reference_only(1.0, 2), 1, (0, 1, 2, 3)),
    ),
]


def halves(layer, *args):
    """Per-layer shares 1, 0.5, 0, 1."""
    edit = oracle.Injection(oracle.swap, 1, (0, 1, 2, 3), (1.0, 0.5, 0.0, 1.0)[layer])
    return edit(layer, *args)


@pytest.mark.parametrize("guided", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize(("name", "method", "edit"), SINGLE, ids=[n for n, *_ in SINGLE])
def test_one_reference_over_a_whole_run(pipe, bank, trajectories, name, method, edit, guided):
    """Every step, both calls of true guidance; the bank's rows are told their own prompts."""
    edit = halves if edit is None else edit
    expected = oracle.run(pipe, edit, pictures(trajectories[:1]), PROMPTS, **guided)
    arguments = (
        {"negative_prompt": guided["negative"], "true_cfg_scale": guided["scale"]} if guided else {}
    )
    plain = run(pipe, **arguments)
    with apply(pipe, method, bank=bank):
        got = run(pipe, **arguments)
    assert got.shape == plain.shape
    assert relative(got, expected) <= 1e-5
    assert relative(got, plain) > 1e-3
    assert torch.equal(run(pipe, **arguments), plain)


@pytest.mark.parametrize("gamma", [0.0, 0.75])
def test_content_and_style(pipe, pair, trajectories, gamma):
    edit = oracle.Injection(oracle.style_id(gamma, 1.5), 2)
    expected = oracle.run(pipe, edit, pictures(trajectories), PROMPTS[:1])
    with apply(pipe, StyleID(gamma=gamma), bank=pair):
        got = run(pipe, PROMPTS[:1])
    assert relative(got, expected) <= 1e-5
    with apply(
        pipe, StyleID(gamma=gamma, references=(Reference(weight=0.5), Reference())), bank=pair
    ):
        half = run(pipe, PROMPTS[:1])
    edit = oracle.Injection(oracle.style_id(gamma / 2, 1.5), 2)
    assert relative(half, oracle.run(pipe, edit, pictures(trajectories), PROMPTS[:1])) <= 1e-5


def test_a_mask_of_the_content(pipe, pair, trajectories):
    """A masked content keeps its query in one half of the picture only."""
    method = StyleID(references=(Reference(mask=MASK), Reference()))
    inside, outside = oracle.style_id(0.75), oracle.style_id(0.0)
    chosen = SHARE.reshape(1, -1, 1)

    def rule(*args):
        return chosen * inside(*args) + (1 - chosen) * outside(*args)

    expected = oracle.run(pipe, oracle.Injection(rule, 2), pictures(trajectories), PROMPTS[:1])
    with apply(pipe, method, bank=pair):
        assert relative(run(pipe, PROMPTS[:1]), expected) <= 1e-5


@pytest.mark.parametrize("method", [StyleAligned(), AlignedGen()], ids=lambda m: m.name)
def test_the_two_forms_agree(pipe, bank, trajectories, method):
    """A bank, and the reference as a row of the call that is put back after every step."""
    keep = reference_callback(trajectories[0], offset=0)
    noise = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    start = keep.initial(torch.cat([noise[:1], noise]))
    with apply(pipe, method):
        rows = pipe(
            [PROMPT, *PROMPTS],
            latents=start,
            height=16,
            width=16,
            output_type="latent",
            callback_on_step_end=keep,
            **OPTIONS,
        ).images
    with apply(pipe, method, bank=bank):
        assert relative(run(pipe), rows[1:]) <= 1e-6
    assert torch.equal(rows[0], pipe._pack_latents(trajectories[0].latents[-1:], 1, 1, 16, 16)[0])


@pytest.mark.parametrize("method", [StyleAligned(), AlignedGen()], ids=lambda m: m.name)
def test_several_references(pipe, bank, pair, method):
    """The second at weight 0 is as if it were not there; at equal weights order has no meaning."""
    first = dataclasses.replace(method, references=(Reference(), Reference(weight=0.0)))
    with apply(pipe, method, bank=bank):
        alone = run(pipe)
    with apply(pipe, first, bank=pair):
        assert relative(run(pipe), alone) <= 1e-5
    with apply(pipe, method, bank=pair):
        both = run(pipe)
    turned = dataclasses.replace(
        pair,
        latents=pair.latents.flip(0),
        conditions={n: x.flip(0) for n, x in pair.conditions.items()},
        references=pair.references[::-1],
    )
    with apply(pipe, method, bank=turned):
        assert relative(run(pipe), both) <= 1e-5
    assert relative(both, alone) > 1e-3


def test_several_images_of_a_prompt_and_odd_batches(pipe, bank, trajectories):
    edit = flux_oracles.style_aligned()
    for prompts, each in ((PROMPTS, 2), (("a", "b", "c"), 1), (("a",), 1)):
        expected = oracle.run(pipe, edit, pictures(trajectories[:1]), prompts, each=each)
        with apply(pipe, StyleAligned(), bank=bank):
            got = run(pipe, prompts, num_images_per_prompt=each)
        assert relative(got, expected) <= 1e-5


def test_steps_and_layers_of_references(pipe, bank):
    plain = run(pipe)
    late = StyleAligned(references=(Reference(steps=(0.5, 1.0)),))
    never = StyleAligned(references=(Reference(steps=(0.0, 0.0)),))
    part = StyleAligned(references=(Reference(layers="transformer_blocks.1"),))
    with apply(pipe, never, bank=bank):
        assert relative(run(pipe), plain) <= 1e-6
    with apply(pipe, StyleAligned(layers="transformer_blocks.1"), bank=bank):
        expected = run(pipe)
    with apply(pipe, part, bank=bank):
        assert relative(run(pipe), expected) <= 1e-6
    with apply(pipe, late, bank=bank):
        later = run(pipe)
    with apply(pipe, StyleAligned(), bank=bank):
        assert relative(run(pipe), later) > 1e-3 < relative(later, plain)


def test_with_redux(pipe, bank):
    """Tokens of a picture next to the text are the call's, not the references'."""
    redux = Redux(references=(Reference(embeds=random_flux.TOKENS, weight=0.6),))
    with apply(pipe, StyleAligned(), bank=bank):
        styled = run(pipe)
    with apply(pipe, redux):
        told = run(pipe)
    with apply(pipe, StyleAligned(), redux, bank=bank):
        both = run(pipe)
    assert relative(both, styled) > 1e-3 < relative(both, told)
    off = dataclasses.replace(
        redux, references=(dataclasses.replace(redux.references[0], weight=0.0),)
    )
    with apply(pipe, StyleAligned(), off, bank=bank):
        assert relative(run(pipe), styled) <= 1e-5
    one = dataclasses.replace(
        redux, references=(dataclasses.replace(redux.references[0], prompts=(1,)),)
    )
    with apply(pipe, StyleAligned(), one, bank=bank):
        mixed = run(pipe)
    assert relative(mixed[0], styled[0]) <= 1e-5 and relative(mixed[1], both[1]) <= 1e-5


def test_residuals_of_a_controlnet_pass_the_references_by(pipe, bank):
    """Called directly: zeros are put under the bank's rows, or the first image's."""
    sides = random_flux.inputs(2, TEXT, GRID)
    levels = bank.timesteps.float()
    sides["timestep"] = levels[1].expand(2) / 1000
    residuals = [torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    found = {}
    for control in (False, True):
        handle = apply(pipe, StyleAligned(control_reference=control), bank=bank)
        with handle, handle.layout(1, timesteps=levels), torch.no_grad():
            found[control] = pipe.transformer(
                **sides, controlnet_block_samples=residuals, return_dict=False
            )[0]
    assert found[False].shape == (2, 64, 4)
    assert relative(found[True], found[False]) > 1e-4


def test_from_pictures_and_prompts(pipe, tmp_path):
    """Built, saved, loaded, applied; the seed is that of what draws noise."""
    size = {"height": 16, "width": 16, **OPTIONS}
    references = [Reference(image=random_flux.PICTURE, prompt="x"), Reference(prompt="a dog")]
    made = build_bank(pipe, references, AlignedGen(), **size)
    assert made.latents.shape == (2, 4, 1, 16, 16) and made.offset == 0
    assert made.metadata["labels"] == ["flow", "flow"]
    assert made.metadata["guidance_scale"] == [1.0, 3.5]
    sampled = flow_sample(pipe, "a dog", seed=1, **size)
    assert torch.equal(made.latents[1], sampled.latents)
    made.save(tmp_path / "bank")
    loaded = StyleBank.load(tmp_path / "bank")
    with apply(pipe, AlignedGen(), bank=made):
        expected = run(pipe)
    with apply(pipe, AlignedGen(), bank=loaded):
        assert torch.equal(run(pipe), expected)
    (tmp_path / "short").write_bytes((tmp_path / "bank").read_bytes()[:500])
    with pytest.raises(FileRefused):
        StyleBank.load(tmp_path / "short")
    noised = [
        build_bank(pipe, references[0], ReferenceOnly(), inversion="noised", seed=s, **size).latents
        for s in (0, 0, 1)
    ]
    assert torch.equal(noised[0], noised[1]) and not torch.equal(noised[0], noised[2])


def test_a_call_that_the_bank_does_not_fit(pipe, bank):
    """All reasons at once, the model as it was after."""
    plain = run(pipe)
    with apply(pipe, StyleAligned(), bank=bank):
        with pytest.raises(ValueError, match=r"8 x 8 tokens, the call's image 16.*noise levels"):
            random_flux.run(pipe, PROMPTS, steps=5, size=8)
        with pytest.raises(ValueError, match=r"prompts have 16 tokens, the call's 12"):
            pipe(list(PROMPTS), height=16, width=16, max_sequence_length=12, num_inference_steps=3)
        with pytest.raises(ValueError, match="not those of a picture of 8 x 8"):
            pipe(list(PROMPTS), height=8, width=32, max_sequence_length=16, num_inference_steps=3)
        run(pipe)
    assert torch.equal(run(pipe), plain)


def test_banks_of_other_models_are_refused_whole(pipe, bank, trajectories):
    before = random_flux.processors(pipe)
    unet = random_pipelines.sd()
    of_unet = build_bank(unet, Reference(prompt="x"), StyleAligned(), num_inference_steps=2)
    changes = {
        "4 channels, the model 8": random_flux.flux(in_channels=8),
        "prompt_embeds are 32 wide, the model's 48": random_flux.flux(joint_attention_dim=48),
        "text_embeds are 32 wide, the model's 16": random_flux.flux(pooled_projection_dim=16),
    }
    for words, other in changes.items():
        with pytest.raises(ValueError, match=words):
            apply(other, StyleAligned(), bank=bank)
    with pytest.raises(ValueError, match=r"diffusion model.*16 channels.*lacks text_embeds"):
        apply(pipe, StyleAligned(), bank=of_unet)
    with pytest.raises(ValueError, match="2 references"):
        apply(pipe, StyleID(), bank=bank)
    with pytest.raises(ValueError, match="a bank is of no use"):
        apply(pipe, Redux(references=(Reference(embeds=random_flux.TOKENS),)), bank=bank)
    with pytest.raises(ValueError, match="made for another model"):
        apply(unet, StyleAligned(), bank=bank)
    assert random_flux.processors(pipe) == before


def test_it_knows_the_model_it_was_made_with(bank, tmp_path):
    """Another model of the same widths is refused; the same one in other clothes is not."""
    bank.save(tmp_path / "bank.safetensors")
    read = StyleBank.load(tmp_path / "bank.safetensors")
    tuned = random_flux.flux()
    with torch.no_grad():
        tuned.transformer.transformer_blocks[1].attn.norm_k.weight.mul_(1.1)
    others = {
        "guidance_embeds True, this model has False": random_flux.flux(guidance_embeds=False),
        "num_layers 2, this model has 1": random_flux.flux(num_layers=1),
        "other weights": tuned,
    }
    for words, other in others.items():
        before = random_flux.processors(other)
        with pytest.raises(ValueError, match=f"for another model: it was made .*{words}"):
            apply(other, StyleAligned(), bank=read)
        assert random_flux.processors(other) == before
    same = random_flux.flux()
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "x_embedder"])
    same.transformer.add_adapter(config)
    same.transformer.fuse_qkv_projections()
    same.transformer.to(torch.bfloat16)
    apply(same, StyleAligned(), bank=read).remove()
    offloaded = random_flux.flux()
    offloaded.transformer.to("meta")
    apply(offloaded, StyleAligned(), bank=read).remove()
    on_disk = random_flux.flux()
    on_disk.transformer.enable_group_offload(
        "cpu", offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    apply(on_disk, StyleAligned(), bank=read).remove()


def test_what_cannot_be_built(pipe, trajectories):
    wrong = [
        (TypeError, "style_aligned, .*aligned_gen", {"method": Redux(references=None)}),
        (TypeError, "needs a method", {"method": IPAdapter}),
        (ValueError, "labels are of DDIM", {"labels": "paper"}),
        (ValueError, "method must be one of", {"inversion": "ddim"}),
    ]
    for error, words, knobs in wrong:
        with pytest.raises(error, match=words):
            options = {"method": StyleAligned(), **OPTIONS, **knobs}
            build_bank(pipe, Reference(latents=CLEAN[0]), **options)
    with pytest.raises(ValueError, match="inversion = 'euler' is for FLUX"):
        unet = random_pipelines.sd()
        build_bank(unet, Reference(prompt="x"), StyleAligned(), inversion="euler")
    moved = dataclasses.replace(trajectories[0], timesteps=trajectories[0].timesteps * 0.9)
    with pytest.raises(ValueError, match="another scheduler"):
        build_bank(pipe, Reference(latents=moved), StyleAligned())
    steps = torch.tensor([900, 500, 100])
    other = Trajectory(torch.zeros(4, 1, 16, 16), steps, torch.ones(4).double(), "", 1.0, 16, 16)
    with pytest.raises(ValueError, match="not of a flow"):
        build_bank(pipe, Reference(latents=other), StyleAligned())


def test_with_images_of_a_loaded_adapter(trajectories, bank):
    """The references are shown no picture: as if their row were given zeros."""
    pipe = random_flux.flux()
    random_flux.load_ip_adapter(pipe)
    shown = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(2))
    keep = reference_callback(trajectories[0], offset=0)
    noise = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))

    def pictures(x):
        names = ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
        return {name: [x] for name in names}

    with apply(pipe, StyleAligned()):
        rows = pipe(
            [PROMPT, *PROMPTS],
            latents=keep.initial(torch.cat([noise[:1], noise])),
            height=16,
            width=16,
            output_type="latent",
            callback_on_step_end=keep,
            **OPTIONS,
            **pictures(torch.cat([shown[:1] * 0, shown])),
        ).images
    with apply(pipe, StyleAligned(), bank=bank):
        got = run(pipe, **pictures(shown))
        assert relative(got, rows[1:]) <= 1e-5
        assert relative(run(pipe, **pictures(shown * 0)), got) > 1e-3


METHODS = [
    (StyleAligned(), 1),
    (AlignedGen(), 1),
    (VisualStylePrompting(), 1),
    (ReferenceOnly(), 1),
    (StyleID(), 2),
]


@pytest.mark.parametrize(("method", "count"), METHODS, ids=[m.name for m, _ in METHODS])
def test_half_precision(pipe, bank, pair, method, count):
    """A style adds nothing of its own to what the rounding of the model costs."""
    made = bank if count == 1 else pair
    half = random_flux.flux().to(torch.bfloat16)
    costs = []
    for style in (False, True):
        found = []
        for one in (pipe, half):
            if style:
                apply(one, method, bank=made)
            found.append(run(one).float())
            remove(one)
        costs.append(relative(found[1], found[0]))
    assert costs[1] <= 1.5 * costs[0]


def test_copies(pipe, bank):
    """A copied model keeps its bank; the original's is untouched."""
    sides = random_flux.inputs(2, TEXT, GRID)
    levels = bank.timesteps.float()
    sides["timestep"] = levels[1].expand(2) / 1000
    with apply(pipe, StyleAligned(), bank=bank) as handle:
        with handle.layout(1, timesteps=levels), torch.no_grad():
            expected = pipe.transformer(**sides, return_dict=False)[0]
        twin = copy.deepcopy(pipe.transformer)
        other = twin._styleattn_controller
        assert other.bank_rows is not handle._controller.bank_rows
        with other.layout(from_layout(1, levels)), torch.no_grad():
            assert torch.equal(twin(**sides, return_dict=False)[0], expected)


def of_any_model(bank):
    """A bank that does not tell what it was made with."""
    return dataclasses.replace(bank, metadata={})


@pytest.mark.slow
@pytest.mark.parametrize(("method", "count"), METHODS[2:], ids=[m.name for m, _ in METHODS[2:]])
def test_compiled_blocks(bank, pair, method, count):
    """compile_repeated_blocks: one graph per kind of block over the steps."""
    pipe, counter = random_flux.flux(num_layers=1, num_single_layers=1), CompileCounter()
    torch._dynamo.reset()
    with apply(pipe, method, bank=of_any_model(bank if count == 1 else pair)):
        expected = run(pipe)
        for name in ("transformer_blocks", "single_transformer_blocks"):
            getattr(pipe.transformer, name)[0].compile(fullgraph=True, backend=counter)
        assert relative(run(pipe), expected) <= 1e-5
    assert counter.frame_count <= 4


@pytest.mark.slow
def test_compiled_whole(bank):
    """One graph over the steps, the bank's rows in it."""
    pipe, graphs = random_flux.flux(num_layers=1, num_single_layers=1), []

    def count(graph, inputs):
        graphs.append(len(graph.graph.nodes) > 60)
        return graph.forward

    torch._dynamo.reset()
    with apply(pipe, StyleAligned(), bank=of_any_model(bank)):
        expected = run(pipe)
        pipe.transformer = torch.compile(pipe.transformer, backend=count, fullgraph=True)
        assert relative(run(pipe), expected) <= 1e-5
    assert sum(graphs) == 1
