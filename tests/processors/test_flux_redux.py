"""Redux on FLUX against the stock transformer with a dense mask, over whole runs."""

from __future__ import annotations

import math

import pytest
import random_flux
import torch
from random_flux import relative, run

from styleattn.methods import AlignedGen, Redux, StyleAligned
from styleattn.processors import apply
from styleattn.references import Reference

torch.set_num_threads(1)
T, M, N = 16, 9, 64
PROMPTS = ("a toy train", "a cat")


@pytest.fixture(scope="module")
def pipe():
    return random_flux.flux()


def picture(seed, tokens=M, prompts=None):
    shape = (tokens, 32) if prompts is None else (prompts, tokens, 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


A, B = picture(1), picture(2)


def stock(pipe, pictures, bias=None, prompts=PROMPTS, **arguments):
    """The stock pipeline with the pictures' tokens behind the prompt's, and a dense bias [S, S] or
    [B, 1, S, S]."""
    text, pooled, _ = pipe.encode_prompt(list(prompts), None, max_sequence_length=T)
    wide = [p.expand(len(prompts), -1, -1) for p in pictures]
    mask = {} if bias is None else {"joint_attention_kwargs": {"attention_mask": bias}}
    return run(
        pipe,
        None,
        prompt_embeds=torch.cat([text, *wide], 1),
        pooled_prompt_embeds=pooled,
        **mask,
        **arguments,
    )


def table(strengths, lengths=None, own=False):
    """log s on the columns of every picture, for all rows but its own."""
    lengths = lengths or [M] * len(strengths)
    total = T + sum(lengths) + N
    bias, start = torch.zeros(total, total), T
    for s, length in zip(strengths, lengths, strict=True):
        columns = slice(start, start + length)
        bias[:, columns] = math.log(s) if s else -math.inf
        if not own:
            bias[columns, columns] = 0.0
        start += length
    return bias


def refs(*weights, **more):
    return tuple(
        Reference(embeds=x, weight=w, **more) for x, w in zip((A, B), weights, strict=False)
    )


def test_strength_one_is_the_stock_model(pipe):
    expected = stock(pipe, [A])
    with apply(pipe, Redux(references=refs(1.0))):
        got = run(pipe, PROMPTS)
    assert relative(got, expected) <= 1e-5
    assert relative(got, run(pipe, PROMPTS)) > 1e-3


@pytest.mark.parametrize("strength", [0.2, 3.0])
def test_strength_as_a_bias_between_segments(pipe, strength):
    expected = stock(pipe, [A], table([strength]))
    with apply(pipe, Redux(references=refs(strength))):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5
    with apply(pipe, Redux(references=refs(1.0), strength=strength)):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5


def test_strength_as_a_bias_per_key(pipe):
    expected = stock(pipe, [A], table([0.3], own=True))
    with apply(pipe, Redux(references=refs(0.3), strength_by="key_bias")):
        got = run(pipe, PROMPTS)
    assert relative(got, expected) <= 1e-5
    assert relative(got, stock(pipe, [A], table([0.3]))) > 1e-4  # not the same as between segments


def test_strength_by_the_tokens(pipe):
    expected = stock(pipe, [0.3 * A])
    with apply(pipe, Redux(references=refs(0.3), strength_by="tokens")):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5


def test_two_pictures_with_weights(pipe):
    expected = stock(pipe, [A, B], table([0.6, 0.3]))
    with apply(pipe, Redux(references=refs(0.6, 0.3))):
        got = run(pipe, PROMPTS)
    assert relative(got, expected) <= 1e-5
    swapped = tuple(reversed(refs(0.6, 0.3)))
    with apply(pipe, Redux(references=swapped)):
        assert relative(run(pipe, PROMPTS), got) <= 1e-5  # weights go with their pictures


@pytest.mark.parametrize("strength_by", ["bias", "key_bias", "tokens"])
def test_weights_one_and_zero_are_the_first_picture_alone(pipe, strength_by):
    with apply(pipe, Redux(references=refs(1.0), strength_by=strength_by)):
        expected = run(pipe, PROMPTS)
    with apply(pipe, Redux(references=refs(1.0, 0.0), strength_by=strength_by)):
        assert torch.equal(run(pipe, PROMPTS), expected)


def test_no_weight_is_the_very_model(pipe):
    expected = run(pipe, PROMPTS)
    with apply(pipe, Redux(references=refs(0.0, 0.0))):
        assert torch.equal(run(pipe, PROMPTS), expected)
    with apply(pipe, Redux(references=refs(1.0), strength=0.0)):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5


def test_a_mask_of_zeros_is_the_untouched_model(pipe):
    expected = run(pipe, PROMPTS)
    with apply(pipe, Redux(references=refs(1.0, mask=torch.zeros(5, 3)))):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5


def test_a_mask_of_ones_is_no_mask(pipe):
    expected = stock(pipe, [A])
    with apply(pipe, Redux(references=refs(1.0, mask=torch.ones(5, 3)))):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5


def test_masks_act_where_the_image_tokens_are(pipe):
    left = torch.zeros(8, 8)
    left[:, :3] = 1.0
    left[2, 5] = 0.25
    bias = table([0.8, 0.5])
    for start, mask in ((T, left), (T + M, 1 - left)):
        columns = slice(start, start + M)
        keep = bias[columns, columns].clone()
        bias[: T + 2 * M, columns] += mask.mean().log()
        bias[T + 2 * M :, columns] += mask.flatten().log()[:, None]
        bias[columns, columns] = keep
    expected = stock(pipe, [A, B], bias)
    pair = (
        Reference(embeds=A, weight=0.8, mask=left),
        Reference(embeds=B, weight=0.5, mask=1 - left),
    )
    with apply(pipe, Redux(references=pair)):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5


def test_step_ranges(pipe):
    """A for the first half of four steps, B for the second: tokens come and go."""
    pair = (
        Reference(embeds=A, steps=(0.0, 0.5)),
        Reference(embeds=B, weight=0.4, steps=(0.5, 1.0)),
    )
    calls = []
    plain = pipe.transformer.forward

    def by_step(**inputs):
        first = len(calls) < 2
        calls.append(1)
        tokens = (A if first else B).expand(2, -1, -1)
        text = torch.cat([inputs["encoder_hidden_states"], tokens], 1)
        ids = torch.zeros(T + M, 3)
        mask = {"attention_mask": table([1.0 if first else 0.4])}
        more = {"encoder_hidden_states": text, "txt_ids": ids, "joint_attention_kwargs": mask}
        return plain(**{**inputs, **more})

    pipe.transformer.forward = by_step
    try:
        expected = run(pipe, PROMPTS, steps=4)
    finally:
        del pipe.transformer.forward
    with apply(pipe, Redux(references=pair)):
        assert relative(run(pipe, PROMPTS, steps=4), expected) <= 1e-5


def test_layers_that_are_not_chosen_do_not_see_the_picture(pipe):
    """Its tokens are there, and removed: as with a mask in those layers only."""
    seen, hidden = table([1.0]), table([0.0])
    calls = []
    layers = [m.attn for m in pipe.transformer.single_transformer_blocks]

    def hide(module, args, kwargs):
        calls.append(1)
        return args, {**kwargs, "attention_mask": hidden}

    hooks = [a.register_forward_pre_hook(hide, with_kwargs=True) for a in layers]
    expected = stock(pipe, [A], seen)
    for hook in hooks:
        hook.remove()
    assert calls
    with apply(pipe, Redux(references=refs(1.0), layers="transformer_blocks")):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5
    with apply(pipe, Redux(references=refs(1.0, layers="transformer_blocks"))):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5


def test_a_picture_per_prompt(pipe):
    """[P, M, C] embeddings, several images each: every prompt as if it were alone."""
    each = picture(3, prompts=2)
    with apply(pipe, Redux(references=(Reference(embeds=each, weight=0.5),))):
        together = run(pipe, PROMPTS, num_images_per_prompt=2)
    text, pooled, _ = pipe.encode_prompt(list(PROMPTS), None, max_sequence_length=T)
    more = {"joint_attention_kwargs": {"attention_mask": table([0.5])}}
    both = torch.cat([text, each], 1).repeat_interleave(2, 0)
    pooled = pooled.repeat_interleave(2, 0)
    expected = run(pipe, None, prompt_embeds=both, pooled_prompt_embeds=pooled, **more)
    assert relative(together, expected) <= 1e-5
    three = Redux(references=(Reference(embeds=picture(3, prompts=3)),))
    with apply(pipe, three), pytest.raises(ValueError, match="3 pictures for 2 prompts"):
        run(pipe, PROMPTS)


def test_pictures_for_some_prompts_only(pipe):
    """`prompts` chooses who sees a picture: here the second prompt sees A, the first none."""
    with apply(pipe, Redux(references=refs(0.7, prompts=(1,)))):
        got = run(pipe, PROMPTS)
    assert relative(got[:1], run(pipe, PROMPTS)[:1]) <= 1e-5
    assert relative(got[1:], stock(pipe, [A], table([0.7]))[1:]) <= 1e-5


def test_a_picture_that_no_prompt_sees(pipe):
    """Prompts are counted from 0: the second of two is not prompt 2."""
    said = r"references\[0\] of redux is for prompts \(2,\), counted from 0, and the call has 2"
    with apply(pipe, Redux(references=refs(0.7, prompts=(2,)))), pytest.warns(match=said):
        got = run(pipe, PROMPTS)
    assert relative(got, run(pipe, PROMPTS)) <= 1e-5


def test_the_unconditional_call_has_no_pictures(pipe):
    guided = {"negative_prompt": ["ugly", "grey"], "true_cfg_scale": 2.0}
    lengths = []

    def watch(module, args, kwargs):
        lengths.append(kwargs["encoder_hidden_states"].shape[1])

    with apply(pipe, Redux(references=refs(1.0))):
        hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
            watch, with_kwargs=True
        )
        got = run(pipe, PROMPTS, steps=2, **guided)
        hook.remove()
    assert lengths == [T + M, T] * 2
    assert relative(got, run(pipe, PROMPTS, steps=2, **guided)) > 1e-3


@pytest.mark.parametrize("guided", [{}, {"negative_prompt": ["ugly"] * 2, "true_cfg_scale": 2.0}])
def test_prompts_of_zeros(pipe, guided):
    """What zeros give that are handed in; an empty prompt is another thing; the negative prompt
    stays."""
    method = Redux(references=refs(0.6), zero_prompt=True)
    zeros = {"prompt_embeds": torch.zeros(2, T, 32), "pooled_prompt_embeds": torch.zeros(2, 32)}
    with apply(pipe, Redux(references=refs(0.6))):
        expected = run(pipe, None, **zeros, **guided)
        empty = run(pipe, ("", ""), **guided)
    with apply(pipe, method):
        got = run(pipe, PROMPTS, **guided)
    assert relative(got, expected) <= 1e-5
    assert relative(got, empty) > 1e-3


def test_restyling():
    found = Redux.restyling(references=refs(1.0), downsample=3)
    assert (found.strength, found.strength_by, found.downsample) == (0.1, "bias", 3)
    for bad in ({"image_prompt_strength": 1.5}, {"image_prompt_strength": True}):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            Redux.restyling(**bad)
    with pytest.raises(ValueError, match="strength, zero_prompt have no place"):
        Redux.restyling(strength=1.0, zero_prompt=True)


@pytest.mark.parametrize(
    ("by", "factor", "side"), [("mixed", 2, 3), ("mixed", 3, 2), ("mixed", 4, 1), ("area", 4, 2)]
)
def test_smaller_grids(pipe, by, factor, side):
    tokens = picture(4, tokens=49)
    grid = tokens.T.reshape(1, 32, 7, 7)
    mode = "area" if by == "area" or factor == 3 else "bicubic"
    small = torch.nn.functional.interpolate(grid, (side, side), mode=mode)
    expected = stock(pipe, [small[0].flatten(1).T], table([0.6], [side * side]))
    method = Redux(
        references=(Reference(embeds=tokens, weight=0.6),), downsample=factor, downsample_by=by
    )
    with apply(pipe, method):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """diffusers' image embedder and SigLIP, and the files of both."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("redux")
    ours, tower = ReduxImageEncoder(redux_dim=32, txt_in_features=32), random_flux.siglip()
    ours.save_pretrained(folder / "embedder")
    tower.save_pretrained(folder / "siglip")
    return ours, tower, folder


def test_pictures_become_tokens(pipe, embedder):
    """From a picture, by the files of Redux and of SigLIP: what diffusers' prior makes of it."""
    from diffusers import FluxPriorReduxPipeline
    from PIL import Image
    from transformers import SiglipImageProcessor

    ours, tower, folder = embedder
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    extractor = SiglipImageProcessor(size={"height": 32, "width": 32})
    prior = FluxPriorReduxPipeline(
        image_encoder=tower, feature_extractor=extractor, image_embedder=ours
    )
    with torch.no_grad():
        seen = prior.encode_image(picture, torch.device("cpu"), 1)
        tokens = ours(seen).image_embeds
    with apply(pipe, Redux(references=(Reference(embeds=tokens[0], weight=0.5),))):
        expected = run(pipe, PROMPTS)
    files = {
        "adapter": folder / "embedder" / "diffusion_pytorch_model.safetensors",
        "image_encoder": folder / "siglip",
    }
    for reference in (Reference(image=picture, weight=0.5), Reference(embeds=seen[0], weight=0.5)):
        method = Redux(references=(reference,), **files)
        with apply(pipe, method):
            assert relative(run(pipe, PROMPTS), expected) <= 1e-5
    assert Redux.from_dict(method.to_dict() | {"references": None}).adapter == str(files["adapter"])


@pytest.mark.parametrize("method", [StyleAligned(), AlignedGen(), AlignedGen(layers="all")])
def test_with_methods_that_share_images(pipe, method):
    """On one layer together: without weight in either they are the other alone."""
    with apply(pipe, method):
        shared = run(pipe, PROMPTS)
    with apply(pipe, method, Redux(references=refs(1.0, mask=torch.zeros(2, 2)))):
        assert relative(run(pipe, PROMPTS), shared) <= 1e-5
    with apply(pipe, Redux(references=refs(0.5)), method):
        one = run(pipe, PROMPTS)
    with apply(pipe, method, Redux(references=refs(0.5))):
        assert relative(run(pipe, PROMPTS), one) <= 1e-5
    assert relative(one[1:], shared[1:]) > 1e-3


def test_strength_can_change_in_place(pipe):
    with apply(pipe, Redux(references=refs(1.0))) as handle:
        for strength in (0.3, 2.0):
            handle.update(Redux(references=refs(1.0), strength=strength))
            expected = stock_after(pipe, handle, strength)
            assert relative(run(pipe, PROMPTS), expected) <= 1e-5


def stock_after(pipe, handle, strength):
    with handle.paused():
        return stock(pipe, [A], table([strength]))


def test_a_bias_makes_no_score_matrix(pipe, monkeypatch):
    """No tensor with a side of all tokens by all tokens is ever handed to the operation."""
    from styleattn.methods import _joint

    sizes, original = [], _joint.attention

    def watch(query, branches, **options):
        for s in branches[0].segments:
            bias = s.logit_bias
            sizes.append((tuple(getattr(bias, "shape", ())), s.key.shape[2]))
        return original(query, branches, **options)

    monkeypatch.setattr(_joint, "attention", watch)
    with apply(pipe, Redux(references=refs(0.5))):
        run(pipe, PROMPTS, steps=1)
    assert len(sizes) == 4 * 3  # one call of three segments in each of four layers
    assert {s for s, _ in sizes} == {(), (2, T + M + N)}


@pytest.mark.parametrize(
    "bad",
    [
        {"strength": -1.0},
        {"strength_by": "hope"},
        {"downsample": 0.5},
        {"downsample_by": "luck"},
        {"references": (Reference(embeds=torch.zeros(3)),)},
        {"references": (Reference(),)},
        {"references": (Reference(image="a.png"),)},
        {"references": (Reference(embeds=torch.zeros(8, 32)),), "downsample": 2},
    ],
)
def test_bad_knobs(bad):
    with pytest.raises(ValueError, match="Redux: "):
        Redux(**bad)


def test_what_does_not_fit_the_model_is_refused_whole(pipe):
    before = dict(pipe.transformer.attn_processors)
    with pytest.raises(ValueError, match="needs references"):
        apply(pipe, Redux())
    with pytest.raises(ValueError, match="8 wide, the model's prompts 32"):
        apply(pipe, Redux(references=(Reference(embeds=torch.zeros(4, 8)),)))
    after = pipe.transformer.attn_processors
    assert all(after[name] is p for name, p in before.items())


def test_what_is_no_adapter_is_refused(pipe):
    weights = {"redux_up.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"redux: adapter must be a file of weights .*got a dict"):
        apply(pipe, Redux(adapter=weights, references=Reference(embeds=picture(1))))
