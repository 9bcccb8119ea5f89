"""How large and how deep an input may be."""

from __future__ import annotations

from dataclasses import dataclass

ZSTD_WINDOW_BYTES = 128 << 20  # what `zstd --long` writes; a stream's last bytes, which are held


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """Limits of one input file."""

    max_record_bytes: int  # of a record as JSON
    max_nesting: int
    max_decompressed_bytes: int  # of a compressed file
    max_compression_ratio: int
    part_records: int
    part_bytes: int = 4 << 20  # of raw records, after which a part ends early
    max_zstd_window_bytes: int = ZSTD_WINDOW_BYTES
