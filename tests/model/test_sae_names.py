from __future__ import annotations

import pytest

from daemon.errors import ConfigError
from daemon.model.sae_names import names_of, width_word
from daemon.model_info import SaeInfo


def info(
    hook: str = "hook_resid_post",
    layer: int = 12,
    d_sae: int = 16384,
    source: str = "release/id",
    architecture: str = "jumprelu",
) -> SaeInfo:
    hook = f"blocks.{layer}.{hook}"
    return SaeInfo(hook, hook, layer, 8, d_sae, 8, architecture, source, "h")


def named(*infos: SaeInfo, **given: str) -> list[str]:
    """`given` maps `n0`, `n1`... to names."""
    return list(names_of(infos, [given.get(f"n{number}") for number in range(len(infos))]))


def test_the_only_dictionary_of_a_layer_is_named_by_the_layer():
    assert named(info(layer=5), info("hook_mlp_out", 12), info(layer=20)) == ["l5", "l12", "l20"]


def test_several_of_a_layer_are_named_by_place_and_width():
    infos = [
        info(),
        info(d_sae=65536),
        info(d_sae=1 << 20),
        info("hook_mlp_out"),
        info("hook_attn_out"),
        info("hook_resid_mid"),
        info("hook_resid_pre"),
        info("attn.hook_z"),
        info("hook_mlp_in", architecture="jumprelu_transcoder"),
        info("ln2.hook_normalized"),
        info(layer=13),
    ]
    assert named(*infos) == [
        "l12_16k",
        "l12_65k",
        "l12_1m",
        "l12_mlp_16k",
        "l12_attn_16k",
        "l12_mid_16k",
        "l12_pre_16k",
        "l12_z_16k",
        "l12_transcoder_16k",
        "l12_ln2_normalized_16k",
        "l13",
    ]


@pytest.mark.parametrize(
    ("d_sae", "word"),
    [
        (96, "96"),
        (2304, "2304"),
        (4096, "4k"),
        (8192, "8k"),
        (24576, "24k"),
        (131072, "131k"),
        (262144, "262k"),
    ],
)
def test_widths_are_written_as_people_write_them(d_sae, word):
    assert width_word(d_sae) == word


def test_those_alike_are_told_apart_by_exact_width_or_by_the_sparsity_in_their_ids():
    assert named(info(d_sae=16384), info(d_sae=16400)) == ["l12_16k_16384", "l12_16k_16400"]
    ids = [f"gemma-scope/layer_12/width_16k/average_l0_{l0}" for l0 in (22, 82)]
    assert named(*(info(source=one) for one in ids)) == ["l12_16k_l0_22", "l12_16k_l0_82"]
    ids = [f"gemma-scope-2/layer_12_width_16k_l0_{l0}" for l0 in ("small", "medium")]
    assert named(*(info(source=one) for one in ids)) == ["l12_16k_l0_small", "l12_16k_l0_medium"]


def test_those_that_nothing_tells_apart_are_refused_in_one_line():
    with pytest.raises(
        ConfigError, match=r"^SAEs a and b would both be named l12_16k: give one of them another by name in"
    ):
        named(info(source="a"), info(source="b"))
    assert named(info(source="a"), info(source="b"), n1="other") == ["l12_16k", "other"]


def test_a_given_name_is_no_other_dictionarys_in_whatever_case():
    with pytest.raises(ConfigError, match=r"SAEs a and b would both be named L13"):
        named(info(source="a"), info(layer=13, source="b"), n0="L13")
