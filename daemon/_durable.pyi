from collections.abc import Sequence

from _typeshed import ReadableBuffer

def in_turn(steps: Sequence[tuple[int, str, ReadableBuffer | str | None]], /) -> tuple[int, int, bool]: ...
