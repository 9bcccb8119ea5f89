"""`lensd saes`: the dictionaries that SAELens names, as a table with lines to paste into a configuration.

`lensd init` writes a configuration for one release. Knows no model and needs no network.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from daemon.errors import ConfigError
from daemon.model.catalog import CatalogEntry, chosen, read_catalog

MOST_LINES = 8  # dictionaries for which [[sae]] lines are printed
LAYERS = (0.25, 0.5, 0.75)  # of those that a release has: where a new configuration reads
USUAL_WIDTHS = ("16k", "32k", "65k", "64k")  # for a new configuration, the first that there is
USUAL_L0 = 70.0

HEAD = """\
# Settings of lensd. All that is left out has its default: see the README.
# lensd check-config --config {file}    loads model and dictionaries, and says what is wrong
# lensd run --config {file}             reads what is dropped into inbox/ and publishes to outbox/
"""
BUNDLED = """
[model]
name = "smollm2-135m"    # comes with lensd, with three dictionaries of its own: needs no hub
# `lensd saes` lists dictionaries of other models; `lensd init --release R` writes settings for one of them
"""
TAIL = """
[inbox]
path = "inbox"

[outbox]
path = "outbox"

[analysis]
positions = "last"       # tokens of a text that are read: last, all, mean, max

# [http]
# address = "127.0.0.1:9478"    # metrics, health and the status page
"""


def find_dictionaries(words: Sequence[str], model: str | None) -> tuple[CatalogEntry, ...]:
    """The dictionaries that match; a word that is a release's whole name means that release alone.

    Raises ConfigError where none matches, with names that are close.
    """
    catalog = read_catalog()
    found = chosen(catalog, words, model)
    if named := {entry.release for entry in found} & set(words):
        found = tuple(entry for entry in found if entry.release in named)
    if not found:
        known = {entry.release for entry in catalog} | {entry.model for entry in catalog}
        hint = difflib.get_close_matches(" ".join([*words, model or ""]).strip(), known, n=3, cutoff=0.5)
        raise ConfigError(
            f"no dictionary of SAELens's list matches {' '.join(words) or model}: "
            + (f"did you mean {' or '.join(hint)}?" if hint else "lensd saes alone lists all")
        )
    return found


def table_lines(found: Sequence[CatalogEntry]) -> list[str]:
    """A table of releases; of one release's dictionaries, and for a few of them what to paste."""
    releases = {entry.release for entry in found}
    if len(releases) > 1:
        return [*table_of_releases(found), "", summary(found)]
    result = [*table_of_dictionaries(found), ""]
    runnable = [entry for entry in found if entry.runs != "no"]
    if len(runnable) > MOST_LINES:
        return [*result, f"{len(found)} dictionaries: give another word of the id for lines to paste"]
    for entry in runnable:
        result += [*section(entry), ""]
    return result[:-1]


def section(entry: CatalogEntry) -> list[str]:
    return ["[[sae]]", f'release = "{entry.release}"', f'id = "{entry.id}"']


def summary(found: Sequence[CatalogEntry]) -> str:
    releases = len({entry.release for entry in found})
    by = {runs: sum(entry.runs == runs for entry in found) for runs in ("packed", "padded", "no")}
    return (
        f"{len(found):,} dictionaries in {releases} releases: {by['packed']:,} run packed, {by['padded']:,}"
        f" padded, {by['no']:,} do not; lensd saes RELEASE lists those of one"
    )


def table_of_releases(found: Sequence[CatalogEntry]) -> list[str]:
    groups: dict[str, list[CatalogEntry]] = {}
    for entry in found:
        groups.setdefault(entry.release, []).append(entry)
    return aligned(
        [("release", "model", "dictionaries", "layers", "reads", "width", "runs")]
        + [
            (
                release,
                entries[0].model,
                str(len(entries)),
                layers_of(entries),
                " ".join(dict.fromkeys(entry.kind for entry in entries)),
                " ".join(dict.fromkeys(entry.width or "?" for entry in entries)),
                ", ".join(dict.fromkeys(runs_told(entry) for entry in entries)),
            )
            for release, entries in groups.items()
        ]
    )


def table_of_dictionaries(found: Sequence[CatalogEntry]) -> list[str]:
    first = found[0]
    return [
        f"{first.release}, for {first.model}",
        "",
        *aligned(
            [("id", "layer", "reads", "width", "L0", "runs", "Neuronpedia")]
            + [
                (
                    entry.id,
                    "" if entry.layer is None else str(entry.layer),
                    entry.kind,
                    entry.width or "?",
                    "" if entry.l0 is None else f"{entry.l0:g}",
                    runs_told(entry),
                    entry.neuronpedia_id or "",
                )
                for entry in found
            ]
        ),
    ]


def runs_told(entry: CatalogEntry) -> str:
    told = "not" if entry.runs == "no" else entry.runs
    return f"{told}: {entry.why}" if entry.why else told


def layers_of(entries: Iterable[CatalogEntry]) -> str:
    """The layers as ranges: `0-11` or `5 12 19`."""
    layers = sorted({entry.layer for entry in entries if entry.layer is not None})
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][-1] + 1:
            ranges[-1].append(layer)
        else:
            ranges.append([layer])
    return " ".join(f"{one[0]}-{one[-1]}" if len(one) > 1 else str(one[0]) for one in ranges)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def new_settings(model: str | None, release: str | None, file: Path) -> str:
    """A commented configuration for a release, or for the one release of a model; else the bundled model.

    Raises ConfigError where a release is not known, or a model has none or several.
    """
    if model is None and release is None:
        return HEAD.format(file=file) + BUNDLED + TAIL
    found = [entry for entry in find_dictionaries([], model) if release is None or entry.release == release]
    releases = list(dict.fromkeys(entry.release for entry in found))
    if not releases:
        close = difflib.get_close_matches(
            release or "", {entry.release for entry in find_dictionaries([], model)}, n=3
        )
        raise ConfigError(
            f"release {release} is not in SAELens's list{f' for {model}' if model else ''}: "
            + (f"did you mean {' or '.join(close)}?" if close else "lensd saes lists what is")
        )
    if len(releases) > 1:
        raise ConfigError(
            f"{model}: {len(releases)} releases, such as {', '.join(releases[:3])}: name one by --release"
            f" (lensd saes --model {model})"
        )
    picked = pick_dictionaries(found)
    sections = "\n\n".join("\n".join(section(entry)) for entry in picked)
    about = f"# Of {len(found)} dictionaries, those of a few layers: `lensd saes {releases[0]}` lists all."
    return (
        f'{HEAD.format(file=file)}\n[model]\nname = "{picked[0].model}"\n'
        f'# dtype = "bfloat16"     # half the memory; on a GPU faster\n\n{about}\n{sections}\n{TAIL}'
    )


def pick_dictionaries(found: Sequence[CatalogEntry]) -> list[CatalogEntry]:
    """One dictionary at each of three layers: of a usual width and number of active features.

    Raises ConfigError where none of them runs.
    """
    runnable = [entry for entry in found if entry.runs in ("packed", "padded")]
    if not runnable:
        raise ConfigError(f"release {found[0].release}: {runs_told(found[0])}: choose another (lensd saes)")
    layers = sorted({entry.layer for entry in runnable if entry.layer is not None})
    at = dict.fromkeys(layers[round(share * (len(layers) - 1))] for share in LAYERS)
    return [min((e for e in runnable if e.layer == layer), key=distance_from_usual) for layer in at]


def distance_from_usual(entry: CatalogEntry) -> tuple[int, float]:
    """The less, the more a dictionary is what a first configuration is to have."""
    width = entry.width or ""
    rank = USUAL_WIDTHS.index(width) if width in USUAL_WIDTHS else len(USUAL_WIDTHS)
    return rank, 0.0 if entry.l0 is None else abs(entry.l0 - USUAL_L0)


def write_new(file: Path, text: str) -> None:
    """Raises ConfigError where there is such a file, or no folder for it."""
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} is there already: remove it, or name another with -o") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{file.parent}: no such folder: make it, or name another file with -o") from None
