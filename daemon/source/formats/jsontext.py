"""JSON Lines and JSON. Which of the two a file is, and how it is laid out, its content tells.

The name decides only where the content could be either.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from daemon.source.formats.format import Blocks, InputFormat
from daemon.source.formats.framing import RecordFramer
from daemon.source.formats.orientation import explain
from daemon.source.limits import ReadLimits
from daemon.source.parsing import Fields
from daemon.source.stream import InputStream

# An object, or an array of objects or arrays: no other format begins so.
BEGINNING = re.compile(rb"(?:[ \t\r\n]|\xef\xbb\xbf)*+(?:\{\s*[\"}]|\[\s*[\[{])")


def begins(head: bytes) -> bool:
    return BEGINNING.match(head) is not None


def read(stream: InputStream, limits: ReadLimits, recipes: Sequence[Fields], *, named_lines: bool) -> Blocks:
    framer = RecordFramer(limits.max_record_bytes, named_lines=named_lines, recipes=recipes)
    for chunk in stream.chunks():
        yield framer.feed(chunk)
    yield framer.finish()


read_lines = functools.partial(read, named_lines=True)
read_document = functools.partial(read, named_lines=False)
JSON_LINES = InputFormat("jsonl", (".jsonl", ".ndjson"), read_lines, begins=begins, explain=explain)
JSON = InputFormat("json", (".json",), read_document, begins=begins, explain=explain)
