"""USO's style pictures on FLUX: tokens that enter behind the text embedder."""

from __future__ import annotations

import copy

import checkpoints
import flux_oracles
import pytest
import random_flux
import torch
from peft import LoraConfig
from random_flux import TOKENS, relative, run
from safetensors.torch import save_file

from styleattn.adapters import load_uso
from styleattn.errors import Invalid
from styleattn.methods import USO, AlignedGen, InContext, Redux, StyleAligned
from styleattn.processors import apply
from styleattn.processors.bank import build_bank
from styleattn.references import Reference

torch.set_num_threads(1)
T, N = 16, 64
A = 2 * torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
B = 2 * torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
CFG = {"negative_prompt": ["ugly"] * 3, "true_cfg_scale": 2.0}


@pytest.fixture(scope="module")
def pipe():
    return random_flux.flux()


def biased(bias):
    def edit(layer, q, k, v, rotary, text):
        return flux_oracles.turn(q, rotary), flux_oracles.turn(k, rotary), v, bias

    return edit


def written_out(pipe, pictures, bias=None, **arguments):
    """The embedder's output before which the pictures stand, as the authors have it; the bias is
    for pictures, text, image in this order."""
    model, count = pipe.transformer, sum(map(len, pictures))

    def prepended(module, args, output):
        wide = [p.expand(len(output), -1, -1) for p in pictures]
        return torch.cat([*wide, output], 1)

    def longer(module, args, kwargs):
        ids = kwargs["txt_ids"]
        return args, {**kwargs, "txt_ids": torch.cat([ids.new_zeros(count, 3), ids])}

    hooks = [
        model.context_embedder.register_forward_hook(prepended),
        model.register_forward_pre_hook(longer, with_kwargs=True),
    ]
    total = count + T + N
    bias = torch.zeros(total, total) if bias is None else bias
    try:
        with flux_oracles.densely(model, biased(bias), count + T):
            return run(pipe, **arguments)
    finally:
        for hook in hooks:
            hook.remove()


def test_it_is_the_authors_sequence(pipe):
    expected = written_out(pipe, [A, B])
    with apply(pipe, USO(references=(Reference(embeds=A), Reference(embeds=B)))):
        got = run(pipe)
    assert relative(got, expected) <= 1e-5
    assert relative(got, run(pipe)) > 1e-3


def test_strengths_and_masks(pipe):
    mask = (torch.arange(8) < 4).float().expand(8, 8)
    method = USO(strength=0.5, references=(Reference(embeds=A, weight=0.6, mask=mask),))
    bias = torch.zeros(9 + T + N, 9 + T + N)
    bias[9 : 9 + T, :9] = torch.tensor(0.3 * 0.5).log()
    bias[9 + T :, :9] = (0.3 * mask.flatten()).log()[:, None]
    expected = written_out(pipe, [A], bias)
    with apply(pipe, method):
        assert relative(run(pipe), expected) <= 1e-5


def test_true_guidance_and_steps(pipe):
    """The unconditional call has none, nor have steps outside the range."""
    lengths = []

    def noted(module, args, output):
        lengths.append(output.shape[1])

    hook = pipe.transformer.context_embedder.register_forward_hook(noted)
    with apply(pipe, USO(references=(Reference(embeds=A, steps=(0.0, 0.5)),))):
        got = run(pipe, steps=2, **CFG)
    hook.remove()
    assert lengths == [T + 9, T, T, T]
    assert relative(got, run(pipe, steps=2, **CFG)) > 1e-3


def test_without_weight_it_is_the_very_model(pipe):
    plain = run(pipe)
    with apply(pipe, USO(references=(Reference(embeds=A, weight=0.0),))):
        assert torch.equal(run(pipe), plain)
    with apply(pipe, USO(references=(Reference(embeds=A),), strength=0.0)):
        assert relative(run(pipe), plain) <= 1e-5
    assert not pipe.transformer.context_embedder._forward_hooks


def test_a_picture_per_prompt_and_for_some(pipe):
    both = torch.stack([A, A + 1, A - 1])
    with apply(pipe, USO(references=(Reference(embeds=both),))):
        together = run(pipe)
    for i, tokens in enumerate(both):
        with apply(pipe, USO(references=(Reference(embeds=tokens, prompts=(i,)),))):
            alone = run(pipe)
        assert relative(alone[i], together[i]) <= 1e-5
        assert relative(alone[(i + 1) % 3], together[(i + 1) % 3]) > 1e-3


def test_next_to_others(pipe):
    """Redux' tokens, pictures in context and a bank's rows; in either order."""
    uso = USO(references=(Reference(embeds=A),))
    redux = Redux(references=(Reference(embeds=TOKENS, weight=0.6),))
    clean = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(4))
    context = InContext(references=(Reference(latents=clean),), positions="diagonal")
    told = {"num_inference_steps": 3, "max_sequence_length": T}
    bank = build_bank(pipe, Reference(latents=clean), StyleAligned(), **told)
    for methods, rows in (([redux], None), ([context], None), ([AlignedGen()], bank)):
        with apply(pipe, uso, *methods, bank=rows):
            first = run(pipe)
        with apply(pipe, *methods, uso, bank=rows):
            assert relative(run(pipe), first) <= 1e-5
        with apply(pipe, *methods, bank=rows):
            assert relative(run(pipe), first) > 1e-3


def test_a_lora_on_the_embedder_loaded_later():
    """It sees the text, not the tokens."""
    pipe = random_flux.flux()
    with apply(pipe, USO(references=(Reference(embeds=A),))):
        torch.manual_seed(0)
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["context_embedder"])
        pipe.transformer.add_adapter(config)
        got = run(pipe)
    expected = written_out(pipe, [A])
    assert relative(got, expected) <= 1e-5


def test_copies_keep_their_own_tokens(pipe):
    x = random_flux.inputs()
    with apply(pipe, USO(references=(Reference(embeds=A),))), torch.no_grad():
        expected = pipe.transformer(**x, return_dict=False)[0]
        twin = copy.deepcopy(pipe.transformer)
        assert torch.equal(twin(**x, return_dict=False)[0], expected)
    with torch.no_grad():
        assert torch.equal(twin(**x, return_dict=False)[0], expected)


def test_from_a_picture(pipe, tmp_path):
    """SigLIP's states -2, -11, -20; each level's tokens by its own three layers."""
    tensors = checkpoints.noise(checkpoints.uso(32, 16, 3, 32))
    save_file(tensors, tmp_path / "uso.safetensors")
    tower = random_flux.siglip(num_hidden_layers=20)
    tower.save_pretrained(tmp_path / "siglip")
    from transformers import SiglipImageProcessor

    pixels = SiglipImageProcessor(size={"height": 32, "width": 32})
    shown = pixels(random_flux.PICTURE, return_tensors="pt").pixel_values
    with torch.no_grad():
        states = tower(shown, output_hidden_states=True).hidden_states
    tokens = []
    for level, state in (("high", -2), ("mid", -11), ("low", -20)):
        stem = f"feature_embedder.{level}_"
        w = {k.removeprefix(stem): v for k, v in tensors.items() if k.startswith(stem)}
        x = w["embedding_linear.0.weight"] @ states[state][0]
        x = torch.nn.functional.silu(x + w["embedding_linear.0.bias"][:, None])
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-5).sqrt()
        x = x * w["layer_norm.weight"] + w["layer_norm.bias"]
        tokens.append(x @ w["projection.weight"].T + w["projection.bias"])
    expected = written_out(pipe, [torch.cat(tokens)])
    files = {"adapter": tmp_path / "uso.safetensors", "image_encoder": tmp_path / "siglip"}
    with apply(pipe, USO(references=(Reference(image=random_flux.PICTURE),), **files)):
        assert relative(run(pipe), expected) <= 1e-5
    levels = torch.stack([states[i][0] for i in (-2, -11, -20)])
    adapter = load_uso(tmp_path / "uso.safetensors")
    with apply(pipe, USO(references=(Reference(embeds=levels),), adapter=adapter)):
        assert relative(run(pipe), expected) <= 1e-5
    with pytest.raises(Invalid, match="hidden states -2, -11 and -20"):
        adapter.tokens(levels[:2][None])
    random_flux.siglip().save_pretrained(tmp_path / "shallow")
    files["image_encoder"] = tmp_path / "shallow"
    with pytest.raises(ValueError, match=r"levels output .* has none"):
        apply(pipe, USO(references=(Reference(image=random_flux.PICTURE),), **files))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"references": (Reference(embeds=A[None, None]),)}, r"\[M, C\] or \[P, M, C\]"),
        ({"references": (Reference(image="a.png"),)}, "needs an adapter"),
        ({"strength": -1.0}, "must not be negative"),
    ],
)
def test_bad_knobs(bad, words):
    with pytest.raises(ValueError, match=words):
        USO(**bad)


def test_tokens_of_another_width_are_refused_whole(pipe):
    before = random_flux.processors(pipe)
    with pytest.raises(ValueError, match="24 wide, the model's embedded prompts 32"):
        apply(pipe, USO(references=(Reference(embeds=torch.randn(3, 24)),)))
    assert random_flux.processors(pipe) == before
