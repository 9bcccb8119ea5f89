"""`lensd check-config --file`: how the first records of a file are read, by the model's tokenizer alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from daemon.bos import bos_of, puts_bos
from daemon.config import Config, SaeSection
from daemon.errors import ConfigError, FileError
from daemon.model.dictionary import name_of
from daemon.model.failures import loading, quiet_libraries
from daemon.model.hub import Hub, repository_of, serving
from daemon.model.loading import check_config, context_of, load_tokenizer
from daemon.model.location import ModelLocation, locate_model
from daemon.model.sae import prepends_bos
from daemon.model.saelens import check_known
from daemon.model.smollm2 import default_cache_dir
from daemon.model.weightfiles import read_object
from daemon.model_wiring import read_rules
from daemon.records import Part, Reject, TokenizedSample
from daemon.rejects import RejectSummary
from daemon.source.reader import part_blocks
from daemon.source.tokenizer import Tokenizer
from daemon.tools.samples import unclaimed
from daemon.wiring import read_limits

BOS_SAID = {
    frozenset({True}): "BOS before each text",
    frozenset({False}): "no BOS added",
    frozenset({True, False}): "texts are read with BOS, as shown, and without",
}
RECORDS = 5
SHOWN_CHARS = 240  # of a text
SHOWN_TOKENS = 12  # of those that are read


def preview(config: Config, file: Path) -> Iterator[str]:
    """Lines that say which recipe is taken, and of each record its texts, their tokens and those read.

    Raises FileError for an unusable file, and at the end where none of the records shown can be used;
    ConfigError and MachineError where the tokenizer can't be had.
    """
    quiet_libraries()
    hub = Hub()
    settings, hf_tokenizer = load_alone(config, hub)
    ways = {
        prepends_bos(sae, prepend_bos_said(sae, hub), name_of(sae), lambda: puts_bos(hf_tokenizer))
        for sae in config.sae
    }
    tokenizer = tokenizer_of(hf_tokenizer, settings, config, ways)
    part = first_part(config, file)
    recipe, compared = part.recipe, part.recipe.contrast
    contrast = (
        f", {compared.positive} against {compared.negative} relative to {compared.reference}"
        if compared
        else ""
    )
    records = records_of(part, tokenizer)
    refusal = none_usable(part, records, file)
    state = "ok" if refusal is None else "rejected"
    yield f"{state}: {file.name}: recipe {recipe.name}: texts {', '.join(recipe.text_names)}{contrast}"
    rules = config.analysis
    yield (
        f"{state}: {BOS_SAID[frozenset(ways)]}; tokens = {rules.tokens},"
        f" positions = {rules.positions}, long_texts = {config.batching.long_texts}"
    )
    for record in records:
        if isinstance(record, Reject):
            yield f"record {record.record_index}: rejected, {record.reason}: {record.message}"
            continue
        sample = record.sample
        line = "" if sample.line is None else f", line {sample.line}"
        yield f"record {sample.record_index}{line}, id {sample.sample_id}"
        for text, name in enumerate(recipe.text_names):
            ids = record.token_ids[text]
            read = places_read(record, text, config, bos_of(hf_tokenizer))
            yield f"  {name}, {len(ids)} tokens: {shown(decoded(hf_tokenizer, ids))}"
            tokens = [decoded(hf_tokenizer, [ids[place]]) for place in read]
            yield f"    reads {len(read)}: {tokens_shown(tokens)}"
    if refusal is not None:
        raise refusal


def first_part(config: Config, file: Path) -> Part:
    """The first part of a file. Raises FileError."""
    try:
        with file.open("rb") as content:
            for parts in part_blocks(
                content, unclaimed(file), recipes=config.recipes, limits=read_limits(config)
            ):
                for part in parts:
                    assert isinstance(part, Part)
                    return part
    except FileError as error:
        raise named(file, error) from None
    raise AssertionError("a file has a part, or an error")


def named(file: Path, error: FileError) -> FileError:
    return FileError(error.reason, f"{file.name}: {error}", error.details)


def none_usable(part: Part, records: Sequence[TokenizedSample | Reject], file: Path) -> FileError | None:
    """The error of a file of which these are the first records; None where one of them can be used."""
    rejects = [record for record in records if isinstance(record, Reject)]
    if len(rejects) < len(records):
        return None
    summary = RejectSummary()
    summary.add(rejects)
    is_whole = part.last and len(records) == part.extent.records
    return named(file, summary.error("" if is_whole else "first "))


def records_of(part: Part, tokenizer: Tokenizer) -> list[TokenizedSample | Reject]:
    """The first records of a part, tokenized or rejected, in their order."""
    first = part.extent.first_record + RECORDS
    few = dataclasses.replace(
        part,
        samples=tuple(sample for sample in part.samples if sample.record_index < first),
        rejects=tuple(reject for reject in part.rejects if reject.record_index < first),
    )
    (tokenized,) = tokenizer.tokenize([few])
    by_index: dict[int, TokenizedSample | Reject] = {
        sample.sample.record_index: sample for sample in tokenized.samples
    }
    by_index |= {reject.record_index: reject for reject in tokenized.part.rejects}
    return [by_index[index] for index in sorted(by_index)]


def places_read(sample: TokenizedSample, text: int, config: Config, bos: int | None) -> list[int]:
    """The positions of a text's tokens that SAEs read."""
    mask = None if sample.counted is None else sample.counted[text]
    places = [place for place in range(len(sample.token_ids[text])) if mask is None or mask[place]]
    if config.analysis.positions == "last":
        return places[-1:]
    return [place for place in places if place or sample.token_ids[text][0] != bos]


def load_alone(config: Config, hub: Hub) -> tuple[Any, Any]:
    """The model's settings and its tokenizer as Hugging Face has them, without the model.

    Raises ConfigError and MachineError.
    """
    from transformers import AutoConfig

    name = config.model.name
    location = (
        ModelLocation(name, name, None)
        if Path(name).is_dir()
        else locate_model(name, default_cache_dir(), config.model.revision, hub)
    )
    what = f"model {name}"
    with loading(what):
        settings = AutoConfig.from_pretrained(location.target, trust_remote_code=False)
        check_config(settings, what)
    return settings.get_text_config(), load_tokenizer(location)


def tokenizer_of(hf_tokenizer: Any, settings: Any, config: Config, ways: Set[bool]) -> Tokenizer:
    """The tokenizer as a run would have it; `ways` of the dictionaries to read texts, with BOS or without."""
    return Tokenizer(
        hf_tokenizer,
        prepend_bos=True in ways,
        both_ways=len(ways) > 1,
        max_text_tokens=config.batching.max_text_tokens,
        context=context_of(settings),
        vocabulary=int(settings.vocab_size),
        rules=read_rules(config),
    )


def prepend_bos_said(source: SaeSection, hub: Hub) -> bool | None:
    """Whether a dictionary's own settings ask for BOS; None where they say nothing, or are not asked.

    Raises ConfigError and MachineError.
    """
    if source.prepend_bos is not None:
        return None
    what = f"SAE {source.path or name_of(source)}"
    if source.path is None:
        settings = settings_of_hub(source, what, hub)
    elif (source.path / "cfg.json").is_file():
        settings = read_object(source.path / "cfg.json", what)
    else:
        raise ConfigError(f"{what}: no cfg.json there: give a folder in SAELens format")
    metadata = settings.get("metadata")
    said: bool | None = (metadata if isinstance(metadata, dict) else settings).get("prepend_bos")
    return said


def settings_of_hub(source: SaeSection, what: str, hub: Hub) -> dict[str, Any]:
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    with loading(what):
        check_known(source, what)
        snapshot = hub.snapshot(repository_of(str(source.release)), source.revision)
        with serving(snapshot):
            settings: dict[str, Any] = load_sae_config_from_huggingface(str(source.release), str(source.id))
    return settings


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def shown(text: str) -> str:
    """A text in quotes, its middle left out where it is long."""
    half = SHOWN_CHARS // 2
    return f'"{text}"' if len(text) <= SHOWN_CHARS else f'"{text[:half]}" ... "{text[-half:]}"'


def tokens_shown(tokens: Sequence[str]) -> str:
    """Tokens in quotes, the middle ones left out where there are many."""
    quoted = [f'"{token}"' for token in tokens]
    if len(quoted) > SHOWN_TOKENS:
        half = SHOWN_TOKENS // 2
        quoted = [*quoted[:half], "...", *quoted[-half:]]
    return " ".join(quoted)
