"""The words users see: every meaningless call says which call, which argument, what it got, and all
of it at once."""

import math
import pickle

import numpy as np
import pytest
import torch

import styleattn
from styleattn import Affine, Branch, Invalid, Segment, Unsupported

B, H, L, S, D = 2, 3, 5, 7, 8
Q = torch.randn(B, H, L, D)
K = torch.randn(B, H, S, D)
SMALL = torch.zeros(B, H, D)
NAN = float("nan")


def segment(**options):
    return [Branch((Segment(**{"key": K, "value": K, **options}),))]


def branch(**options):
    return [Branch(**{"segments": (Segment(K, K),), **options})]


CALLS = {
    "query is a list": ([[1.0]], branch(), "query must be a tensor, got a list"),
    "query has 3 dims": (Q[0], branch(), "query must be [batch, heads, length, head_dim]"),
    "query is integer": (Q.int(), branch(), "query must be float32, float16"),
    "query is complex": (Q.to(torch.complex64), branch(), "got torch.complex64"),
    "query has no tokens": (Q[:, :, :0], branch(), "query is empty: [2, 3, 0, 8]"),
    "query last dim strided": (torch.randn(B, H, L, 2 * D)[..., ::2], branch(), "contiguous last dim"),
    "head_dim too large": (torch.zeros(1, 1, 1, 2048), branch(), "head_dim is 2048"),
    "no branches": (Q, [], "non-empty sequence of Branch"),
    "branches is a string": (Q, "plain", "non-empty sequence of Branch"),
    "branch is a segment": (Q, [Segment(K, K)], "branches[0] must be a Branch, got a Segment"),
    "no segments": (Q, branch(segments=()), "branches[0].segments must be a non-empty tuple"),
    "segment is a tuple": (Q, branch(segments=((K, K),)), "branches[0].segments[0] must be a Segment"),
    "key is None": (Q, segment(key=None), "segments[0].key must be a tensor, got a NoneType"),
    "key heads": (Q, segment(key=K[:, :2]), "segments[0].key must be [*, 3, *, 8], got [2, 2, 7, 8]"),
    "key head_dim": (Q, segment(key=K[..., :4]), "segments[0].key must be"),
    "key dtype": (Q, segment(key=K.half()), "segments[0].key is torch.float16, query is torch.float32"),
    "key device": (Q, segment(key=K.to("meta")), "segments[0].key is on meta, query is on cpu"),
    "key last dim": (Q, segment(key=K.repeat_interleave(2, -1)[..., ::2]), "segments[0].key needs a"),
    "key empty": (Q, segment(key=K[:, :, :0], value=K[:, :, :0]), "segments[0] is empty"),
    "key has no rows": (Q, segment(key=K[:0], value=K[:0]), "segments[0] is empty"),
    "value length": (Q, segment(value=K[:, :, 1:]), "segments[0].value must be [2, 3, 7, 8]"),
    "value dtype": (Q, segment(value=K.double()), "segments[0].value is torch.float64"),
    "rows needed": (Q, segment(key=K.repeat(2, 1, 1, 1), value=K.repeat(2, 1, 1, 1)), "rows is needed"),
    "rows too large": (Q, segment(rows=torch.tensor([0, 2])), "rows has [2], the segment has rows 0..1"),
    "rows too small": (Q, segment(rows=torch.tensor([0, -2])), "rows has [-2]"),
    "rows length": (Q, segment(rows=torch.tensor([0])), "segments[0].rows must be [2], got [1]"),
    "rows float": (Q, segment(rows=torch.tensor([0.0, 1.0])), "rows must be int32 or int64"),
    "rows list": (Q, segment(rows=[0, 1]), "segments[0].rows must be a tensor, got a list"),
    "scale shape": (Q, segment(logit_scale=torch.ones(B, L)), "logit_scale must be a scalar or [2]"),
    "scale string": (Q, segment(logit_scale="big"), "logit_scale must be a number or a tensor"),
    "scale bool": (Q, segment(logit_scale=True), "logit_scale must be a number or a tensor"),
    "scale NaN": (Q, segment(logit_scale=NAN), "logit_scale is NaN"),
    "bias shape": (Q, segment(logit_bias=torch.ones(B, S)), "logit_bias must be a scalar or [2] or [2, 5]"),
    "bias mask": (Q, segment(logit_bias=torch.ones(B, dtype=torch.bool)), "logit_bias must be a real"),
    "key bias shape": (Q, segment(key_bias=torch.zeros(L)), "key_bias must be [7] or [2, 7], got [5]"),
    "key bias bool": (Q, segment(key_bias=torch.ones(S, dtype=torch.bool)), "must be floating point"),
    "null keys": (Q, segment(null_keys=-1), "null_keys must be a non-negative int, got -1"),
    "null keys float": (Q, segment(null_keys=1.5), "null_keys must be a non-negative int, got 1.5"),
    "affine type": (Q, segment(key_affine=(SMALL, SMALL)), "key_affine must be an Affine, got a tuple"),
    "affine shape": (Q, segment(value_affine=Affine(SMALL, SMALL[:1])), "value_affine.shift must be [2"),
    "affine complex": (Q, segment(key_affine=Affine(SMALL.cfloat(), SMALL)), "key_affine.scale must be floating"),
    "affine device": (Q, segment(key_affine=Affine(SMALL, SMALL.to("meta"))), "key_affine.shift is on meta"),
    "own key alone": (Q, segment(own_key=K), "needs own_key and own_value together"),
    "blend alone": (Q, segment(kv_blend=0.5), "kv_blend needs own_key and own_value"),
    "own key shape": (Q, segment(own_key=K[:1], own_value=K[:1]), "own_key must be [2, 3, 7, 8]"),
    "weight shape": (Q, branch(weight=torch.ones(L)), "branches[0].weight must be a scalar or [2]"),
    "weight None": (Q, branch(weight=None), "branches[0].weight must be a number or a tensor"),
    "branch query": (Q, branch(query=Q[:, :, 1:]), "branches[0].query must be [2, 3, 5, 8]"),
    "gamma alone": (Q, branch(gamma=0.5), "branches[0].gamma needs content_query"),
    "content shape": (Q, branch(content_query=Q[:1], gamma=0.5), "content_query must be [2, 3, 5, 8]"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_meaningless_call(name):
    query, branches, words = CALLS[name]
    with pytest.raises(Invalid) as error:
        styleattn.attention(query, branches)
    message = str(error.value)
    assert message.startswith("attention:") and words in message and "inputs: query" in message


def test_every_reason_at_once():
    bad = Segment(K.half(), K[:, :, 1:], logit_scale=NAN, null_keys=-1)
    with pytest.raises(Invalid) as error:
        styleattn.attention(Q, [Branch((bad,), weight="x")], softmax_scale=math.inf)
    assert len(error.value.reasons) == 6
    assert all(reason in str(error.value) for reason in error.value.reasons)


def test_every_reason_of_shared_attention_at_once():
    with pytest.raises(Invalid) as error:
        styleattn.shared_attention(
            Q,
            K,
            Q.half(),
            reference_rows=[0, 5],
            eps=0,
            score_scale="a",
            score_shift=torch.zeros(3),
        )
    message = str(error.value)
    assert len(error.value.reasons) == 6 and all(r in message for r in error.value.reasons)
    for name in ("key", "value", "reference_rows", "eps", "score_scale", "score_shift"):
        assert name in message


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: styleattn.attention(Q, branch(), backend="cuda"), "backend must be one of reference, torch"),
        (lambda: styleattn.attention(Q, branch(), softmax_scale="1"), "softmax_scale must be a finite number"),
        (lambda: styleattn.shared_attention(Q, K, K, reference_rows=[0, 0]), "key must be like query"),
        (lambda: styleattn.shared_attention(Q, Q, Q, reference_rows=[0]), "reference_rows must be int [2]"),
        (lambda: styleattn.shared_attention(Q, Q, Q, reference_rows=[0, 5]), "reference_rows has [5]"),
        (lambda: styleattn.shared_attention(Q, Q, Q, reference_rows=[1, 0]), "which are no references"),
        (lambda: styleattn.shared_attention(Q, Q, Q, reference_rows=[0.0, 0.0]), "must be int [2], got a list"),
        (lambda: styleattn.shared_attention(Q, Q, Q, reference_rows=[0, 0], eps=-1.0), "eps must be a positive"),
        (lambda: styleattn.injected_attention(Q, K, K, rows=[0, 9]), "rows has [9]"),
        (lambda: styleattn.injected_attention(Q, K, K, kv_blend=0.5), "kv_blend needs own_key"),
        (lambda: styleattn.decoupled_attention(Q, K, K, [(K, K)], weights=[1.0, 2.0]), "one entry per image prompt (1)"),
        (lambda: styleattn.decoupled_attention(Q, K, K, [K], weights=1.0), "image_prompts[0] must be a pair"),
        (lambda: styleattn.decoupled_attention(Q, K, K, [(K, K)], weights=1.0, masks=[torch.ones(S)]), "masks[0] must be [5]"),
        (lambda: styleattn.token_stats(Q[0]), "x must be [batch, heads"),
        (lambda: styleattn.shared_attention(Q, Q, Q, reference_rows=[False, True]), "must be int [2], got a list"),
        (lambda: styleattn.injected_attention(Q, K, K, gamma=torch.ones(B, L)), "gamma must be a scalar or [2], got [2, 5]"),
        (lambda: styleattn.shared_attention(Q, Q, Q, reference_rows=["a", "b"]), "must be int [2], got a list"),
        (lambda: styleattn.shared_attention(Q, Q, Q, reference_rows=[0, 0], score_shift=torch.zeros(B, L)), "score_shift must be a scalar or [2]"),
        (lambda: styleattn.shared_attention(Q, Q, Q, reference_rows=[0, 0], eps=-1, adain_queries=False, adain_keys=False), "eps must be"),
        (lambda: styleattn.shared_attention(Q, Q.int(), Q, reference_rows=[0, 0]), "key must be float32"),
        (lambda: styleattn.injected_attention(Q, K, K, gamma="much"), "gamma must be a number or a tensor, got a str"),
        (lambda: styleattn.decoupled_attention(Q, K, K, None, weights=1.0), "image_prompts must be a sequence"),
        (lambda: styleattn.decoupled_attention(Q, K, K, [(K, K)], weights=1.0, masks=torch.ones(1, L)), "masks must be a sequence"),
        (lambda: styleattn.decoupled_attention(Q, K, K, [(K, K)], weights=None, masks=[torch.ones(L)]), "weights[0] must be a number"),
        (lambda: styleattn.decoupled_attention(Q, K, K, [(K, K)], weights=torch.ones(3), masks=[torch.ones(L)]), "weights[0] must be a scalar"),
        (lambda: styleattn.decoupled_attention(Q, K, K, [(K, K)], weights=1.0, masks=[torch.ones(L, device="meta")]), "masks[0] is on meta"),
        (lambda: styleattn.attention(Q, branch(), backend=3), "backend must be one of"),
        (lambda: styleattn.attention(Q, branch(weight=10**400)), "weight is beyond what float32 holds"),
        (lambda: styleattn.attention(Q, segment(logit_bias=-1e39)), "logit_bias is beyond what float32 holds"),
        (lambda: styleattn.attention(Q, branch(), softmax_scale=10**400), "softmax_scale must be a finite"),
        (lambda: styleattn.attention(Q, segment(null_keys=10**30)), "null_keys must be a non-negative int"),
        (lambda: styleattn.adain_affine(None, None), "own must be a TokenStats, got a NoneType"),
        (lambda: styleattn.adain_affine(styleattn.token_stats(Q), styleattn.token_stats(Q[:1])), "reference is [1, 3, 8]"),
        (lambda: styleattn.merge([Q, Q.half()], [Q[..., 0]] * 2), "part 1"),
        (lambda: styleattn.merge([Q.int()], [Q[..., 0]]), "part 0"),
        (lambda: styleattn.token_stats(Q, eps=0), "eps must be a positive number"),
        (lambda: styleattn.merge([], []), "at least one"),
        (lambda: styleattn.merge([Q], [Q]), "do not belong"),
        (lambda: styleattn.merge([Q, K], [Q[..., 0], K[..., 0]]), "part 1"),
    ],
)  # fmt: skip
def test_other_calls(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


def test_rows_are_checked_where_a_compiler_hides_them():
    rows = torch.tensor([0, 9])
    compiled = torch.compile(
        lambda q: styleattn.attention(q, segment(rows=rows), backend="torch"), backend="eager"
    )
    with pytest.raises(ValueError, match="rows has \\[9\\]"):
        compiled(Q)
    with pytest.raises(Invalid, match="rows has \\[7\\]"):
        bad = torch.nn.Parameter(torch.tensor([0, 7]), requires_grad=False)
        styleattn.attention(Q, segment(rows=bad))


def test_errors_travel_between_processes():
    with pytest.raises(Invalid) as error:
        styleattn.attention(Q, branch(weight=None))
    copy = pickle.loads(pickle.dumps(error.value))
    assert str(copy) == str(error.value) and copy.reasons == error.value.reasons


def test_forward_mode_is_refused():
    with pytest.raises(RuntimeError, match="no forward-mode differentiation"):
        torch.func.jvp(lambda k: styleattn.attention(Q, segment(key=k)), (K,), (K,))


def test_numpy_numbers_are_numbers():
    half = styleattn.attention(Q, branch(weight=np.float32(0.5)))
    assert torch.equal(half, styleattn.attention(Q, branch(weight=0.5)))
    shared = {"reference_rows": [0, 0]}
    shifted = styleattn.shared_attention(Q, Q, Q, score_shift=np.float32(0.5), **shared)
    assert torch.equal(shifted, styleattn.shared_attention(Q, Q, Q, score_shift=0.5, **shared))


def test_dataclasses_compare_by_identity():
    assert Segment(K, K) != Segment(K, K) and len({Segment(K, K), Segment(K, K)}) == 2


def test_a_backend_that_cannot_says_why():
    double = Q.double()
    for name in ("torch", "cpu", "triton"):
        with pytest.raises(Unsupported) as error:
            styleattn.attention(double, [Branch((Segment(K.double(), K.double()),))], backend=name)
        assert f"backend '{name}' cannot run the call" in str(
            error.value
        ) and "inputs: query" in str(error.value)


def test_environment_names_a_backend(monkeypatch):
    monkeypatch.setenv("STYLEATTN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="backend must be one of"):
        styleattn.attention(Q, branch())
    monkeypatch.setenv("STYLEATTN_BACKEND", "reference")
    assert (
        styleattn.attention(Q.double(), [Branch((Segment(K.double(), K.double()),))]).dtype
        == torch.float64
    )


def test_backends_explains_itself():
    table = styleattn.backends()
    assert [row.name for row in table] == ["reference", "torch", "cpu", "triton"]
    assert "reference" in table and "torch" in table
    assert all(row.detail for row in table) and str(table).count("\n") == 3
    assert table["torch"].available
