"""PuLID on FLUX against its forward written out, over whole runs."""

from __future__ import annotations

import checkpoints
import pulid_oracle
import pytest
import random_flux
import random_pipelines
import torch
from random_flux import relative, run
from safetensors.torch import save_file

from styleattn.adapters import load_pulid, save_identity
from styleattn.methods import METHODS, PuLIDFLUX
from styleattn.processors import apply, explain
from styleattn.references import Reference

torch.set_num_threads(1)
PROMPTS = ("a toy train", "a cat")
WIDTHS = {"face": 10, "vision": 12, "dim": 24, "queries": 6, "out": 20, "image": 32, "heads": 2}
TENSORS = checkpoints.noise(checkpoints.pulid(4, **WIDTHS))
M, E, N = 6, 20, 64


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pulid") / "pulid_flux.safetensors"
    save_file(TENSORS, path)
    return path


@pytest.fixture(scope="module")
def adapter(file):
    return load_pulid(file, double=3, single=5)


@pytest.fixture(scope="module")
def pipe():
    return random_flux.flux(num_layers=3, num_single_layers=5)


def person(seed, prompts=None):
    shape = (M, E) if prompts is None else (prompts, M, E)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ANN, BOB = person(1), person(2)


def method(adapter, *references, **knobs):
    return PuLIDFLUX(adapter=adapter, references=references, **knobs)


def expected(pipe, people, prompts=PROMPTS, **arguments):
    with pulid_oracle.instead(pipe, TENSORS, people) as calls, torch.no_grad():
        out = run(pipe, prompts, **arguments)
    assert len(calls) == arguments.get("steps", 3) * (2 if "true_cfg_scale" in arguments else 1)
    return out


def wide(tokens, rows=2):
    return tokens.expand(rows, -1, -1)


def test_every_step_is_the_formula(pipe, adapter):
    plain = run(pipe, PROMPTS)
    theirs = expected(pipe, lambda call, inputs: [(wide(ANN), 0.8)])
    with apply(pipe, method(adapter, Reference(embeds=ANN), id_weight=0.8)):
        ours = run(pipe, PROMPTS)
    assert relative(ours, theirs) <= 1e-5
    assert relative(ours, plain) > 1e-2
    assert torch.equal(run(pipe, PROMPTS), plain)


def test_the_unconditional_call_of_true_guidance_sees_nobody(pipe, adapter):
    """Nobody's tokens are not zero; the same weight and start step hold for them."""
    nobody = adapter.nobody()
    assert float(nobody.abs().min()) > 0

    def people(call, inputs):
        step, negative = divmod(call, 2)
        return [(wide(nobody if negative else ANN), 1.0)] if step >= 1 else []

    arguments = {"true_cfg_scale": 3.0, "negative_prompt": ["ugly", "dark"], "steps": 4}
    theirs = expected(pipe, people, **arguments)
    with apply(pipe, method(adapter, Reference(embeds=ANN), steps=(0.25, 1.0))):
        assert relative(run(pipe, PROMPTS, **arguments), theirs) <= 1e-5
    own = Reference(embeds=ANN, negative=torch.zeros(M, E))
    with apply(pipe, method(adapter, own, steps=(0.25, 1.0))):
        assert relative(run(pipe, PROMPTS, **arguments), theirs) > 1e-4


def test_fake_guidance_and_none(adapter):
    """A distilled guidance is a number that the model is told; schnell knows none."""
    for changes, arguments in (({}, {"guidance_scale": 7.0}), ({"guidance_embeds": False}, {})):
        pipe = random_flux.flux(num_layers=3, num_single_layers=5, **changes)
        theirs = expected(pipe, lambda call, inputs: [(wide(ANN), 1.0)], **arguments)
        with apply(pipe, method(adapter, Reference(embeds=ANN))):
            assert relative(run(pipe, PROMPTS, **arguments), theirs) <= 1e-5


def test_identities_with_masks_weights_and_steps(pipe, adapter):
    left = torch.zeros(8, 8)
    left[:, :3] = 1.0
    left[4, 4] = 0.25
    weights = [m.flatten()[:, None] for m in (left, 1 - left)]

    def people(call, inputs):
        ann = [(wide(ANN), 0.9 * weights[0])] if call < 2 else []
        return [*ann, (wide(BOB), 0.5 * weights[1])]

    pair = (
        Reference(embeds=ANN, weight=0.9, mask=left, steps=(0.0, 0.5)),
        Reference(embeds=BOB, weight=0.5, mask=1 - left),
    )
    theirs = expected(pipe, people, steps=4)
    with apply(pipe, method(adapter, *pair)):
        ours = run(pipe, PROMPTS, steps=4)
    assert relative(ours, theirs) <= 1e-5
    with apply(pipe, method(adapter, *reversed(pair))):
        assert relative(run(pipe, PROMPTS, steps=4), ours) <= 1e-5


def test_an_identity_for_every_prompt(pipe, adapter):
    both = torch.stack([ANN, BOB])
    rows = torch.stack([ANN, ANN, BOB, BOB])
    theirs = expected(pipe, lambda call, inputs: [(rows, 1.0)], num_images_per_prompt=2)
    chosen = (Reference(embeds=ANN, prompts=(0,)), Reference(embeds=BOB, prompts=(1,)))
    for references in ((Reference(embeds=both),), chosen):
        with apply(pipe, method(adapter, *references)):
            assert relative(run(pipe, PROMPTS, num_images_per_prompt=2), theirs) <= 1e-5
    wrong = pytest.raises(ValueError, match="identities of 2 prompts for 3 prompts")
    with apply(pipe, method(adapter, Reference(embeds=both))), wrong:
        run(pipe)


def test_no_weight_is_the_very_model(pipe, adapter):
    plain = run(pipe, PROMPTS)
    with apply(pipe, method(adapter, Reference(embeds=ANN, weight=0.0))):
        assert torch.equal(run(pipe, PROMPTS), plain)
    with apply(pipe, method(adapter, Reference(embeds=ANN), id_weight=0.0)):
        assert relative(run(pipe, PROMPTS), plain) <= 1e-6
    nowhere = Reference(embeds=ANN, mask=torch.zeros(4, 4))
    with apply(pipe, method(adapter, nowhere)):
        assert relative(run(pipe, PROMPTS), plain) <= 1e-6


def test_hooks_are_told_and_taken_out(pipe, adapter):
    hooks = {n: len(m._forward_hooks) for n, m in pipe.transformer.named_modules()}
    keys = list(pipe.transformer.state_dict())
    with apply(pipe, method(adapter, Reference(embeds=ANN), layers="transformer_blocks.2")):
        rows = [r for r in explain(pipe).rows if r.method]
        assert [(r.layer, r.processor) for r in rows] == [("transformer_blocks.2", "block hook")]
    with apply(pipe, method(adapter, Reference(embeds=ANN))) as handle:
        rows = [r for r in handle.explain().rows if r.method == "pulid_flux"]
        names = [f"{s}transformer_blocks.{i}" for s, i in (("", 0), ("", 2))]
        names += [f"single_transformer_blocks.{i}" for i in (0, 4)]
        assert [r.layer for r in rows] == names
        assert all(r.backend for r in rows)
        first = run(pipe, PROMPTS)
        with handle.paused():
            assert relative(run(pipe, PROMPTS), first) > 1e-2
    assert {n: len(m._forward_hooks) for n, m in pipe.transformer.named_modules()} == hooks
    assert list(pipe.transformer.state_dict()) == keys
    assert not hasattr(pipe.transformer, "_styleattn_controller")


def test_the_weight_changes_in_place(pipe, adapter):
    reference = Reference(embeds=ANN)
    theirs = expected(pipe, lambda call, inputs: [(wide(ANN), 0.3)])
    with apply(pipe, method(adapter, reference)) as handle:
        handle.update(method(adapter, reference, id_weight=0.3))
        assert relative(run(pipe, PROMPTS), theirs) <= 1e-5
        with pytest.raises(ValueError, match="numbers"):
            handle.update(method(adapter, Reference(embeds=BOB)))


def test_files(pipe, adapter, file, tmp_path):
    """The adapter and the identity by their files, face and vision or tokens."""
    face, vision = torch.randn(1, 10), [torch.randn(1, 7, 12) for _ in range(5)]
    with torch.no_grad():
        tokens = adapter.tokens(face, vision)
    save_identity(tmp_path / "face.safetensors", face, vision)
    save_identity(tmp_path / "tokens.safetensors", tokens=tokens[0])
    with apply(pipe, method(adapter, Reference(embeds=tokens))):
        ours = run(pipe, PROMPTS)
    for name in ("face", "tokens"):
        knobs = {"adapter": str(file), "identity": str(tmp_path / f"{name}.safetensors")}
        given = METHODS["pulid_flux"].from_dict(PuLIDFLUX(**knobs).to_dict())
        with apply(pipe, given):
            assert relative(run(pipe, PROMPTS), ours) <= 1e-6
    with pytest.raises(ValueError, match="face and 5 tensors vision, or tokens"):
        save_identity(tmp_path / "x.safetensors", face)


def test_a_picture_goes_through_the_analyser(pipe, adapter):
    from PIL import Image

    face, vision = torch.randn(1, 10), [torch.randn(1, 7, 12) for _ in range(5)]
    seen = []

    def faces(image):
        seen.append(image.shape)
        return face, vision

    with torch.no_grad():
        tokens = adapter.tokens(face, vision)
    with apply(pipe, method(adapter, Reference(embeds=tokens))):
        ours = run(pipe, PROMPTS)
    picture = Reference(image=Image.effect_noise((9, 7), 50).convert("RGB"))
    with apply(pipe, method(adapter, picture, faces=faces)):
        assert torch.equal(run(pipe, PROMPTS), ours)
    assert seen == [(7, 9, 3)]


def test_what_does_not_go_together_is_refused_whole(pipe, adapter):
    before = dict(pipe.transformer.attn_processors)
    picture = Reference(image="a.png")
    refused = [
        (PuLIDFLUX(adapter=adapter), "no identity"),
        (PuLIDFLUX(references=(Reference(embeds=ANN),)), "needs an adapter"),
        (method(adapter, Reference()), r"references\[0\] has no identity"),
        (method(adapter, picture), r"styleattn\[face\]"),
        (method(adapter, Reference(embeds=torch.randn(M, 7))), r"embeds must be \[M, 20\]"),
        (method(adapter, Reference(embeds=ANN, negative=torch.randn(3, E))), "negative must be"),
        (method(adapter, Reference(embeds=ANN), layers="up_blocks"), "up_blocks"),
        (method(torch.nn.Linear(1, 1), Reference(embeds=ANN)), "must be 'pulid-flux'"),
    ]
    for given, reason in refused:
        with pytest.raises(ValueError, match=reason):
            apply(pipe, given)
    with pytest.raises(ValueError, match="3 double and 2 single blocks want 3"):
        apply(random_flux.transformer(num_layers=3), method(adapter, Reference(embeds=ANN)))
    assert dict(pipe.transformer.attn_processors) == before
    assert not [r for r in explain(pipe).rows if r.method]
    with pytest.raises(ValueError, match=r"id_weight must be finite.*embeds must be \[M, C\]"):
        method(adapter, Reference(embeds=torch.ones(3)), id_weight=float("nan"))
    with pytest.raises(TypeError, match="does not work on a UNet2DConditionModel"):
        apply(random_pipelines.sdxl(), method(adapter, Reference(embeds=ANN)))
