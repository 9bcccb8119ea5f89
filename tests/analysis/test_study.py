from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daemon.analysis.column_inputs import LayerActivations
from daemon.analysis.columns import CONTRAST_METRICS, analysis_columns, max_activation
from daemon.analysis.features import StoredFeatures, feature_rows
from daemon.analysis.geometry import SHAPE_CLASSES, DecoderRows
from daemon.analysis.study import analyse, layer_sums
from daemon.recipes import CONTRAST_RECIPE, PLAIN_RECIPE, Contrast, Recipe
from daemon.tools.reference import ReferenceLayer, reference_columns
from tests.analysis.synthetic import (
    QUICK,
    SETTINGS,
    RandomSae,
    activations,
    random_acts,
    random_sae,
    residuals,
    to_dense,
)

D_IN = 7
REORDERED = Recipe(
    templates=(("wrong", "{w}"), ("other", "{o}"), ("ask", "{a}"), ("right", "{r}")),
    contrast=Contrast(reference="ask", positive="right", negative="wrong"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """n samples read by SAEs at layers 2, 5, 8..., one per entry of `d_saes`."""

    recipe: Recipe
    saes: tuple[RandomSae, ...]
    layers: tuple[LayerActivations, ...]
    sample_ids: tuple[str, ...]
    token_counts: tuple[tuple[int, ...], ...]

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def analyse(self, samples: list[int] | None = None) -> dict[str, np.ndarray]:
        """The columns of some of the samples, as a batch of their own."""
        samples = list(range(len(self.sample_ids))) if samples is None else samples
        n_texts = len(self.recipe.templates)
        rows = torch.tensor([sample * n_texts + text for sample in samples for text in range(n_texts)])
        return analyse(
            layers=[
                activations(sae, layer.x[rows], layer.layer)
                for sae, layer in zip(self.saes, self.layers, strict=True)
            ],
            recipe=self.recipe,
            sample_ids=[self.sample_ids[sample] for sample in samples],
            token_counts=[self.token_counts[sample] for sample in samples],
            settings=SETTINGS,
            noise=self.saes[0].noise(SETTINGS.seed, SETTINGS.noise_sigma),
        )

    def reference(self, sample: int) -> dict[str, float | int | str]:
        n_texts = len(self.recipe.templates)
        rows = slice(sample * n_texts, (sample + 1) * n_texts)
        return reference_columns(
            sample_id=self.sample_ids[sample],
            recipe=self.recipe,
            settings=SETTINGS,
            saes=self.names,
            layers=[
                ReferenceLayer(
                    layer=layer.layer,
                    x=list(layer.x[rows].double().numpy()),
                    target=list(layer.target[rows].double().numpy()),
                    feature_acts=list(sae.encode(layer.x[rows]).double().numpy()),
                    reconstruction=list(layer.reconstruction[rows].double().numpy()),
                    W_dec=layer.decoder.W_dec.double().numpy(),
                )
                for sae, layer in zip(self.saes, self.layers, strict=True)
            ],
            n_tokens=self.token_counts[sample],
            encode_first=lambda x: self.saes[0].encode(torch.from_numpy(x)).double().numpy(),
        )


def make_case(
    seed: int = 0,
    n: int = 4,
    recipe: Recipe = CONTRAST_RECIPE,
    d_saes: tuple[int, ...] = (24, 24, 24),
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
) -> Case:
    n_texts = len(recipe.templates)
    saes = tuple(random_sae(seed + i, D_IN, d_sae, dtype) for i, d_sae in enumerate(d_saes))
    layers = tuple(
        activations(sae, scale * residuals(seed + i, n * n_texts, D_IN, dtype), layer=2 + 3 * i)
        for i, sae in enumerate(saes)
    )
    return Case(
        recipe=recipe,
        saes=saes,
        layers=layers,
        sample_ids=tuple(f"sample {i}" for i in range(n)),
        token_counts=tuple(tuple(3 + i + text for text in range(n_texts)) for i in range(n)),
    )


def assert_row_equals(columns: dict[str, np.ndarray], row: int, expected: dict, tolerance: float) -> None:
    for name, value in expected.items():
        if isinstance(value, float):
            assert columns[name][row] == pytest.approx(value, abs=tolerance, nan_ok=True), name
        else:
            assert columns[name][row] == value, name


@QUICK
@given(
    st.integers(0, 10_000),
    st.sampled_from([CONTRAST_RECIPE, PLAIN_RECIPE, REORDERED]),
    st.sampled_from([(24,), (24, 24, 24), (24, 31), (31, 24), (24, 9, 40)]),
    st.sampled_from([1.0, 0.3, 0.0]),
)
def test_a_batch_agrees_with_the_reference(seed, recipe, d_saes, scale):
    """At scale 0.3 few features fire or none, at 0 none."""
    case = make_case(seed, n=3, recipe=recipe, d_saes=d_saes, scale=scale)
    columns = case.analyse()
    for sample in range(3):
        expected = case.reference(sample)
        assert list(columns) == list(expected)
        assert_row_equals(columns, sample, expected, tolerance=1e-9)


@QUICK
@given(st.integers(0, 10_000), st.permutations(range(5)), st.integers(1, 5))
def test_a_row_does_not_depend_on_its_batch(seed, order, size):
    case = make_case(seed, n=5)
    together = case.analyse()
    apart = case.analyse(order[:size])
    for row, sample in enumerate(order[:size]):
        assert_row_equals(apart, row, {name: values[sample] for name, values in together.items()}, 1e-9)


def test_float32_stays_within_its_precision_of_the_reference():
    case = make_case(dtype=torch.float32)
    columns = case.analyse()
    for sample in range(4):
        assert_row_equals(columns, sample, case.reference(sample), tolerance=1e-3)


@pytest.mark.parametrize("recipe", [CONTRAST_RECIPE, PLAIN_RECIPE, REORDERED])
def test_columns_have_the_names_order_and_types_of_the_schema(recipe):
    case = make_case(recipe=recipe)
    columns = case.analyse()
    expected = analysis_columns(case.names, recipe)
    assert list(columns) == [column.name for column in expected]
    for column in expected:
        values = columns[column.name]
        assert values.shape == (4,)
        assert values.dtype == {"int": np.int64, "float": np.float64, "class": object}[column.kind]
        if column.kind == "class":
            assert set(values) <= set(SHAPE_CLASSES)


def test_differences_are_hall_minus_fact_and_for_similarities_the_reverse():
    columns = make_case().analyse()
    for metric in ("centroid_drift", "axis_twist", "entropy"):
        np.testing.assert_allclose(
            columns[f"{metric}_diff"], columns[f"{metric}_hall"] - columns[f"{metric}_fact"]
        )
    for metric in ("stability", "cross_layer_consistency"):
        np.testing.assert_allclose(
            columns[f"{metric}_diff"], columns[f"{metric}_fact"] - columns[f"{metric}_hall"]
        )
    for metric in CONTRAST_METRICS:
        assert columns[f"{metric.name}_diff"].any(), metric


def test_token_counts_are_those_given():
    case = make_case()
    columns = case.analyse()
    for text, name in enumerate(case.recipe.text_names):
        assert columns[f"n_tokens_{name}"].tolist() == [counts[text] for counts in case.token_counts]


def test_one_dictionary_has_no_consistency_across_layers():
    columns = make_case(d_saes=(24,)).analyse()
    for name in ("fact", "hall", "diff"):
        assert np.isnan(columns[f"cross_layer_consistency_{name}"]).all()


def test_consistency_is_of_the_first_dictionaries_of_the_last_two_layers():
    one_each = make_case(d_saes=(24, 24, 24))
    expected = one_each.analyse()
    second, third = (
        dataclasses.replace(activations(sae, layer.x, layer.layer), name=f"other{layer.layer}")
        for sae, layer in zip(
            (random_sae(77, D_IN, 40), random_sae(78, D_IN, 9)), one_each.layers[1:], strict=True
        )
    )
    first, middle, last = one_each.layers
    several = [first, middle, second, last, third]

    def analysed(layers: list[LayerActivations]) -> dict[str, np.ndarray]:
        return analyse(
            layers=layers,
            recipe=one_each.recipe,
            sample_ids=one_each.sample_ids,
            token_counts=one_each.token_counts,
            settings=SETTINGS,
            noise=one_each.saes[0].noise(SETTINGS.seed, SETTINGS.noise_sigma),
        )

    columns = analysed(several)
    for name, values in expected.items():
        np.testing.assert_array_equal(columns[name], values, err_msg=name)
    assert {name.partition("_")[0] for name in columns.keys() - expected.keys()} == {"other5", "other8"}
    at_one_layer = analysed([last, third])
    assert np.isnan(at_one_layer["cross_layer_consistency_fact"]).all()


def test_silent_texts_are_undefined_only_where_nothing_can_be_said():
    columns = make_case(scale=0.0).analyse()
    undefined = {
        name for name, values in columns.items() if values.dtype == np.float64 and np.isnan(values).any()
    }
    compared = ("centroid_drift", "axis_twist", "cross_layer_consistency")
    assert undefined == {f"{metric}_{end}" for metric in compared for end in ("fact", "hall", "diff")} | {
        name for name in columns if name.endswith("relative_error")
    }
    assert columns["entropy_hall"].tolist() == [0] * 4
    assert columns["l2_prompt_shape_class"].tolist() == ["None"] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_largest_activation_is_exact_and_zero_where_nothing_fires(dtype):
    acts = random_acts(0, [3, 0, 12, 1], d_sae=12)
    acts = dataclasses.replace(acts, values=acts.values.to(dtype))
    largest = max_activation(dataclasses.replace(make_case().layers[0], acts=acts))
    assert largest.tolist() == to_dense(acts, 12).amax(-1).tolist()
    assert largest[1] == 0


def test_the_error_relative_to_nothing_is_undefined():
    layer = dataclasses.replace(
        make_case().layers[0], target=torch.zeros(12, D_IN), reconstruction=torch.ones(12, D_IN)
    )
    assert layer.errors.absolute.tolist() == pytest.approx([D_IN**0.5] * 12)
    assert layer.errors.relative.isnan().all()


def test_layer_sums_are_the_sums_over_a_samples_texts():
    case = make_case(n=2)
    layer = case.layers[1]
    sums = layer_sums(layer, 3)
    dense = to_dense(layer.acts, 24)
    for sample in range(2):
        rows = range(3 * sample, 3 * sample + 3)
        errors = [float((layer.x[row] - layer.reconstruction[row]).square().sum()) for row in rows]
        assert sums.rows[sample] == 3
        assert sums.l0[sample] == sum(int((dense[row] > 0).sum()) for row in rows)
        assert sums.squared_error[sample] == pytest.approx(sum(errors))
        assert sums.squared_norm[sample] == pytest.approx(
            sum(float(layer.x[row] @ layer.x[row]) for row in rows)
        )
        np.testing.assert_allclose(sums.total[sample], sum(layer.x[row].numpy() for row in rows))


def test_layer_sums_are_float64_whatever_the_activations():
    case = make_case(dtype=torch.float32)
    sums = layer_sums(case.layers[0], 3)
    for values in (sums.l0, sums.squared_error, sums.squared_norm, sums.total):
        assert values.dtype == np.float64
    assert sums.rows.dtype == np.int64


def ragged_layers(seed: int, counts: list[list[int]]) -> list[LayerActivations]:
    """One layer per list of counts, one count per position; only the activations matter."""
    empty = torch.zeros(0)
    return [
        LayerActivations(
            name=f"l{i}",
            layer=i,
            x=empty,
            target=empty,
            reconstruction=empty,
            acts=random_acts(seed + i, row, 12),
            decoder=DecoderRows(empty, None, empty),
            d_sae=12,
        )
        for i, row in enumerate(counts)
    ]


def read_once(layers: list[LayerActivations], positions: list[int], tokens: list[int]) -> StoredFeatures:
    """One row per text."""
    n = np.arange(len(positions) + 1)
    return StoredFeatures(
        tuple(range(len(layers))),
        tuple(layer.acts for layer in layers),
        n[:-1],
        n,
        np.array(positions),
        np.array(tokens),
    )


def test_several_rows_of_a_text_lie_together_by_layer_and_may_share_activations():
    acts = tuple(random_acts(seed, [2, 0, 3], 12) for seed in (0, 1))
    reads = np.array([0, 1, 1, 2, 0])  # of two texts
    stored = StoredFeatures((0, 1), acts, reads, np.array([0, 2, 5]), np.array([1, 2, 1, 2, 3]), reads + 100)
    rows = feature_rows([stored], n_texts=1)
    expected = [(0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2)]
    expected += [(1, layer, position) for layer in (0, 1) for position in (1, 2, 3)]
    assert list(zip(rows.sample_row, rows.layer, rows.position, strict=True)) == expected
    read_at = {(0, 1): 0, (0, 2): 1, (1, 1): 1, (1, 2): 2, (1, 3): 0}
    for row, (sample, layer, position) in enumerate(expected):
        dense = to_dense(acts[layer], 12)[read_at[sample, position]]
        own = slice(rows.offsets[row], rows.offsets[row + 1])
        assert rows.indices[own].tolist() == dense.nonzero().flatten().tolist()
        assert rows.token_id[row] == 100 + read_at[sample, position]


@QUICK
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data())
def test_feature_rows_are_ordered_by_sample_text_and_layer(seed, n, n_texts, n_layers, data):
    positions = n * n_texts
    count_lists = st.lists(st.integers(0, 6), min_size=positions, max_size=positions)
    layers = ragged_layers(seed, data.draw(st.lists(count_lists, min_size=n_layers, max_size=n_layers)))
    last = [4 + i for i in range(positions)]
    tokens = [100 + i for i in range(positions)]
    rows = feature_rows([read_once(layers, last, tokens)], n_texts)
    expected = [(s, t, layer) for s in range(n) for t in range(n_texts) for layer in range(n_layers)]
    assert (
        list(zip(rows.sample_row.tolist(), rows.text.tolist(), rows.layer.tolist(), strict=True)) == expected
    )
    assert len(rows.offsets) == len(expected) + 1
    for row, (sample, text, layer) in enumerate(expected):
        position = sample * n_texts + text
        dense = to_dense(layers[layer].acts, 12)[position]
        own = slice(rows.offsets[row], rows.offsets[row + 1])
        assert rows.indices[own].tolist() == dense.nonzero().flatten().tolist()
        assert rows.values[own].tolist() == dense[dense > 0].tolist()
        assert rows.position[row] == last[position]
        assert rows.token_id[row] == tokens[position]
    assert len(rows.indices) == len(rows.values) == rows.offsets[-1]


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float64, np.float64), (torch.float32, np.float32), (torch.bfloat16, np.float32)],
)
def test_feature_values_keep_the_precision_they_have(dtype, stored):
    layers = make_case(dtype=dtype).layers
    rows = feature_rows([read_once(layers, [0] * 12, [0] * 12)], 3)
    assert rows.values.dtype == stored
    assert rows.indices.dtype == np.uint32
    for values in (rows.sample_row, rows.text, rows.layer, rows.position, rows.token_id, rows.offsets):
        assert values.dtype == np.int64


def test_bfloat16_activations_are_analysed():
    columns = make_case(dtype=torch.bfloat16).analyse()
    assert math.isfinite(columns["stability_diff"].sum())
