"""The configuration: defaults, a preset, a TOML file, the environment and flags, merged and checked once.

Layers, weakest first: the defaults below, the preset that `model.name` names, the TOML file,
`LENSD_SECTION__FIELD` variables, flags. Inner code receives the few values it needs, never this whole.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from daemon.errors import ConfigError
from daemon.recipe_settings import (
    ContrastSection,
    RecipeSection,
    check_columns,
    check_contrast,
    check_order,
    check_recipes,
    checked_texts,
    recipe_of,
)
from daemon.recipes import BUILT_IN_RECIPES, Recipe, configured
from daemon.records import CountedTokens, LongTexts, Positions
from daemon.setting_layers import env_layer, set_dotted, toml_layer
from daemon.setting_types import (
    BatchTokens,
    NamePatterns,
    Section,
    SettingName,
    SettingPath,
    SettingRevision,
    WorkerGpus,
    Workers,
)

PRESETS = Path(__file__).parent / "presets"
DEFAULT_MODEL = "smollm2-135m"
TABLES_LOOK = {  # as environment variables
    "texts": '{"question": "{prompt}"}',
    "contrast": '{"reference": "question", "positive": "right", "negative": "wrong"}',
}

Dtype = Literal["float32", "float64", "bfloat16", "float16"]


class ModelSection(Section):
    name: SettingName = DEFAULT_MODEL  # bundled preset, local folder, TransformerLens or Hugging Face name
    revision: SettingRevision | None = None  # branch, tag or commit of a hub's model; None: main
    dtype: Dtype = "float32"
    device: SettingName = "auto"  # auto, cpu, cuda, cuda:N, mps
    device_map: Literal["none", "auto"] = "none"  # auto: one model spread over the devices of this host
    quantization: Literal["none"] = "none"
    compile: Literal["auto", "off"] = "auto"  # layers and attention by torch.compile: on CUDA, where it pays

    @model_validator(mode="after")
    def check_device_map(self) -> ModelSection:
        if self.device_map != "none" and self.device != "auto":
            raise ValueError(
                f"device_map = {self.device_map!r} spreads the model over all devices, and device ="
                f" {self.device!r} names one: leave one of the two out"
            )
        return self


SAE_LOOKS = (
    '[[sae]] with path, or with release and id; in the environment JSON, such as [{"path": "my-dictionary"}]'
)


class SaeSection(Section):
    """One dictionary: `release` and `id` as SAELens names them, or `path` to a SAELens folder."""

    release: SettingName | None = None
    id: SettingName | None = None
    path: SettingPath | None = None
    revision: SettingRevision | None = None  # branch, tag or commit of the release's repository; None: main
    name: SettingName | None = None  # with which its columns begin; None: made from layer, hook and width
    prepend_bos: bool | None = None  # whether it reads texts with BOS; None: as its metadata says

    @field_validator("name")
    @classmethod
    def check_name(cls, value: str | None) -> str | None:
        if value is not None and not value.isidentifier():
            raise ValueError("expected a word, since it names columns, such as l12_16k")
        return value

    @model_validator(mode="after")
    def check_one_source(self) -> SaeSection:
        if (self.path is None) == (self.release is None):
            raise ValueError("give either path, or release and id")
        if (self.release is None) != (self.id is None):
            raise ValueError("release and id go together")
        if self.revision is not None and self.release is None:
            raise ValueError("revision goes with release and id: a folder has none")
        return self


def check_sae(value: Any) -> Any:
    """Raises ValueError for what is no table."""
    if not isinstance(value, Mapping | SaeSection):
        raise ValueError(f"expected a table: {SAE_LOOKS}")
    return value


def check_saes(value: Any) -> Any:
    """Raises ValueError for one dictionary, or none, where a list of them is due."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list: {SAE_LOOKS}")
    return value


class AnalysisSection(Section):
    tokens: CountedTokens = "all"  # of a text that count; of a prompt itself all do
    positions: Positions = "last"  # of these, that are read; mean and max pool their features
    seed: int = 0  # of the stability noise
    noise_sigma: NonNegativeFloat = 0.1  # standard deviation, in units of the residual stream
    noise_draws: Annotated[int, Field(ge=1, le=256)] = 8  # draws per text, out of the noise bank
    stability_top_k: PositiveInt = 10  # features compared
    entropy_top_k: PositiveInt = 50  # features whose magnitudes are normalised


class BatchingSection(Section):
    max_batch_tokens: BatchTokens = "auto"  # tokens per forward pass; auto: measured once, and remembered
    max_batch_samples: PositiveInt | None = None  # samples per forward pass
    max_text_tokens: PositiveInt = 1024
    long_texts: LongTexts = "reject"  # of more tokens; or cut, BOS kept: keep_end, keep_start
    window_tokens: PositiveInt = 65_536  # tokens sorted by length at a time, and queued ahead


class ExecutorSection(Section):
    """Who runs batches: this process, or the workers of a Ray cluster, each with a model of its own."""

    kind: Literal["local", "ray"] = "local"
    workers: Workers = "auto"  # processes; auto: one for each GPU, or for every worker_cpus cores
    worker_cpus: PositiveInt = 1  # cores of a worker
    worker_gpus: WorkerGpus = (
        "auto"  # GPUs of a worker, or a share of one; auto: one where the cluster has some
    )
    address: SettingName = "auto"  # the head's HOST:PORT; auto: RAY_ADDRESS, else a cluster is started here


class InboxSection(Section):
    path: SettingPath = Path("inbox")
    ignore: NamePatterns = ()  # glob patterns of names that are somebody else's
    settle_seconds: NonNegativeFloat = 1.0  # a file must be unchanged this long
    rescan_seconds: PositiveFloat = 5.0
    max_attempts: PositiveInt = 3
    on_success: Literal["move", "delete"] = "move"  # to done/, or delete
    max_record_bytes: PositiveInt = 1 << 20  # of a record as JSON
    max_nesting: PositiveInt = 32
    max_decompressed_bytes: PositiveInt = 64 << 30  # of a compressed or Parquet file's content
    max_compression_ratio: PositiveInt = 1000  # of a compressed or Parquet file's content to the file
    max_zstd_window_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 31)] = 128 << 20  # held of a .zst stream
    part_records: PositiveInt = 1024


class OutboxSection(Section):
    path: SettingPath = Path("outbox")
    values: Literal["float32", "float16"] = "float32"  # type of stored activations
    min_free_bytes: NonNegativeInt = 256 << 20  # of the disk; with less, no file is taken up


class ReportSection(Section):
    """The page of findings, which `lensd report` makes of an outbox at any time."""

    each_file: bool = False  # report.html in every published folder; holds text, and is served with http


class HttpSection(Section):
    enabled: bool = True
    address: str = "127.0.0.1:9478"  # host:port
    stall_seconds: PositiveFloat = 120.0  # a device busy on one batch for longer is not live

    @field_validator("address")
    @classmethod
    def check_address(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host.strip() or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError("expected HOST:PORT, e.g. 127.0.0.1:9478")
        return value


class LogSection(Section):
    format: Literal["auto", "console", "json"] = "auto"  # auto: console on a terminal, else json
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section):
    model: ModelSection = ModelSection()
    sae: Annotated[
        tuple[Annotated[SaeSection, BeforeValidator(check_sae)], ...],
        Field(min_length=1),
        BeforeValidator(check_saes),
    ]
    texts: dict[str, str] | None = None  # name -> template; a recipe that is tried before all others
    contrast: ContrastSection | None = None
    recipe: Annotated[tuple[RecipeSection, ...], BeforeValidator(check_recipes)] = ()
    analysis: AnalysisSection = AnalysisSection()
    batching: BatchingSection = BatchingSection()
    executor: ExecutorSection = ExecutorSection()
    inbox: InboxSection = InboxSection()
    outbox: OutboxSection = OutboxSection()
    report: ReportSection = ReportSection()
    http: HttpSection = HttpSection()
    log: LogSection = LogSection()

    @field_validator("texts")
    @classmethod
    def check_texts(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        return None if value is None else checked_texts(value)

    @model_validator(mode="after")
    def check_contrast(self) -> Config:
        if self.texts is None:
            if self.contrast is not None:
                raise ValueError("[contrast] names texts, so [texts] must be given too")
            return self
        check_contrast(self.contrast, self.texts, "[texts]")
        check_columns(recipe_of(self.texts, self.contrast), "[texts]")
        return self

    @model_validator(mode="after")
    def check_recipe_names(self) -> Config:
        names = Counter(recipe.name for recipe in self.recipes)
        ((name, times),) = names.most_common(1)
        if times > 1:
            raise ValueError(f"two recipes are named {name!r}: rename one of [[recipe]]")
        check_order(configured(self.recipes))
        return self

    @model_validator(mode="after")
    def check_names(self) -> Config:
        """Names that are given, as far as they can be judged before the dictionaries are loaded."""
        given = [sae.name for sae in self.sae if sae.name is not None]
        ((name, times),) = Counter(map(str.casefold, given)).most_common(1) or [("", 0)]
        if times > 1:
            raise ValueError(f"two [[sae]] have the name {name}: names differ, and not by case alone")
        return self

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes in the order in which they are tried: a file takes the first whose fields it has."""
        own = () if self.texts is None else (recipe_of(self.texts, self.contrast),)
        return (*own, *(section.recipe for section in self.recipe), *BUILT_IN_RECIPES)

    def results_fingerprint(self) -> str:
        """Canonical JSON of every setting that changes results; part of a unit's identity."""
        return json.dumps(
            {
                "texts": self.texts,
                "contrast": self.contrast.model_dump() if self.contrast else None,
                "recipe": [recipe.model_dump() for recipe in self.recipe],
                "analysis": self.analysis.model_dump(),
                "dtype": self.model.dtype,
                "quantization": self.model.quantization,
                "max_text_tokens": self.batching.max_text_tokens,
                "long_texts": self.batching.long_texts,
                "max_record_bytes": self.inbox.max_record_bytes,
                "max_nesting": self.inbox.max_nesting,
                "values": self.outbox.values,
            },
            sort_keys=True,
        )


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_config(
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Merge and validate every layer.

    `flags` maps dotted keys (`"inbox.path"`) to values; None values are not set.
    Raises ConfigError with one line that names the source, the key and what is allowed.
    """
    layers = [
        *toml_layer(path),
        *env_layer(os.environ if env is None else env),
        *((key, value, "flag") for key, value in (flags or {}).items() if value is not None),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value, origin in layers:
        set_dotted(values, key, value, origin)
        origins[key] = origin
    unsaid = apply_preset(values, origins)
    try:
        config = Config.model_validate(values if unsaid is None else {**values, "sae": [{"path": "none"}]})
    except ValidationError as error:
        raise ConfigError(describe(error, origins, path)) from None
    if unsaid is not None:
        raise ConfigError(unsaid)
    return config


def apply_preset(values: dict[str, Any], origins: dict[str, str]) -> str | None:
    """Fill in what the preset named by `model.name` says and no stronger layer does.

    Returns what is to be told where there is no such preset and no dictionary: a key may be misspelt.
    """
    model = values.get("model", {})
    name = model.get("name", DEFAULT_MODEL) if isinstance(model, dict) else DEFAULT_MODEL
    if not isinstance(name, str) or not name.strip():
        return None  # the check of the whole says so
    if name not in preset_names():
        if "sae" in values:
            return None
        return (
            f"no [[sae]] is configured and model.name = {name!r} is not a preset"
            f" ({', '.join(preset_names())}): add [[sae]] with path, or release and id"
        )
    preset = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    for section, value in preset.items():
        if section == "sae":
            if "sae" in values:
                continue
            values["sae"] = [resolve_bundled(entry) for entry in value]
        elif isinstance(values.setdefault(section, {}), dict):
            values[section] = {**value, **values[section]}
        origins.setdefault(section, f"preset {name}")
    return None


def resolve_bundled(entry: dict[str, Any]) -> dict[str, Any]:
    """A preset's SAE path is relative to the presets folder."""
    return {**entry, "path": str(PRESETS / entry["path"])} if "path" in entry else entry


def describe(error: ValidationError, origins: Mapping[str, str], path: Path | None) -> str:
    """One validation error as one line: source, key, what is allowed. Unknown keys come first."""
    errors = error.errors()
    first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
    location = [str(step) for step in first["loc"]]
    key = ".".join(location)
    origin = next(
        (
            origins[".".join(location[:n])]
            for n in range(len(location), 0, -1)
            if ".".join(location[:n]) in origins
        ),
        next(
            (origin for name, origin in origins.items() if name.startswith(f"{key}.")),
            str(path) if path else "configuration",
        ),
    )
    if first["type"] == "extra_forbidden":
        allowed = allowed_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{origin}: unknown key {key}: {hint}allowed: {', '.join(allowed)}"
    message = first["msg"].removeprefix("Value error, ")
    if key in TABLES_LOOK and not isinstance(first.get("input"), Mapping):
        message = f"expected a table; in the environment JSON, such as {TABLES_LOOK[key]}"
    shown = first.get("input")
    got = f" (got {shown!r})" if isinstance(shown, str | int | float | bool) else ""
    return f"{origin}: {key + ': ' if key else ''}{message}{got}"


def allowed_keys(section: list[str]) -> list[str]:
    """Field names at a place in the config, for the unknown-key message."""
    model: Any = Config
    for step in section:
        if step.isdigit():
            continue
        annotation = model.model_fields[step].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
