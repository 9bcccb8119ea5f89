"""Distinct texts as the units of a comparison."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from daemon.findings.sparse import as_columns
from daemon.findings.units import Samples, compared_groups, units_of

TEXT = np.array([0, 0, 1, 2, 2, 2, 3, 4])
GROUP = np.array([0, 0, 0, 0, 1, 1, 1, -1])
SAMPLES = Samples(TEXT, np.array([5.0, 5, 6, 7, 7, 7, 8, 9]), GROUP, ("a", "b"), "fact")


def test_samples_of_one_side_and_text_are_one_unit() -> None:
    units = units_of(SAMPLES, 0)
    assert units.member.tolist() == [0, 0, 1, 2, 3, 3, 4, -1]  # the third text is on both sides
    assert units.inside.tolist() == [True, True, True, False, False]
    assert units.size.tolist() == [2, 1, 1, 2, 1]
    assert units.n_tokens.tolist() == [5, 6, 7, 7, 8]
    assert (units.n, units.n_inside, units.n_outside) == (5, 3, 2)


def test_a_unit_has_the_mean_of_its_samples_and_fires_with_half_of_them() -> None:
    units = units_of(SAMPLES, 0)
    columns = as_columns(
        scipy.sparse.csc_matrix(np.array([[2.0, 0, 3, 0, 1, 1, 0, 9], [0, 0, 0, 0, 0, 4, 5, 9]]).T)
    )
    means = units.means(columns)
    assert means.toarray().T.tolist() == [[1, 3, 0, 1, 0], [0, 0, 0, 2, 5]]
    assert units.firing(columns, means).toarray().T.tolist() == [[1, 3, 0, 1, 0], [0, 0, 0, 2, 5]]
    third = units_of(Samples(np.zeros(6, int), np.ones(6), np.array([0, 0, 0, 1, 1, 1]), ("a", "b"), "x"), 0)
    some = as_columns(scipy.sparse.csc_matrix(np.array([[3.0, 0, 0, 3, 3, 0]]).T))
    assert third.means(some).toarray().ravel().tolist() == [1, 2]
    assert third.firing(some, third.means(some)).toarray().ravel().tolist() == [0, 2]


def test_samples_left_out_are_in_no_unit() -> None:
    defined = np.array([False, True, False, True, True, False, True, True])
    units = units_of(SAMPLES, 1, defined)
    assert units.member.tolist() == [-1, 0, -1, 1, 2, -1, 3, -1]
    assert units.mean_of(np.array([np.nan, 1, np.nan, 2, 3, np.nan, 4, 5])).tolist() == [1, 2, 3, 4]


def test_of_two_groups_the_first_is_compared_and_of_three_each() -> None:
    assert compared_groups(SAMPLES, 2) == [0]
    assert compared_groups(SAMPLES, 3) == []
    three = Samples(np.arange(9), np.ones(9), np.array([0, 0, 0, 1, 1, 1, 1, 2, -1]), ("a", "b", "c"), "x")
    assert compared_groups(three, 3) == [0, 1]
    assert compared_groups(three, 1) == [0, 1, 2]
