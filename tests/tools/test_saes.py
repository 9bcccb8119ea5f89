"""`lensd saes` and `lensd init`."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pytest

from daemon.cli import main
from daemon.config import load_config


def test_releases_are_listed_with_what_runs(capsys):
    assert main(["saes", "--model", "gpt2-small"]) == 0
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first.split() == ["release", "model", "dictionaries", "layers", "reads", "width", "runs"]
    assert second.split() == [
        "gpt2-small-attn-out-v5-128k", "gpt2-small", "12", "0-11", "attn_out", "128k", "packed",
    ]  # fmt: skip
    assert last.startswith("159 dictionaries in 18 releases: 159 run packed, 0 padded, 0 do not;")


def test_a_few_of_one_release_come_with_lines_to_paste(capsys, tmp_path):
    assert main(["saes", "gemma-scope-2b-pt-res-canonical", "layer_20"]) == 0
    out = capsys.readouterr().out
    assert "layer_20/width_65k/canonical  20     resid_post  65k        packed" in out
    pasted = tomllib.loads(out[out.index("[[sae]]") :])["sae"]
    assert pasted == [
        {"release": "gemma-scope-2b-pt-res-canonical", "id": f"layer_20/width_{width}/canonical"}
        for width in ("16k", "262k", "32k", "524k", "65k", "1m")
        if f"width_{width}/" in out
    ]


def test_the_whole_name_of_a_release_means_that_one_alone(capsys):
    assert main(["saes", "gemma-scope-2b-pt-res", "layer_12/width_16k"]) == 0
    assert "canonical" not in capsys.readouterr().out


def test_json_has_all_that_is_known(capsys):
    assert main(["saes", "temporal-sae-gemma-2-2b", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry == {
        "release": "temporal-sae-gemma-2-2b",
        "id": "blocks.12.hook_resid_post",
        "model": "gemma-2-2b",
        "layer": 12,
        "hook_name": "blocks.12.hook_resid_post",
        "hook_name_out": None,
        "width": None,
        "l0": 192,
        "neuronpedia_id": "gemma-2-2b/12-temporal-res",
        "runs": "no",
        "why": "attends across positions",
    }


def test_a_word_that_nothing_has_is_one_line(capsys):
    assert main(["saes", "gpt2-small-res-jbb"]) == 2
    assert capsys.readouterr().err == (
        "lensd: no dictionary of SAELens's list matches gpt2-small-res-jbb: did you mean"
        " gpt2-small-res-jb or gpt2-small-res_sll-ajt or gpt2-small-res_sle-ajt?\n"
    )


def test_the_registry_is_read_without_its_library():
    code = "import sys; from daemon.cli import main; main(['saes']); sys.exit('sae_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_init_writes_settings_of_a_release(capsys, tmp_path):
    file = tmp_path / "lensd.toml"
    assert main(["init", "--release", "gemma-scope-2b-pt-res", "-o", str(file)]) == 0
    config = load_config(file, {}, {})
    assert config.model.name == "gemma-2-2b"
    assert [sae.id for sae in config.sae] == [
        "layer_6/width_16k/average_l0_70",
        "layer_12/width_16k/average_l0_82",
        "layer_19/width_16k/average_l0_73",
    ]
    assert main(["init", "-o", str(file)]) == 2
    assert "is there already: remove it, or name another with -o" in capsys.readouterr().err


def test_init_alone_writes_the_bundled_model(tmp_path):
    file = tmp_path / "lensd.toml"
    assert main(["init", "-o", str(file)]) == 0
    assert load_config(file, {}, {}) == load_config(None, {}, {})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--release", "gemma-scope-2b-pt-ress"], "did you mean gemma-scope-2b-pt-res or "),
        (["--model", "gemma-2-2b"], "gemma-2-2b: 20 releases, such as gemma-scope-2b-pt-att, "),
        (["--release", "temporal-sae-gemma-2-2b"], "not: attends across positions: choose another"),
    ],
)
def test_init_says_what_it_can_not_choose(arguments, said, tmp_path, capsys):
    file = tmp_path / "lensd.toml"
    assert main(["init", *arguments, "-o", str(file)]) == 2
    assert said in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize("folder", ["nope", "file"])
def test_init_names_a_folder_that_is_not_there(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["init", "-o", str(tmp_path / folder / "x.toml")]) == 2
    assert capsys.readouterr().err == (
        f"lensd: {tmp_path / folder}: no such folder: make it, or name another file with -o\n"
    )
