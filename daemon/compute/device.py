"""The one thread that owns the device, behind an async face.

Models, SAEs and every tensor stay on that thread; only NumPy arrays leave it. Knows no files.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from daemon import mapped
from daemon.analysis.features import feature_rows
from daemon.analysis.stability import Noise, noise_bank
from daemon.analysis.study import StudySettings, analyse, layer_sums
from daemon.analysis.threads import side_by_side
from daemon.compute.engine import Engine
from daemon.compute.extraction import Extraction, NotFinite, Started
from daemon.compute.lanes import cut, joined
from daemon.compute.launched import finish, on_cuda
from daemon.compute.packing import Batch
from daemon.errors import OutOfMemory
from daemon.records import Block, FeatureRows, ModelInfo, RowMessage

R = TypeVar("R")
OWN_THREADS = Path("/proc/self/task")  # on Linux


class Device:
    """Runs blocking calls one at a time on one thread, and says since when it has been at it.

    `last_progress` is the clock's reading when the last call ended.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None  # from the first call on
        self._closed = False
        # Seconds in calls that ended, and since when in this one: together, for others look at both.
        self._busy: tuple[float, float | None] = (0.0, None)
        self.last_progress = clock()

    @property
    def alive(self) -> bool:
        """False once the thread died, and with it whatever was or will be asked of it."""
        return self._thread is None or self._closed or runs(self._thread)

    @property
    def busy_since(self) -> float | None:
        """The clock's reading at the start of the current call, None while idle."""
        return self._busy[1]

    @property
    def busy_seconds(self) -> float:
        """How long it has worked, up to now."""
        seconds, since = self._busy
        return seconds if since is None else seconds + self._clock() - since

    async def call(self, function: Callable[[], R]) -> R:
        """Run `function()` on the device thread. Raises OutOfMemory where its memory is too small.

        Never returns where the thread dies: see `alive`.
        """
        if self._thread is None:
            # A daemon, so that a thread that died without Python knowing does not keep the process.
            self._thread = threading.Thread(target=self._work, name="device", daemon=True)
            self._thread.start()
        future: Future[R] = Future()
        self._calls.put(lambda: self._answer(future, function))
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # it holds the result

    def _answer(self, future: Future[R], function: Callable[[], R]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = self._timed(function)
        except BaseException as error:
            future.set_exception(error)
            del future  # it holds the error, whose traceback holds this frame
        else:
            future.set_result(result)

    def _timed(self, function: Callable[[], R]) -> R:
        seconds, began = self._busy[0], self._clock()
        self._busy = seconds, began
        try:
            with torch.inference_mode():  # thread-local: it must sit here
                return function()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise OutOfMemory(str(error).partition("\n")[0]) from None
        finally:
            self.last_progress = self._clock()
            self._busy = seconds + self.last_progress - began, None

    def close(self) -> None:
        """Wait for the current call and end the thread."""
        self._calls.put(None)
        if self._thread is not None and runs(self._thread):
            self._thread.join()
        self._closed = True


def runs(thread: threading.Thread) -> bool:
    """Whether a thread that was started lives, by Python's word and by the kernel's, where it has one."""
    if not thread.is_alive():
        return False
    return not OWN_THREADS.is_dir() or (OWN_THREADS / str(thread.native_id)).exists()


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an error says that memory ran out; torch has a type of its own for that on CUDA only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)


@dataclass(frozen=True, slots=True)
class Begun:
    """A batch that the device may still read."""

    batch: Batch
    started: Started


class Study:
    """The engine and the analysis together: a batch of samples in, a block of columns out.

    Runs on the device thread.
    """

    def __init__(self, engine: Engine, settings: StudySettings) -> None:
        self.engine = engine
        self.settings = settings
        self.overlaps = on_cuda(engine.info.device)  # a batch is begun before the last one ends
        self._noise = noise_of(engine, settings) if settings.positions in ("last", "all") else None
        self._begun: Begun | None = None
        finish(engine.info.device)  # what was loaded is there, for every stream

    def run(self, batch: Batch) -> Block:
        """Every analysis column and the sparse features of a batch; on a CPU its pieces side by side."""
        cores = torch.get_num_threads()
        pieces, at_a_time = cut(batch, cores) if self.engine.concurrent else ([batch], 1)
        blocks = side_by_side(lambda piece: self._finished(self.begin(piece)), pieces, cores // at_a_time)
        return outliving(joined(blocks, at_a_time))

    def runs(self, batches: Iterable[Batch]) -> Iterator[Block]:
        """`run` of each, one ahead where batches overlap."""
        for batch in (*batches, None) if self.overlaps else batches:
            if (done := self.advance(batch)) is not None:
                yield done[1]

    @property
    def begun(self) -> Batch | None:
        """The batch that was begun and has not ended."""
        return self._begun.batch if self._begun is not None else None

    def advance(self, batch: Batch | None) -> tuple[Batch, Block] | None:
        """Begin a batch, if there is one, and end the one before it; what ended.

        Where batches don't overlap, that is the same one. After an error nothing is begun.
        """
        before, self._begun = self._begun, None
        if batch is not None and not self.overlaps:
            return batch, self.run(batch)
        begun = self.begin(batch) if batch is not None else None
        done = (before.batch, self.finish(before)) if before is not None else None
        self._begun = begun
        return done

    def begin(self, batch: Batch) -> Begun:
        """Have the device read the texts of a batch."""
        texts = [ids for sample in batch.samples for ids in sample.token_ids]
        return Begun(batch, self.engine.start(texts))

    def finish(self, begun: Begun) -> Block:
        """Encode and analyse a batch, beside what was begun after it."""
        return outliving(self._finished(begun))

    def _finished(self, begun: Begun) -> Block:
        with begun.started.forward.followed():
            return self._analysed(begun.batch, self.engine.finish(begun.started))

    def _analysed(self, batch: Batch, extraction: Extraction) -> Block:
        samples = batch.samples
        began = time.perf_counter()
        columns = analyse(
            layers=extraction.layers,
            recipe=batch.recipe,
            sample_ids=[sample.sample.sample_id for sample in samples],
            token_counts=[[len(ids) for ids in sample.token_ids] for sample in samples],
            settings=self.settings,
            noise=self._noise,
        )
        n_texts = len(batch.recipe.templates)
        not_finite = self._messages(extraction.not_finite, batch.recipe.text_names)
        empty_rows(columns, [row for row, _ in not_finite])
        return Block(
            columns=columns,
            features=feature_rows(extraction.stored, n_texts),
            layers=tuple(layer_sums(layer, n_texts) for layer in extraction.layers),
            forward_seconds=extraction.forward_seconds,
            sae_seconds=extraction.sae_seconds,
            analysis_seconds=time.perf_counter() - began,
            computed_tokens=extraction.computed_tokens,
            padding_tokens=extraction.padding_tokens,
            not_finite=not_finite,
        )

    def _messages(self, found: Sequence[NotFinite], names: Sequence[str]) -> tuple[RowMessage, ...]:
        """One for each sample that has such a text: where it is not finite, and what helps."""
        messages: dict[int, str] = {}
        for text in found:
            row, number = divmod(text.text, len(names))
            if row not in messages:
                messages[row] = not_finite_message(names[number], text, self.engine.info)
        return tuple(RowMessage(*item) for item in sorted(messages.items()))


def not_finite_message(name: str, found: NotFinite, info: ModelInfo) -> str:
    sae = info.saes[found.sae]
    wider = {"float16": "bfloat16 or float32", "bfloat16": "float64", "float32": "float64"}.get(info.dtype)
    remedy = f"set model.dtype to {wider}" if wider else "leave it out"
    if found.in_model:
        where = (
            sae.hook_name if sae.hook_name == sae.hook_name_out else f"{sae.hook_name} or {sae.hook_name_out}"
        )
        return f"text {name!r}: the model's values at {where} are not finite in {info.dtype}: {remedy}"
    dtype = "float64" if info.dtype == "float64" else "float32"
    return (
        f"text {name!r}: what the SAE at {sae.hook_name} makes of it is not finite in {dtype}: {remedy},"
        " or look whether the SAE belongs to this model"
    )


def empty_rows(columns: dict[str, npt.NDArray[np.generic]], rows: Sequence[int]) -> None:
    """Leave no number in these rows of the float columns."""
    for column in columns.values() if rows else ():
        if column.dtype == np.float64:
            column[rows] = np.nan


def outliving(block: Block) -> Block:
    """The same block; what outlives the batch, all but the sums of layers, is out of the next one's way."""
    numbers = {name: column for name, column in block.columns.items() if column.dtype != object}
    features = {field.name: getattr(block.features, field.name) for field in dataclasses.fields(FeatureRows)}
    copies = mapped.copies([*numbers.values(), *features.values()])
    return dataclasses.replace(
        block,
        columns=block.columns | dict(zip(numbers, copies[: len(numbers)], strict=True)),
        features=FeatureRows(**dict(zip(features, copies[len(numbers) :], strict=True))),
    )


def noise_of(engine: Engine, settings: StudySettings) -> Noise:
    """The noise bank, projected by the first SAE."""
    info, encoder = engine.info, engine.encoders[0]
    dtype = torch.float64 if info.dtype == "float64" else torch.float32
    bank = noise_bank(settings.seed, info.saes[0].d_in, dtype).to(info.device)
    with torch.inference_mode():
        projected = encoder.project(settings.noise_sigma * bank)
        sound = encoder.trusts_noise(projected)
    return Noise(encoder.pre_acts, encoder.activate, projected, encoder.bounds.trusts, sound)
