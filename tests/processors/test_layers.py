"""The grammar of layer choices."""

from __future__ import annotations

import pytest

from styleattn.processors._layers import layer_weights

XL = [
    *(f"down_blocks.{b}.attentions.{a}.transformer_blocks.0.attn1" for b in (1, 2) for a in (0, 1)),
    *(
        f"up_blocks.{b}.attentions.{a}.transformer_blocks.0.attn1"
        for b in (0, 1)
        for a in (0, 1, 2)
    ),
    "mid_block.attentions.0.transformer_blocks.0.attn1",
]
V1 = [
    *(f"down_blocks.{b}.attentions.0.transformer_blocks.0.attn1" for b in (0, 1, 2)),
    *(f"up_blocks.{b}.attentions.0.transformer_blocks.0.attn1" for b in (1, 2, 3)),
    "mid_block.attentions.0.transformer_blocks.0.attn1",
]


def chosen(layers, names=XL, others=()):
    return {n: w for n, w in layer_weights(layers, names, others).items() if w}


@pytest.mark.parametrize(
    ("layers", "prefixes"),
    [
        ("style", ["up_blocks.0.attentions.1"]),
        ("layout", ["down_blocks.2.attentions.1"]),
        ("up_blocks.*", ["up_blocks.0", "up_blocks.1"]),
        ("up_blocks.0", ["up_blocks.0"]),
        (
            ["mid_block", "down_blocks.?.attentions.0.*"],
            ["mid_block", "down_blocks.1.attentions.0", "down_blocks.2.attentions.0"],
        ),
        (XL[0], [XL[0]]),
        ({"up": {"block_0": [0, 1, 0]}}, ["up_blocks.0.attentions.1"]),
        ({"mid": 1.0}, ["mid_block"]),
        ({"down": 1.0}, ["down_blocks"]),
        ({"up": {"block_1": 1}}, ["up_blocks.1"]),
        ({}, []),
    ],
)
def test_what_is_chosen(layers, prefixes):
    expected = {n for n in XL if any(n == p or n.startswith(p + ".") for p in prefixes)}
    assert set(chosen(layers)) == expected


def test_all_is_everything():
    assert layer_weights("all", XL, ["conv_norm_out"]) == dict.fromkeys([*XL, "conv_norm_out"], 1.0)


def test_numbers_of_a_scale_dictionary_are_kept():
    found = chosen({"up": {"block_0": [0.2, 0.0, 0.7]}, "mid": 0.5})
    assert sorted(found.values()) == [0.2, 0.5, 0.7]


def test_the_rule_weighs_other_modules_too():
    norms = ["up_blocks.0.attentions.1.norm", "up_blocks.0.resnets.1.norm1", "conv_norm_out"]
    assert set(chosen("style", XL, norms)) - set(XL) == {norms[0]}
    assert set(chosen("up_blocks.*", XL, norms)) - set(XL) == set(norms[:2])


def test_presets_know_the_older_models():
    assert set(chosen("style", V1)) == {n for n in V1 if n.startswith("up_blocks.1")}
    assert set(chosen("layout", V1)) == {n for n in V1 if n.startswith(("down_blocks.2", "mid"))}


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("nowhere.*", "matches no attention layer"),
        (["up_blocks.0", "up_blocks.7"], "'up_blocks.7' matches no"),
        (3, "layers must be one of"),
        ([1, 2], "layers must be one of"),
        ({"middle": 1}, "unknown part 'middle'"),
        ({"up": {"block_9": 1}}, "no 'block_9'"),
        ({"up": {"first": 1}}, "no 'first'"),
        ({"up": {"block_0": [0, 1]}}, "has 3 attention modules, got 2"),
        ({"down": {"block_0": 1}}, "no 'block_0' with attention"),
        ({"mid": "x"}, "'x' where a scale"),
        ({"mid": -1.0}, "-1.0 where a scale"),
        ({"mid": float("nan")}, "nan where a scale"),
        ({"mid": True}, "True where a scale"),
    ],
)
def test_bad_choices_say_what_there_is(layers, says):
    with pytest.raises(ValueError, match=r"^layers") as error:
        layer_weights(layers, XL)
    assert says in str(error.value)


def test_unknown_models_have_no_presets():
    with pytest.raises(ValueError, match=r"known for SDXL and SD1\.5"):
        layer_weights("style", ["blocks.0.attn1"])


FLUX = [f"transformer_blocks.{i}.attn" for i in range(2)]
FLUX += [f"single_transformer_blocks.{i}.attn" for i in range(3)]


def test_weights_for_every_block_of_flux():
    assert layer_weights([0.5, 2], FLUX) == dict(zip(FLUX, (0.5, 2.0, 0.0, 0.0, 0.0), strict=True))
    each = [1.0, 0.0, 0.25, 0.5, 3.0]
    assert list(layer_weights(each, FLUX).values()) == each
    for wrong, says in (([1.0] * 3, "3 weights for the 2 double"), ([1.0, -1.0], "scale >= 0")):
        with pytest.raises(ValueError, match=says):
            layer_weights(wrong, FLUX)


def test_weight_types_of_unets_are_refused_on_flux():
    with pytest.raises(ValueError, match="UNets"):
        layer_weights("ease in", FLUX)


@pytest.mark.parametrize("preset", ["style", "layout", {"style": 1.0, "layout": 0.0}])
def test_presets_are_refused_on_a_flux_that_was_not_measured(preset):
    with pytest.raises(ValueError, match="measured for a FLUX of 2 double and 3 single blocks"):
        layer_weights(preset, FLUX)


def test_presets_of_tiny_flux_are_what_was_measured():
    shape = [*FLUX, "single_transformer_blocks.3.attn"]
    assert chosen({"style": 0.5, "layout": 0.0}, shape) == {shape[0]: 0.5}
    with pytest.raises(ValueError, match="no blocks of layout found; there is style"):
        layer_weights("layout", shape)


def test_blocks_of_flux_by_kind_and_depth():
    """Of FLUX.1's 19 and 38 blocks, and of small ones: block i of n stands at (i + 1/2) / n."""

    def names_of(layers, blocks):
        return list(chosen(layers, blocks))

    full = [f"transformer_blocks.{i}.attn" for i in range(19)]
    full += [f"single_transformer_blocks.{i}.attn" for i in range(38)]
    assert names_of("double", full) == full[:19] and names_of("single", full) == full[19:]
    assert names_of("double 0-0.5", full) == full[:9]
    assert names_of("double 0.5-1", full) == full[9:19]
    assert names_of("single .25-0.75", full) == full[19 + 9 : 19 + 28]
    assert names_of(["double 0-0.5", "single"], FLUX) == [FLUX[0], *FLUX[2:]]
    weights = layer_weights({"double 0-0.5": 1.0, "single 0-0.5": 0.5, "double": 0.25}, FLUX)
    assert list(weights.values()) == [1.25, 0.25, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "wrong", ["double 0.5-0.5", "single 0.9-1", "single 0-2", "double 0.8-0.6"]
)
def test_depths_that_select_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="selects none of the"):
        layer_weights({wrong: 1.0}, FLUX)
    with pytest.raises(ValueError, match="and the model has none of them"):
        layer_weights(wrong, XL)
