from __future__ import annotations

import json
from pathlib import Path

import pytest

from daemon.config import Config, load_config
from daemon.errors import ConfigError
from daemon.recipes import BUILT_IN_RECIPES, Contrast


def load(tmp_path: Path, text: str = "", env: dict[str, str] | None = None, **flags: object) -> Config:
    path = tmp_path / "lensd.toml"
    path.write_text(text)
    return load_config(path, env or {}, {key.replace("__", "."): value for key, value in flags.items()})


def test_without_any_setting_the_bundled_preset_is_used():
    config = load_config(None, {})
    assert config.model.name == "smollm2-135m"
    assert [path.name for sae in config.sae if (path := sae.path)] == [
        "blocks.7.hook_resid_post",
        "blocks.15.hook_resid_post",
        "blocks.22.hook_resid_post",
    ]


def test_flags_beat_environment_beats_file_beats_preset(tmp_path):
    text = '[model]\nname = "gemma-2-2b"\n'
    text += "[batching]\nmax_batch_tokens = 1\nwindow_tokens = 1\nmax_text_tokens = 1"
    env = {"LENSD_BATCHING__MAX_BATCH_TOKENS": "2", "LENSD_BATCHING__WINDOW_TOKENS": "2"}
    config = load(tmp_path, text, env, batching__max_batch_tokens="3")
    assert config.model.dtype == "bfloat16"  # the preset's
    assert config.batching.max_text_tokens == 1
    assert config.batching.window_tokens == 2
    assert config.batching.max_batch_tokens == 3


def test_a_preset_names_the_dictionaries_of_the_original_study():
    config = load_config(None, {}, {"model.name": "gemma-2-2b"})
    assert {sae.release for sae in config.sae} == {"gemma-scope-2b-pt-res-canonical"}
    assert [sae.id for sae in config.sae] == [f"layer_{layer}/width_16k/canonical" for layer in (5, 12, 20)]


def test_own_saes_replace_those_of_the_preset(tmp_path):
    config = load(tmp_path, '[model]\nname = "gpt2-small"\n[[sae]]\npath = "mine"')
    assert [str(sae.path) for sae in config.sae] == ["mine"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[modle]\nname = 'x'", "unknown key modle: did you mean model?"),
        ("[model]\nnmae = 'x'", "unknown key model.nmae: did you mean name?"),
        (
            "[model]\ndtype = 'f8'",
            "model.dtype: Input should be 'float32', 'float64', 'bfloat16' or 'float16'",
        ),
        (
            "[batching]\nmax_batch_tokens = -3",
            "batching.max_batch_tokens: expected a number of tokens above 0, or auto (got -3)",
        ),
        ("[http]\naddress = 'x'", "http.address: expected HOST:PORT"),
        ("[[sae]]\npath = 'a'\nrelease = 'b'", "give either path, or release and id"),
        ("[[sae]]\nrelease = 'b'", "release and id go together"),
        ("[texts]\na = 'no field'", "template 'a' names no field"),
        ("[texts]\na = '{x!r}'", "{x} must be a plain field name"),
        ("[texts]\na = '{x'", "template 'a'"),
        ("[texts]\n'a b' = '{x}'", "text name 'a b' must be a word"),
        ("[contrast]\nreference = 'a'\npositive = 'b'\nnegative = 'c'", "[texts] must be given too"),
        (
            "[texts]\na = '{x}'\n[contrast]\nreference = 'a'\npositive = 'b'\nnegative = 'a'",
            "contrast.positive = 'b' is not in [texts]: use one of a",
        ),
        ("[texts]\na = '{x:>9}'", "{x} must be a plain field name"),
        ("[texts]\na = '{x.}'", "{x.} must be a plain field name, or a path such as {meta.source}"),
        ("[texts]\na = '{0[x]}'", "{0[x]} must be a plain field name, or a path"),
        ("[texts]\na = '{x[]}'", "{x[]} must be a plain field name, or a path"),
        ("[texts]\na = '{}'", "{} must be a plain field name, or a path"),
        ("[recipe]\nname = 'a'", "recipe: expected a list of tables: [[recipe]] with name and texts"),
        ("[[recipe]]\nname = 'mine'", "recipe.0.texts: Field required"),
        ("[[recipe]]\nname = 'mine'\ntexts = {}", "recipe.0.texts: expected at least one name = template"),
        ("[[recipe]]\nname = ' '\ntexts = {a = '{x}'}", "recipe.0.name: an empty name is no name"),
        ("[[recipe]]\nname = 'm'\ntexts = {a = '{x!s}'}", "recipe.0.texts: template 'a': {x} must be"),
        ("[[recipe]]\nname = 'm'\ntext = {a = '{x}'}", "unknown key recipe.0.text: did you mean texts?"),
        (
            "[[recipe]]\nname = 'm'\ntexts = {a = '{x}'}\ncontrast = {refrence = 'a'}",
            "unknown key recipe.0.contrast.refrence: did you mean reference?",
        ),
        (
            "[[recipe]]\nname = 'm'\ntexts = {a = '{x}', b = '{y}'}\n"
            "contrast = {reference = 'a', positive = 'b', negative = 'c'}",
            "contrast.negative = 'c' is not in texts of the recipe 'm': use one of a, b",
        ),
        (
            "[[recipe]]\nname = 'm'\ntexts = {a = '{x}', A = '{y}'}",
            "texts of the recipe 'm' would give two columns named n_tokens_a: rename a text",
        ),
        (
            "[[recipe]]\nname = 'text'\ntexts = {a = '{x}'}",
            "two recipes are named 'text': rename one of [[recipe]]",
        ),
        (
            "[[recipe]]\nname = 'one'\ntexts = {a = '{x} {m.y}'}\n"
            "[[recipe]]\nname = 'two'\ntexts = {a = '{x}', b = '{m[0]} {z}'}",
            "recipe 'two' is never taken: records with its fields have those of 'one' (m, x), which comes"
            " first: put the one with more fields first",
        ),
        (
            "[texts]\na = '{x}'\n[[recipe]]\nname = 'same'\ntexts = {b = '{x}'}",
            "recipe 'same' is never taken: records with its fields have those of 'texts' (x), which comes",
        ),
        ("[analysis]\ntokens = 'tool'", "analysis.tokens: Input should be 'all', 'assistant', 'user' or"),
        ("[batching]\nlong_texts = 'cut'", "batching.long_texts: Input should be 'reject', 'keep_end' or"),
        ("[inbox]\nignore = '*.bak'", "inbox.ignore: expected a list of patterns"),
        ("[inbox]\nignore = ['']", "inbox.ignore.0: expected a pattern of file names"),
        ("[inbox]\nignore = ['old/*.json']", "inbox.ignore.0: expected a pattern of file names"),
        ("[inbox]\npath = 'in\\u0000box'".replace("'", '"'), "inbox.path: a path can't hold a NUL"),
        ("[outbox]\npath = '~/out'", "outbox.path: ~ is not expanded in settings"),
        ("model = 3", "model: Input should be a valid dictionary"),
        ("[model\n", "not valid TOML"),
    ],
)
def test_a_bad_file_is_one_line_naming_the_file_the_key_and_what_is_allowed(tmp_path, text, expected):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert expected in message
    assert str(tmp_path / "lensd.toml") in message
    assert "\n" not in message


SAVED = '[model]\ndtype = "float64"\n[texts]\nt = "{größe}"\n'


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_is_read_however_an_editor_saved_it(tmp_path, encoding, newline):
    path = tmp_path / "lensd.toml"
    path.write_bytes(SAVED.replace("\n", newline).encode(encoding))
    config = load_config(path, {})
    assert (config.model.dtype, config.texts) == ("float64", {"t": "{größe}"})


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-16", "it is UTF-16"),
        ("utf-16-le", "it is UTF-16"),
        ("utf-16-be", "it is UTF-16"),
        ("utf-32", "it is UTF-16"),
        ("latin-1", "line 4 is not UTF-8"),
    ],
)
def test_a_file_in_another_encoding_is_one_line_that_says_so(tmp_path, encoding, expected):
    path = tmp_path / "lensd.toml"
    path.write_bytes(SAVED.encode(encoding))
    with pytest.raises(ConfigError, match=rf"lensd\.toml: can't be read: {expected}.*UTF-8$") as caught:
        load_config(path, {})
    assert "\n" not in str(caught.value)


def test_a_bad_variable_is_named():
    with pytest.raises(ConfigError, match=r"^environment LENSD_MODEL__DTYPE: model\.dtype"):
        load_config(None, {"LENSD_MODEL__DTYPE": "x"})
    with pytest.raises(ConfigError, match="environment LENSD_MODLE: expected LENSD_SECTION__FIELD"):
        load_config(None, {"LENSD_MODLE": "x"})


def test_a_variable_can_hold_a_list_as_json():
    config = load_config(None, {"LENSD_SAE": '[{"path": "a"}]', "LENSD_TEXTS": '{"t": "{body}"}'})
    assert str(config.sae[0].path) == "a"
    assert config.recipes[0].text_names == ("t",)


def test_a_bad_flag_is_named():
    with pytest.raises(ConfigError, match=r"^flag: inbox\.settle_seconds: .* \(got -1\)$"):
        load_config(None, {}, {"inbox.settle_seconds": -1})


def test_a_missing_file_and_a_model_without_saes_say_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such config file"):
        load_config(tmp_path / "nowhere.toml", {})
    with pytest.raises(
        ConfigError, match=r"not a preset \(gemma-2-2b, gpt2-small, smollm2-135m\): add \[\[sae\]\]"
    ):
        load_config(None, {}, {"model.name": "some/model"})


def test_only_settings_that_change_results_change_the_fingerprint(tmp_path):
    base = load(tmp_path).results_fingerprint()
    assert load(tmp_path, "[batching]\nmax_batch_tokens = 7").results_fingerprint() == base
    assert load(tmp_path, "[analysis]\nseed = 7").results_fingerprint() != base
    assert load(tmp_path, "[model]\ndtype = 'float64'").results_fingerprint() != base
    assert load(tmp_path, "[texts]\na = '{x}'").results_fingerprint() != base
    own = "[[recipe]]\nname = 'm'\ntexts = {a = '{x}'}\n"
    assert load(tmp_path, own).results_fingerprint() != base
    assert (
        load(tmp_path, own.replace("{x}", "{y}")).results_fingerprint()
        != load(tmp_path, own).results_fingerprint()
    )
    assert load(tmp_path, "[analysis]\ntokens = 'user'").results_fingerprint() != base
    assert load(tmp_path, "[batching]\nlong_texts = 'keep_end'").results_fingerprint() != base


def test_recipes_are_tried_in_the_order_in_which_they_are_written(tmp_path):
    text = "[texts]\na = '{w}'\n[[recipe]]\nname = 'one'\ntexts = {b = '{meta.x}'}\n"
    text += "[[recipe]]\nname = 'two'\ntexts = {a = '{x}', b = '{y}', c = '{z}'}\n"
    text += "contrast = {reference = 'a', positive = 'b', negative = 'c'}"
    recipes = load(tmp_path, text).recipes
    assert [recipe.name for recipe in recipes[:3]] == ["texts", "one", "two"]
    assert recipes[3:] == BUILT_IN_RECIPES == load(tmp_path).recipes
    assert (recipes[1].fields, recipes[1].places) == ({"meta"}, {"meta.x": False})
    assert recipes[2].contrast == Contrast("a", "b", "c")
    of_variable = load(tmp_path, env={"LENSD_RECIPE": '[{"name": "v", "texts": {"t": "{body}"}}]'})
    assert of_variable.recipes[0].text_names == ("t",)


@pytest.mark.parametrize("name", ["12_16k", "l12-16k", "l12 16k", "a.b"])
def test_a_dictionarys_name_is_a_word(tmp_path, name):
    with pytest.raises(ConfigError, match=r"sae\.0\.name: expected a word, since it names columns"):
        load(tmp_path, f"[[sae]]\npath = 'a'\nname = '{name}'")


def test_dictionaries_have_names_that_differ_by_more_than_case(tmp_path):
    two = "[[sae]]\npath = 'a'\nname = 'wide'\n[[sae]]\npath = 'b'\nname = '{}'"
    with pytest.raises(ConfigError, match="two \\[\\[sae\\]\\] have the name wide"):
        load(tmp_path, two.format("Wide"))
    assert [sae.name for sae in load(tmp_path, two.format("narrow")).sae] == ["wide", "narrow"]


EMPTY = "an empty path is no path"
NAMELESS = "an empty name is no name"


@pytest.mark.parametrize("blank", ["", " ", "\t\n"], ids=["empty", "a space", "a tab and a newline"])
@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("inbox.path", EMPTY),
        ("outbox.path", EMPTY),
        ("model.name", NAMELESS),
        ("model.device", NAMELESS),
        ("http.address", "expected HOST:PORT"),
    ],
)
@pytest.mark.parametrize("origin", ["file", "environment", "flag"])
def test_an_empty_path_or_name_is_refused_with_its_origin(tmp_path, origin, key, said, blank):
    section, _, field = key.partition(".")
    variable = f"LENSD_{section.upper()}__{field.upper()}"
    text = f"[{section}]\n{field} = {blank!r}\n" if origin == "file" else ""
    text = text.replace("'", '"')
    env = {variable: blank} if origin == "environment" else {}
    flags = {key.replace(".", "__"): blank} if origin == "flag" else {}
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, env, **flags)
    where = {"file": str(tmp_path / "lensd.toml"), "environment": f"environment {variable}", "flag": "flag"}
    assert str(caught.value).startswith(f"{where[origin]}: {key}: {said}")


@pytest.mark.parametrize(
    "entry", [{"path": ""}, {"path": " "}, {"release": "", "id": ""}, {"release": "a", "id": " "}]
)
def test_an_empty_dictionary_is_refused_from_file_and_environment(tmp_path, entry):
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in entry.items())
    with pytest.raises(ConfigError, match=r"lensd\.toml: sae\.0\.\w+: an empty (path|name)"):
        load(tmp_path, f"[[sae]]\n{lines}")
    with pytest.raises(ConfigError, match=r"environment LENSD_SAE: sae\.0\.\w+: an empty (path|name)"):
        load(tmp_path, env={"LENSD_SAE": json.dumps([entry])})


def test_an_empty_model_is_refused_beside_own_dictionaries(tmp_path):
    with pytest.raises(ConfigError, match=NAMELESS):
        load(tmp_path, "[model]\nname = ''\n[[sae]]\npath = 'mine'")


def test_patterns_of_names_come_from_file_and_environment(tmp_path):
    assert load(tmp_path, "[inbox]\nignore = ['*.bak.json', 'draft-*']").inbox.ignore == (
        "*.bak.json",
        "draft-*",
    )
    assert load(tmp_path, env={"LENSD_INBOX__IGNORE": '["x*"]'}).inbox.ignore == ("x*",)
    base = load(tmp_path)
    assert load(tmp_path, "[inbox]\nignore = ['x*']").results_fingerprint() == base.results_fingerprint()


@pytest.mark.parametrize("value", ["x", "", "3", '{"path": "mine"}'])
def test_dictionaries_of_the_environment_say_what_a_value_looks_like(tmp_path, value):
    with pytest.raises(ConfigError, match=r"^environment LENSD_SAE: sae: expected a list: .*\[\{\"path\":"):
        load(tmp_path, env={"LENSD_SAE": value})


@pytest.mark.parametrize("text", ["sae = 'mine'", "[sae]\npath = 'mine'", "sae = ['mine']"])
def test_dictionaries_of_a_file_say_what_a_value_looks_like(tmp_path, text):
    with pytest.raises(ConfigError, match=r"lensd\.toml: sae(\.0)?: expected .*\[\[sae\]\]"):
        load(tmp_path, text)


@pytest.mark.parametrize("key", ["texts", "contrast"])
def test_tables_of_the_environment_say_what_a_value_looks_like(tmp_path, key):
    with pytest.raises(
        ConfigError, match=rf"^environment LENSD_{key.upper()}: {key}: expected .* JSON, such as"
    ):
        load(tmp_path, env={f"LENSD_{key.upper()}": "x"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model]\nname = 'x/y'\nnmae = 1", "unknown key model.nmae: did you mean name?"),
        ("[model]\nnmae = 1\ndtype = 'f8'", "unknown key model.nmae: did you mean name?"),
        (
            "[model]\nname = 'x/y'\n[bathcing]\nwindow_tokens = 1",
            "unknown key bathcing: did you mean batching?",
        ),
        ("[model]\nname = 'x/y'\n[[saes]]\npath = 'x'", "unknown key saes: did you mean sae?"),
        ("[model]\nname = 'x/y'", "no [[sae]] is configured and model.name = 'x/y' is not a preset"),
    ],
)
def test_an_unknown_key_is_named_before_what_it_leaves_unsaid(tmp_path, text, said):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert said in str(caught.value)


def test_a_template_with_half_a_character_is_refused():
    """Only JSON in the environment can hold one."""
    env = {"LENSD_TEXTS": '{"a": "\\ud800 {x}"}'}
    with pytest.raises(ConfigError, match="template 'a' has an unpaired surrogate, which is no character"):
        load_config(None, env)
