from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from daemon.analysis.sparse import from_dense
from tests.analysis.synthetic import QUICK, to_dense

entries = st.sampled_from([0.0, -0.0, -1.5, math.nan, 1e-300, 0.5, 2.0, math.inf])


@st.composite
def dense_matrices(draw):
    n, d_sae = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    row = st.lists(entries, min_size=d_sae, max_size=d_sae)
    return torch.tensor(draw(st.lists(row, min_size=n, max_size=n)), dtype=torch.float64)


@QUICK
@given(dense_matrices())
def test_exactly_the_positive_entries_are_kept_by_ascending_index(dense):
    acts = from_dense(dense)
    positive = torch.where(dense > 0, dense, 0)
    assert torch.equal(to_dense(acts, dense.shape[1]), positive)
    for row, n in enumerate(acts.counts.tolist()):
        assert acts.indices[row, :n].tolist() == positive[row].nonzero().flatten().tolist()


@QUICK
@given(dense_matrices())
def test_padding_holds_index_and_value_zero_and_is_no_wider_than_needed(dense):
    acts = from_dense(dense)
    assert acts.width == max(1, int(acts.counts.max()))
    assert acts.indices.shape == acts.values.shape == (len(dense), acts.width)
    assert not acts.indices[~acts.active].any()
    assert not acts.values[~acts.active].any()
    assert torch.equal(acts.active.sum(1), acts.counts)


def test_dtypes_are_those_of_the_activations_and_int64():
    acts = from_dense(torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16))
    assert acts.values.dtype == torch.bfloat16
    assert acts.indices.dtype == acts.counts.dtype == torch.int64


def test_no_rows_and_no_activity_still_have_a_slot():
    assert from_dense(torch.zeros(0, 4)).indices.shape == (0, 1)
    assert from_dense(torch.zeros(2, 4)).indices.shape == (2, 1)


def test_selected_rows_come_in_the_order_asked_for():
    dense = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    rows = torch.tensor([2, 1, 1])
    assert_close(to_dense(from_dense(dense).select(rows), 3), dense[rows])
