"""Settings as they are written in a TOML file and in the environment: dotted keys with value and origin.

Knows no sections and checks no values.
"""

from __future__ import annotations

import codecs
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from daemon.errors import ConfigError

ENV_PREFIX = "LENSD_"
ENV_NOT_SETTINGS = {"LENSD_CACHE_DIR"}


def toml_layer(path: Path | None) -> Iterator[tuple[str, Any, str]]:
    if path is None:
        return
    try:
        table = tomllib.loads(toml_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None
    for section, value in table.items():
        if isinstance(value, dict) and section not in ("texts", "contrast"):
            if not value:
                yield section, {}, str(path)
            for field, inner in value.items():
                yield f"{section}.{field}", inner, str(path)
        else:
            yield section, value, str(path)


def toml_text(path: Path) -> str:
    """Read the settings of a TOML file, whatever editor saved it. Raises ConfigError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    if b"\0" in content or content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{path}: can't be read: it is UTF-16, or no text: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: can't be read: line {line} is not UTF-8: save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def env_layer(env: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for name, text in sorted(env.items()):
        if not name.startswith(ENV_PREFIX) or name in ENV_NOT_SETTINGS:
            continue
        key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".", 1)
        if "." not in key and key not in ("sae", "recipe", "texts", "contrast"):
            raise ConfigError(
                f"environment {name}: expected {ENV_PREFIX}SECTION__FIELD, e.g. LENSD_MODEL__DTYPE"
            )
        value: Any = text
        if text.startswith(("[", "{")):
            try:
                value = json.loads(text)
            except ValueError as error:
                if "." not in key:
                    raise ConfigError(f"environment {name}: not valid JSON: {error}") from None
                # else text that begins so, such as the address [::]:9478
        yield key, value, f"environment {name}"


def set_dotted(values: dict[str, Any], key: str, value: Any, origin: str) -> None:
    section, _, field = key.partition(".")
    if not field:
        values[section] = value
        return
    into = values.setdefault(section, {})
    if not isinstance(into, dict):
        raise ConfigError(f"{origin}: {section} must be a table, so {key} can't be set")
    into[field] = value
