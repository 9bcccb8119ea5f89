"""Makes a `Report` of a study: reads, compares, and puts the results together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from daemon.analysis.columns import LAYER_COLUMNS, layer_column_name
from daemon.findings import compare
from daemon.findings.activations import Counts, activation_blocks, count_activations
from daemon.findings.clusters import clusters_of
from daemon.findings.details import Shown, Wanted, details_of, top_grouped, top_paired, top_prevalent
from daemon.findings.grouped import (
    ActivationBlock,
    GroupedSettings,
    fdr_grouped_columns,
    grouped_column,
    grouped_features,
)
from daemon.findings.grouping import Grouping, group_samples
from daemon.findings.health import health_of, reject_reasons
from daemon.findings.last_tokens import alike_note
from daemon.findings.manifests import ContrastEntry
from daemon.findings.paired_features import PairedSettings
from daemon.findings.prevalence import prevalence
from daemon.findings.progress import ReportProgress
from daemon.findings.results import (
    GroupedColumn,
    GroupedFeatures,
    IntArray,
    Prevalence,
    Report,
    RunSummary,
    ShapeShares,
)
from daemon.findings.study import TEXTS, Study
from daemon.findings.units import Samples, compared_groups, small_groups

SHAPE = "shape_class"
TITLE_NAMES = 3
NO_TEXTS = f"There is no {TEXTS} in every folder, so examples have no words: [outbox] texts = true writes it."
POOLED = (
    "Every position of a text was read: a text fires a feature where one of its positions does, and its"
    " activation is the mean over its positions."
)


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Holds what a report is asked for."""

    by: str | None = None  # column or field that makes groups; None: domain
    features: int = 50  # that are shown with examples
    target: float = 0.05  # false discovery rate


def make_report(study: Study, options: ReportOptions, progress: ReportProgress) -> Report:
    """Read and compare a study. Raises ConfigError for groups that can't be made and damaged files."""
    grouping = group_samples(study, options.by)
    reasons = reject_reasons(study)
    progress.begin("counting activations", study.n_rows())
    counts = count_activations(study, progress.advance)
    notes = [grouping.note] * bool(grouping.note)
    notes += [POOLED] * study.pools_positions + [NO_TEXTS] * (not study.has(TEXTS))
    alike = alike_note(study)
    notes += [alike] * bool(alike)
    report = Report(
        run=summary(study, counts, reasons),
        target=options.target,
        group_column=grouping.column,
        group_names=grouping.names,
        n_pairs=0,
        n_clusters=0,
        n_matched=0,
        mean_tokens=tuple((text, float(compare.tokens_of(study, text).mean())) for text in study.texts),
        controls=(),
        columns=(),
        features=None,
        swapped=None,
        grouped=(),
        grouped_columns=(),
        prevalence=(),
        probes=(),
        shapes=tuple(shape_shares(study, grouping)),
        details=(),
        has_texts=study.has(TEXTS),
        notes=tuple(notes),
    )
    contrast = study.manifest.recipe.contrast
    if contrast is not None:
        return with_pairs(report, study, contrast, counts, grouping, options, progress)
    return without_pairs(report, study, counts, grouping, options, progress)


def with_pairs(
    report: Report,
    study: Study,
    contrast: ContrastEntry,
    counts: Counts,
    grouping: Grouping,
    options: ReportOptions,
    progress: ReportProgress,
) -> Report:
    """Return the report of a contrast."""
    settings = PairedSettings(target=options.target)
    pairs, note = compare.pairs_of(study, contrast, grouping)
    progress.begin("comparing columns")
    columns = compare.compare_columns(study, contrast, pairs, settings)
    found = compare.compare_features(study, contrast, pairs, counts, settings, progress)
    progress.begin("probing")
    probes = (
        *compare.probe_controls(pairs),
        *found.probes,
        *compare.probe_residuals(study, contrast, pairs, counts, progress),
    )
    shown = Shown((contrast.positive, contrast.negative), pairs.cluster, grouping)
    wanted = top_paired(found.features, options.features)
    notes = [note] * bool(note)
    if pairs.n > compare.PROBED_PAIRS:
        notes.append(f"Probes are of up to {compare.PROBED_PAIRS:,} pairs, whole clusters drawn at random.")
    return replace(
        report,
        n_pairs=pairs.n,
        n_clusters=pairs.n_clusters,
        n_matched=int(pairs.matched.sum()),
        length_range=(int(pairs.d_tokens.min()), int(pairs.d_tokens.max())) if pairs.n else None,
        controls=("tokens",) if pairs.d_log_prob is None else ("tokens", "log-probability"),
        columns=columns,
        features=found.features,
        swapped=found.swapped,
        probes=probes,
        details=details_of(study, counts, wanted, shown, progress),
        notes=(*report.notes, *notes),
    )


def without_pairs(
    report: Report,
    study: Study,
    counts: Counts,
    grouping: Grouping,
    options: ReportOptions,
    progress: ReportProgress,
) -> Report:
    """Compare the samples of one text by group; without groups count how often features fire."""
    text = compared_text(study)
    cluster, note = clusters_of(study, text)
    settings = GroupedSettings(target=options.target)
    samples = Samples(cluster, compare.tokens_of(study, text), grouping.group, grouping.names, text)
    grouped: tuple[GroupedFeatures, ...] = ()
    common: tuple[Prevalence, ...] = ()
    progress.begin("comparing features", study.n_rows())
    if len(grouping.names) > 1:
        grouped = grouped_features(pieces_of(study, counts, text, progress), samples, settings)
    if not grouped:
        common = (prevalence(blocks_of(study, counts, text, progress), text),)
    wanted: Wanted = top_grouped(grouped, options.features) or top_prevalent(common, options.features)
    shown = Shown((text,), cluster, grouping)
    notes = [note] * bool(note)
    if grouped:
        notes += notes_of_groups(samples, grouping)
    if len(study.texts) > 1:
        notes.append(f"Of the texts {', '.join(study.texts)} the page is about {text}: none are compared.")
    return replace(
        report,
        n_clusters=int(cluster.max()) + 1,
        grouped=grouped,
        grouped_columns=tuple(grouped_columns(study, samples, settings)) if grouped else (),
        controls=("tokens",) if grouped else (),
        prevalence=common,
        details=details_of(study, counts, wanted, shown, progress),
        notes=(*report.notes, *notes),
        small_groups=small_groups(samples, settings.min_group),
    )


def notes_of_groups(samples: Samples, grouping: Grouping) -> Iterator[str]:
    """Yield which samples count less than once."""
    n, texts = len(samples.cluster), len(np.unique(samples.cluster))
    without = int((samples.group < 0).sum())
    if without:
        yield f"{without:,} of {n:,} samples have no value of {grouping.column}: they are in no comparison."
    if texts < n:
        yield f"{n:,} samples have {texts:,} different texts: on one side the same text counts once."


def compared_text(study: Study) -> str:
    """Return the text that a page without a contrast is about: the last one, which others begin."""
    return study.texts[-1]


def blocks_of(study: Study, counts: Counts, text: str, progress: ReportProgress) -> Iterator[ActivationBlock]:
    for block in activation_blocks(study, counts, (text,), on_rows=progress.advance):
        yield ActivationBlock(block.sae, block.first, block.by_text[text])


def pieces_of(study: Study, counts: Counts, text: str, progress: ReportProgress) -> Iterator[ActivationBlock]:
    """Give the same in pieces, as small as they are compared."""
    for block in blocks_of(study, counts, text, progress):
        for first, last in compare.pieces(block.activations, block.activations[:0]):
            yield ActivationBlock(block.sae, block.first + first, block.activations[:, first:last])


def grouped_columns(study: Study, samples: Samples, settings: GroupedSettings) -> Iterable[GroupedColumn]:
    """Every column of every dictionary in each group that has enough samples."""
    groups = compared_groups(samples, settings.min_group)
    found: list[GroupedColumn] = []
    for sae in study.saes:
        for column in LAYER_COLUMNS:
            name = layer_column_name(sae.prefix, samples.text, column.name)
            if column.kind == "class" or name not in study.columns:
                continue
            values = study.numbers(name)
            label = f"{sae.prefix}_{column.name}"
            for group in groups:
                blank = GroupedColumn(
                    label, sae.prefix, column.unit, column.meaning, samples.text, samples.group_names[group],
                    0, 0, None, None, None, None, None, None, "few",
                )  # fmt: skip
                found.append(grouped_column(values, samples, group, blank, settings))
    return fdr_grouped_columns(found, settings)


def shape_shares(study: Study, grouping: Grouping) -> Iterator[ShapeShares]:
    """Count how often each class of shape occurs, over all samples and in each group."""
    for sae in study.saes:
        for text in study.texts:
            name = layer_column_name(sae.prefix, text, SHAPE)
            if name not in study.columns:
                continue
            values = study.metrics([name])[name].combine_chunks().dictionary_encode()
            names, codes = values.dictionary.to_pylist(), np.asarray(values.indices.to_numpy(), np.int64)
            yield ShapeShares(sae.prefix, text, None, counted(names, codes))
            if len(grouping.names) > 1:
                for number, group in enumerate(grouping.names):
                    inside = codes[grouping.group == number]
                    yield ShapeShares(sae.prefix, text, group, counted(names, inside))


def counted(names: Sequence[str], codes: IntArray) -> tuple[tuple[str, int], ...]:
    counts = np.bincount(codes, minlength=len(names)).tolist()
    return tuple(sorted((name, count) for name, count in zip(names, counts, strict=True) if count))


def summary(study: Study, counts: Counts, reasons: tuple[tuple[str, int], ...]) -> RunSummary:
    """Describe what was run, of all folders together."""
    manifests = [folder.manifest for folder in study.folders]
    first, contrast = study.manifest, study.manifest.recipe.contrast
    names = list(dict.fromkeys(one.input.name for one in manifests))
    more = len(names) - TITLE_NAMES
    days = sorted({one.created[:10] for one in manifests})
    versions: dict[str, list[str]] = {}
    for one in manifests:
        for name, version in one.versions.items():
            if version is not None and version not in versions.setdefault(name, []):
                versions[name].append(version)
    return RunSummary(
        title=", ".join(names[:TITLE_NAMES]) + (f" and {more} more" if more > 0 else ""),
        folders=tuple(folder.place for folder in study.folders),
        samples=study.n_samples,
        rejects=sum(one.rejects for one in manifests),
        reject_reasons=reasons,
        model=first.model.name,
        dtype=first.model.dtype,
        device=", ".join(dict.fromkeys(one.model.device for one in manifests)),
        n_layers=first.model.n_layers,
        recipe=first.recipe.name,
        texts=tuple(first.recipe.texts.items()),
        reference=contrast.reference if contrast else None,
        positive=contrast.positive if contrast else None,
        negative=contrast.negative if contrast else None,
        positions=first.positions,
        tokens=dict(first.analysis)["tokens"],
        computed=days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
        versions=tuple((name, ", ".join(found)) for name, found in versions.items()),
        analysis_version=first.analysis_version,
        dictionaries=health_of(study, counts),
    )
