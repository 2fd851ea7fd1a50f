"""Hypothesis strategies over every option of the operation."""

import torch
from hypothesis import strategies as st

from styleattn.testing import BranchSpec, CallSpec, SegmentSpec

segments = st.builds(
    SegmentSpec,
    keys=st.sampled_from([1, 2, 5, 7, 16, 33]),
    key_rows=st.sampled_from(["each", "one", "mapped", "holes"]),
    affines=st.sampled_from(["", "k", "v", "kv", "kc", "kvc"]),
    logit_scale=st.sampled_from(["", "float", "row"]),
    logit_bias=st.sampled_from(["", "float", "row", "query", "inf", "gone"]),
    key_bias=st.sampled_from(["", "shared", "row", "mask"]),
    null_keys=st.sampled_from([0, 0, 1, 16]),
    blend=st.sampled_from(["", "", "float", "row"]),
)
branches = st.builds(
    BranchSpec,
    segments=st.lists(segments, min_size=1, max_size=3).map(tuple),
    weight=st.sampled_from(["", "zero", "float", "row", "query"]),
    own_query=st.booleans(),
    query_affine=st.booleans(),
    content=st.sampled_from(["", "", "float", "row"]),
)
calls = st.builds(
    CallSpec,
    batch=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 3]),
    length=st.sampled_from([1, 2, 5, 9, 17]),
    head_dim=st.sampled_from([8, 16, 40, 64]),
    branches=st.lists(branches, min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
    strided=st.booleans(),
    softmax_scale=st.sampled_from([None, None, 0.2, 1.0]),
    seed=st.integers(0, 2**16),
)
