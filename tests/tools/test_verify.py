"""`lensd verify` against engines that are wrong, and with every kind of dictionary."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from daemon.analysis.columns import Column, analysis_columns
from daemon.config import Config, load_config
from daemon.errors import FileError
from daemon.model.padded_engine import PaddedEngine
from daemon.model.positions import SaeStage
from daemon.model.trie_engine import TrieEngine
from daemon.recipes import CONTRAST_RECIPE
from daemon.tools import oracle
from daemon.tools.verify import Verification, axis_gap, column_difference, verify
from tests.support import tiny
from tests.support.families import save_family
from tests.test_not_finite import UNPROBED, save_overflowing


def configured(folder: Path, model: Path, *saes: Path) -> Config:
    toml = folder / "lensd.toml"
    toml.write_text(tiny.Tiny(model, saes).toml())
    return load_config(toml, {}, {"model.dtype": "float64", "batching.max_batch_tokens": 512})


def verified(folder: Path, config: Config) -> Verification:
    return verify(
        config,
        tiny.write_json(folder / "in.json", tiny.contrast_records(5)),
        samples=None,
        batch_sizes=(1, 4),
    )


def test_completions_are_compared_at_their_last_tokens(tmp_path, monkeypatch):
    """A text is read at its last token that counts: the oracle reads it up to there."""
    config = configured(
        tmp_path, tiny.save_llama(tmp_path / "m"), tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
    )
    config = config.model_copy(
        update={"analysis": config.analysis.model_copy(update={"tokens": "completion"})}
    )

    def but_the_last(ends, start):
        return bytes([end > start for end in ends[:-1]]) + b"\0"

    monkeypatch.setattr("daemon.source.tokenizer.completion_mask", but_the_last)
    assert verified(tmp_path, config).passed
    choose = SaeStage.choose
    monkeypatch.setattr(
        SaeStage, "choose", lambda stage, path, offsets, ids, counted: choose(stage, path, offsets, ids)
    )
    assert not verified(tmp_path, config).passed


@pytest.mark.parametrize(
    ("engine", "family", "hook"),
    [
        (PaddedEngine, "bloom", "hook_resid_post"),
        (TrieEngine, "llama", "hook_resid_post"),
        (TrieEngine, "llama", "hook_mlp_out"),
    ],
)
def test_an_engine_that_is_wrong_for_every_text_alike_is_found_out(
    engine, family, hook, tmp_path, monkeypatch
):
    """Also where its batches agree with its single texts."""
    config = configured(
        tmp_path, save_family(tmp_path / "m", family), tiny.save_sae(tmp_path / "s", f"blocks.1.{hook}")
    )
    assert verified(tmp_path, config).passed
    right = engine.residuals

    def wrong(*args):
        return tuple([x * 1.01 for x in values] for values in right(*args))

    monkeypatch.setattr(engine, "residuals", wrong)
    assert not verified(tmp_path, config).passed


@pytest.mark.parametrize("family", ["gemma2", "gptj", "bloom", "granite"])
def test_what_families_add_to_the_residual_stream(family, tmp_path):
    saes = [
        tiny.save_sae(tmp_path / "a", "blocks.0.hook_attn_out", architecture="topk"),
        tiny.save_transcoder(
            tmp_path / "b", "blocks.1.ln1.hook_normalized", "blocks.1.hook_mlp_out", d_out=tiny.D_MODEL
        ),
        tiny.save_sae(tmp_path / "c", "blocks.2.attn.hook_z", architecture="standard"),
    ]
    assert verified(tmp_path, configured(tmp_path, save_family(tmp_path / "m", family), *saes)).passed


@pytest.mark.parametrize(
    "architecture", ["transcoder", "jumprelu_transcoder", "skip_transcoder", "jumprelu_skip_transcoder"]
)
def test_transcoders_between_residual_streams(architecture, tmp_path):
    """They read one place and predict another, both of which the packed engine has."""
    sae = tiny.save_transcoder(
        tmp_path / "s",
        "blocks.1.hook_resid_pre",
        "blocks.2.hook_resid_post",
        architecture=architecture,
        d_out=tiny.D_MODEL,
    )
    other = tiny.save_sae(tmp_path / "t", "blocks.2.hook_resid_post")
    assert verified(tmp_path, configured(tmp_path, tiny.save_llama(tmp_path / "m"), sae, other)).passed


@pytest.mark.parametrize("hook", ["hook_resid_pre", "hook_attn_out"])
def test_centred_dictionaries(hook, tmp_path):
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    sae = tiny.save_sae(tmp_path / "s", f"blocks.1.{hook}", **centred)
    assert verified(tmp_path, configured(tmp_path, tiny.save_gpt2(tmp_path / "m"), sae)).passed


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("hook", ["hook_resid_post", "hook_mlp_out"])
def test_dictionaries_that_normalise_as_they_run(hook, normalisation, tmp_path):
    sae = tiny.save_sae(tmp_path / "s", f"blocks.1.{hook}")
    tiny.overwrite_sae_config(sae, normalize_activations=normalisation)
    assert verified(tmp_path, configured(tmp_path, tiny.save_llama(tmp_path / "m"), sae)).passed


def test_several_dictionaries_at_a_layer_in_both_ways_of_reading(tmp_path):
    saes = [
        tiny.save_sae(tmp_path / "a", "blocks.1.hook_resid_post", d_sae=64, prepend_bos=False),
        tiny.save_sae(tmp_path / "b", "blocks.1.hook_resid_post", d_sae=128, seed=1),
        tiny.save_sae(tmp_path / "c", "blocks.1.hook_mlp_out", architecture="topk", seed=2),
        tiny.save_sae(tmp_path / "d", "blocks.2.hook_resid_post", seed=3, prepend_bos=False),
    ]
    verification = verified(tmp_path, configured(tmp_path, tiny.save_llama(tmp_path / "m"), *saes))
    assert verification.passed
    columns = {difference.column for difference in verification.reports[0].columns}
    assert {"l1_64_fact_gini", "l1_128_fact_gini", "l1_mlp_96_fact_gini", "l2_fact_gini"} <= columns


def test_the_oracle_runs_no_engine_no_encoder_and_no_loader_of_the_daemon():
    tree = ast.parse(inspect.getsource(oracle))
    ours = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("daemon.model")
        for alias in node.names
    }
    assert ours == {
        "daemon.model.auto_class.auto_class",
        "daemon.model.float64.full_precision",
        "daemon.model.hub.Hub",  # which files are read
        "daemon.model.hub.repository_of",
        "daemon.model.hub.serving",
        "daemon.model.location.fetch_weights",
        "daemon.model.location.locate_model",
        "daemon.model.loading.resolve_device",
        "daemon.model.pickles.refused_pickles",
        "daemon.model.pickles.weights_only_pickles",
        "daemon.model.placement.asked_map",
        "daemon.model.plain_hooks.PlainHooks",
        "daemon.model.plain_trace.Unreachable",
        "daemon.model.smollm2.default_cache_dir",
    }


def test_samples_that_are_not_finite_are_left_out_on_both_sides(tmp_path, monkeypatch):
    """They are rejects; what is one on one side only is a mismatch."""
    sae = tiny.random_sae("blocks.1.hook_resid_post", architecture="standard")
    sae.save_model(tmp_path / "s")
    config = configured(tmp_path, save_overflowing(tmp_path / "m", UNPROBED, torch.float64), tmp_path / "s")
    records = tiny.contrast_records(5)
    records[3]["fact"] = UNPROBED
    file = tiny.write_json(tmp_path / "in.json", records)
    found = verify(config, file, samples=None, batch_sizes=(1, 4))
    assert found.passed
    assert (found.samples, found.rejects) == (5, 1)
    monkeypatch.setattr("daemon.tools.verify.is_finite", lambda layer: False)
    assert not verify(config, file, samples=None, batch_sizes=(4,)).passed


def test_a_file_without_a_usable_record_agrees_with_nothing(tmp_path):
    made = tiny.make_tiny(tmp_path)
    (tmp_path / "lensd.toml").write_text(made.toml())
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    config = load_config(tmp_path / "lensd.toml", {}, {"batching.max_batch_tokens": 512})
    with pytest.raises(FileError, match="none of its records can be used"):
        verify(config, tmp_path / "empty.jsonl", samples=None, batch_sizes=(1,))


def test_an_axis_may_turn_by_as_much_more_as_its_eigenvalues_are_close():
    """A tensor of eigenvalues 1 and 1 - g whose rounding is r: its axis turns by about r / g."""
    rounding = 1e-7
    angles, moved, elongations = [], [], []
    for gap in (0.5, 1e-3):
        tensor = np.diag([1.0, 1.0 - gap, 0.1])
        turned = tensor + rounding * np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0.0]])
        for matrix, found in ((tensor, angles), (turned, moved)):
            axis = np.linalg.eigh(matrix)[1][:, -1]
            found.append(np.degrees(np.arccos(abs(axis @ np.array([0.6, 0.8, 0.0])))))
        elongations.append(np.sqrt(1.0 - gap))
    column = Column("axis_twist_fact", "float")
    values = {"l3_prompt_elongation": [0.2, 0.2], "l3_fact_elongation": elongations}
    gap = axis_gap(column, ["l3", "l7"], CONTRAST_RECIPE, values)
    np.testing.assert_allclose(gap, [0.5, 1e-3])
    close = column_difference(column, np.array(angles, object), np.array(moved, object), 1.0)
    weighted = column_difference(column, np.array(angles, object), np.array(moved, object), gap)
    assert weighted.absolute == close.absolute
    assert close.relative > 1e-4 > 1e-6 > weighted.relative > 0


def test_only_angles_of_axes_are_weighted_with_a_gap():
    weighted = [
        column.name
        for column in analysis_columns(["l0", "l1"], CONTRAST_RECIPE)
        if axis_gap(column, ["l0", "l1"], CONTRAST_RECIPE, defaultdict(lambda: [0.5])) is not None
    ]
    assert weighted == [
        *(f"l{layer}_{text}_misalignment" for layer in (0, 1) for text in CONTRAST_RECIPE.text_names),
        *(f"axis_twist_{side}" for side in ("fact", "hall", "diff")),
    ]
