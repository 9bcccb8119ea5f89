"""The reasons for which a record is rejected, and why a file of rejects alone fails. Knows no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from daemon.errors import FileError
from daemon.records import Reject

REJECT_REASONS = (
    "malformed_json",
    "malformed_csv",
    "not_an_object",
    "invalid_utf8",
    "lone_surrogate",
    "not_finite",
    "duplicate_key",
    "missing_field",
    "bad_field",
    "nesting_too_deep",
    "record_too_large",
    "text_too_long",
    "empty_text",
    "out_of_memory",
    "worker_died",
    "not_finite_activation",
    "unknown_token",
    "bad_chat",
    "no_chat_template",
    "chat_refused",
    "roles_unclear",
    "no_token_counts",
)


class RejectSummary:
    """Counts rejects by reason, and keeps the first of each."""

    def __init__(self) -> None:
        self.records = 0
        self._counts: Counter[str] = Counter()
        self._first: dict[str, Reject] = {}

    def add(self, rejects: Iterable[Reject]) -> None:
        """In the order of their records."""
        for reject in rejects:
            self.records += 1
            self._counts[reject.reason] += 1
            self._first.setdefault(reject.reason, reject)

    def error(self, which: Literal["", "first "] = "") -> FileError:
        """The error of a file whose rejects, or the `first` of them, were added. Details: each reason."""
        ((reason, count),) = self._counts.most_common(1)
        others = len(self._counts) - 1
        beside = f" (and {others} other reason{'s' if others > 1 else ''})" if others else ""
        first = self._first[reason]
        said = first.message.startswith("line ") or first.line is None
        example = first.message if said else f"line {first.line}: {first.message}"
        of_all = f"none of its {which}{self.records} records can be used: {count} {reason}{beside}"
        of_one = f"its only record can't be used: {reason}"
        return FileError(
            "no_usable_record",
            f"{of_one if self.records == 1 and not which else of_all}, {example}",
            {"records": self.records, "rejects": self._by_reason()},
        )

    def _by_reason(self) -> list[dict[str, Any]]:
        return [
            {
                "reason": reason,
                "count": count,
                "first_line": self._first[reason].line,
                "first_byte_offset": self._first[reason].byte_offset,
                "first_message": self._first[reason].message,
            }
            for reason, count in self._counts.most_common()
        ]
