"""What the names of SAELens's registry tell of its dictionaries."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from daemon.model.catalog import CatalogEntry, Hooks, chosen, entry_of, read_catalog
from daemon.model.hook_points import canonical
from daemon.tools.saes import table_lines
from tests.support.hub_dictionaries import DICTIONARIES, Dictionary

README = Path(__file__).parents[2] / "daemon" / "README.md"


@pytest.fixture(scope="module")
def catalog() -> tuple[CatalogEntry, ...]:
    return read_catalog()


def test_it_has_what_saelens_itself_reads(catalog):
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    assert [(entry.release, entry.id) for entry in catalog] == [
        (name, sae_id) for name, release in releases.items() for sae_id in release.saes_map
    ]
    for entry in catalog:
        release = releases[entry.release]
        assert (entry.model, entry.neuronpedia_id) == (release.model, release.neuronpedia_id[entry.id])
        assert (entry.l0 or 0) == release.expected_l0[entry.id]


@pytest.mark.parametrize(
    "dictionary",
    [entry for entry in DICTIONARIES if not entry.loader],
    ids=lambda dictionary: dictionary.name,
)
def test_places_and_support_are_those_of_the_dictionaries_on_the_hub(dictionary: Dictionary, catalog):
    (entry,) = (e for e in catalog if (e.release, e.id) == (dictionary.release, dictionary.id))
    assert entry.runs == {"refused": "no"}.get(dictionary.support, dictionary.support)
    if entry.hooks is None:
        assert dictionary.hook_name == "hook_embed"
        return
    assert without_layer(entry.hooks.hook_name) == without_layer(dictionary.hook_name)
    assert without_layer(entry.hooks.hook_name_out) == without_layer(dictionary.hook_name_out)


def without_layer(hook_name: str) -> str:
    return canonical(hook_name).partition(".")[2].partition(".")[2] if hook_name else ""


def test_a_width_is_what_the_publisher_writes(catalog):
    widths = {(entry.release, entry.id): entry.width for entry in catalog}
    assert widths["gemma-scope-2b-pt-res-canonical", "layer_12/width_1m/canonical"] == "1m"
    assert widths["gpt2-small-res-jb-feature-splitting", "blocks.8.hook_resid_pre_768"] == "768"
    assert widths["llama_scope_lxm_8x", "l16m_8x"] == "32k"
    assert widths["llama_scope_r1_distill", "l0r_800m_slimpajama"] == "32k"
    assert widths["pythia-70m-deduped-res-sm", "blocks.2.hook_resid_post"] is None
    assert widths["qwen-scope-3.5-27b-w80k-l50", "layer32"] == "80k"
    sizes = {release: width for (release, _), width in widths.items()}
    assert sizes["sae_bench_gemma-2-2b_topk_width-2pow12_date-1109"] == "4k"
    assert sizes["saebench_gemma-2-2b_width-2pow16_date-0107"] == "65k"


@pytest.mark.parametrize(
    ("loader", "sae_id", "path"),
    [
        (None, "encoder-five", "there"),
        ("gemma_2", "layer_5/width_16k", "there"),
        ("gemma_3", "layer_5_width_16k", "elsewhere/layer_5"),
        ("llama_scope", "l5x_8x", "there"),
        ("loader_of_next_year", "layer_5", "there"),
    ],
)
def test_a_name_of_another_form_is_not_guessed(loader, sae_id, path):
    about = {"conversion_func": loader, "model": "gpt2"}
    entry = entry_of("another", about, {"id": sae_id, "path": path})
    assert (entry.hooks, entry.runs, entry.kind) == (None, "unknown", "?")
    assert table_lines([entry])[-1] == f'id = "{sae_id}"'


def test_words_are_looked_for_in_all_names(catalog):
    found = chosen(catalog, ["CANONICAL", "layer_12/width_16k"], "gemma-2-2b")
    assert {entry.hooks for entry in found} == {
        Hooks(12, "blocks.12.hook_resid_post"),
        Hooks(12, "blocks.12.hook_mlp_out"),
        Hooks(12, "blocks.12.attn.hook_z"),
    }


def table(catalog: tuple[CatalogEntry, ...]) -> list[str]:
    """The table of `daemon/README.md`."""
    counts = Counter((entry.kind, entry.runs, entry.why) for entry in catalog)
    kinds = dict.fromkeys(kind for (kind, _, _), _ in counts.most_common())
    rows = ["| reads | packed | padded | not |", "|---|---|---|---|"]
    for kind in (*kinds, None):
        cells = [told(counts, kind, runs) for runs in ("packed", "padded", "no")]
        rows.append(f"| {kind.replace('>', 'and predicts') if kind else 'all'} | {' | '.join(cells)} |")
    return rows


def told(counts: Counter[tuple[str, str, str]], kind: str | None, runs: str) -> str:
    found = {key: n for key, n in counts.items() if key[1] == runs and kind in (None, key[0])}
    reasons = ", ".join(why for _, _, why in found if why) if kind else ""
    return f"{sum(found.values()):,}{f' ({reasons})' if reasons else ''}" if found else ""


def test_the_table_in_the_docs_is_that_of_the_registry(catalog):
    assert "\n".join(table(catalog)) in README.read_text(encoding="utf-8")
