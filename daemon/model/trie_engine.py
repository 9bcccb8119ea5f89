"""The fast engine: computes every token once, in the trie of a batch's texts, without padding.

The bare Hugging Face module reads the trie up to the last layer that an SAE reads. Knows nothing
about analysis, files or samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import structlog
import torch
from torch import Tensor, nn

from daemon.devices import to_device
from daemon.model.attention import (
    IMPLEMENTATION,
    BlockPlan,
    Plan,
    PlanByDevice,
    UnsupportedAttention,
    attending,
    register,
)
from daemon.model.compiled_layers import FlexPlan, can_compile, compile_layers, restore_layers
from daemon.model.cuda_streams import Launch
from daemon.model.encoding import Encoder, FusedEncoder, NormalisingEncoder
from daemon.model.extraction import Counted, Extraction, Started
from daemon.model.fused_decoder import FusedDecoder
from daemon.model.fused_layers import fuse_layers
from daemon.model.hook_points import check_widths, hook_points_of
from daemon.model.invariance import (
    INVARIANT,
    differing_place,
    preparations,
    settle_encoders,
    settle_products,
)
from daemon.model.loading import LENGTH_DEPENDENT_ROPE, LoadedModel, model_info
from daemon.model.log_probs import Predictions, with_log_probs
from daemon.model.model_stamps import ModelStamps, Probed, Runs
from daemon.model.onednn import pack_linears
from daemon.model.placement import is_hooked, lighten_hooks
from daemon.model.plain_hooks import PlainHooks, hook_tensor
from daemon.model.plain_trace import Unreachable
from daemon.model.positions import SaeStage, comparable_cards
from daemon.model.probe import Difference, packed_texts
from daemon.model.row_sizes import RowSizes
from daemon.model.sae import LoadedSae
from daemon.model.stamps import Stamps
from daemon.model.trie import Trie, build_trie
from daemon.model.trunk import Trunk, UnknownModel, leave_files, place_of
from daemon.model.unembedding import Unembedding
from daemon.model_info import ModelInfo, compute_devices
from daemon.records import Positions

RUN_ERRORS = (
    UnknownModel,
    UnsupportedAttention,
    Unreachable,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
LAYER_TYPES = {"full_attention", "sliding_attention"}  # that attention over a trie knows

AHEAD = "last_hidden_state"  # what the last layer gives, that tokens are predicted from

log = structlog.get_logger()


class CannotPack(Exception):
    """Runs of this model over a trie are not possible, or differ from plain ones."""

    def __init__(self, reason: str, *, model_changed: bool = True) -> None:
        super().__init__(reason)
        self.model_changed = model_changed  # so that it must be loaded again


class TrieEngine:
    """Implements `daemon.model.engine.Engine` on tries."""

    def __init__(
        self,
        model: LoadedModel,
        saes: Sequence[LoadedSae],
        encoders: Sequence[Encoder],
        positions: Positions,
        *,
        compiles: bool = False,
        unembedding: Unembedding | None = None,
        probed: Probed | None = None,
    ) -> None:
        """Changes the model: its attention and its linear layers, which it compiles if asked to.

        With `unembedding`, the model's own, it predicts tokens too. A model that comes with `probed` values
        is fused already, and must give them. Raises CannotPack.
        """
        self._stage = SaeStage(tuple(saes), tuple(encoders), positions, model.devices, model.bos)
        self._unembedding = unembedding
        self._info = model_info(
            model,
            [entry.info for entry in saes],
            "packed",
            comparable_cards(saes, positions),
            log_probs=unembedding is not None,
        )
        self._device, self._dtype = model.device, model.dtype
        self._spread = model.placement is not None
        self._several = len(compute_devices(model.devices)) > 1
        # A mask of four dimensions reaches the attention as it is, which then does not look at it.
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
        points = [hook_points_of(entry) for entry in saes]
        self._read, self._written = ([pair[side] for pair in points] for side in (0, 1))
        self._ahead = [] if unembedding is None else [AHEAD]
        self._points = tuple(dict.fromkeys([*self._read, *self._written]))
        self._concurrent = model.devices == "cpu" and keeps_nothing(model.model, encoders)
        self._compiled = False  # whether attention is one kernel
        self._packed = False  # whether it has weights of its own
        on_cpu = compute_devices(model.devices) == ("cpu",)
        self._sizes = RowSizes() if on_cpu else None  # None: products have any number of rows
        self._probed: Probed | None = None  # until it is remembered
        texts = [text[: model.context] for text in packed_texts(model.vocabulary)]
        plain = self._plain(model, texts) if probed is None else self._known(model, probed)
        check_widths(self._stage.saes, points, {name: plain[name].shape[1] for name in self._points})
        if probed is None:
            self._adopt(model, texts, plain)
        else:
            self._probe(texts, plain)
        if compiles:
            self._compile(texts, plain)
        self._trunk.drop_idle()
        if self._packed:  # weights are elsewhere
            self._trunk.leave_files()
            if unembedding is not None:
                leave_files(unembedding.head)

    @property
    def info(self) -> ModelInfo:
        return self._info

    def settle(self, model: LoadedModel, stamps: Stamps | None = None) -> None:
        """Have products run with numbers of rows that give the same bits, and try whether texts have them.

        What numbers these are is remembered in `stamps`. `info.bits` tells what came of it.
        """
        if self._sizes is not None:
            self._sizes = settle_products(self._trunk.layers, stamps)
        agree = settle_encoders(self.encoders, stamps)
        texts = [text[: model.context] for text in packed_texts(model.vocabulary)]
        self._info = replace(self._info, bits=self._bits(texts, encoders_agree=agree))

    @property
    def preparations(self) -> tuple[Callable[[], None], ...]:
        """Short pieces of work that have oneDNN make the kernels of later batches: see `preparations`."""
        return preparations(self._trunk.layers, self.encoders) if self._concurrent else ()

    @property
    def shares_prefixes(self) -> bool:
        return True

    @property
    def concurrent(self) -> bool:
        return self._concurrent

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        return self._stage.encoders

    def extract(self, texts: Sequence[Sequence[int]]) -> Extraction:
        """See `Engine.extract`."""
        return self.finish(self.start(texts))

    def start(self, texts: Sequence[Sequence[int]], counted: Counted = None) -> Started:
        """See `Engine.start`."""
        return self._begin(texts, counted, self._stage.predicted_texts(len(texts)))

    def _begin(self, texts: Sequence[Sequence[int]], counted: Counted, n_predicted: int) -> Started:
        """Read texts, and predict the tokens of the first `n_predicted`, where they are to be predicted."""
        with Launch(self._info.device) as forward:
            trie = build_trie(texts)
            run = self._filled(trie)
            path = trie.path, trie.offsets, trie.tokens[trie.path], counted
            readings = self._stage.choose(*path)
            keep = to_device(readings.keep, self._device)
            predicted = None
            if self._unembedding is None or not n_predicted:
                read, written, _ = self.residuals(run, keep)
            else:
                chosen = Predictions.of(*path, n_predicted)
                read, written, hidden = self.residuals(run, keep, to_device(chosen.ahead, self._device))
                predicted = chosen.predicted(self._unembedding, *hidden)
        n, idle = len(run), len(run) - len(trie)
        return Started(texts, readings, read, written, forward, n, idle, counted, predicted)

    def finish(self, started: Started) -> Extraction:
        """See `Engine.finish`."""
        extraction = self._stage.finish(started, partial(self._begin, n_predicted=0))
        return with_log_probs(extraction, started, self._begin)

    def residuals(
        self, trie: Trie, keep: Tensor, ahead: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per SAE the raw values (K, d) at the nodes `keep` (K,) that it reads, and that it reconstructs; and
        where tokens are predicted, the last layer's output (P, d_model) at the nodes `ahead` (P,).

        All are where what is read was computed.
        """
        values = self._run(trie, self._plan(trie), keep, ahead)
        return *sides(values, self._read, self._written), [values[point] for point in self._ahead]

    def layer_outputs(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """What each layer that runs gives, at each token of the texts (tokens, d_model)."""
        trie = build_trie(texts)
        run = self._filled(trie)
        given: list[Tensor] = []

        def note(values: Tensor | None) -> None:
            if values is not None:
                given.append(values)

        with ExitStack() as hooks:
            for layer in self._trunk.layers:
                hooks.callback(hook_tensor(layer, "out", note).remove)
            self._run(run, self._plan(run), to_device(trie.path, self._device))
        return [values.flatten(0, -2)[to_device(trie.path, values.device)] for values in given]

    def _plan(self, trie: Trie) -> Plan:
        if self._several:
            return PlanByDevice(lambda device: self._plan_on(trie, device))
        return self._plan_on(trie, self._device)

    def _plan_on(self, trie: Trie, device: str) -> Plan:
        if self._compiled:
            return FlexPlan.of(trie, device)
        return BlockPlan(trie, device, self._dtype)

    def _run(self, trie: Trie, plan: Plan, keep: Tensor, ahead: Tensor | None = None) -> dict[str, Tensor]:
        """Per hook point its values (K, d) at the nodes `keep` (K,); as `AHEAD` those that tokens are
        predicted from, at `ahead` (P,) or else at `keep`.
        """
        ahead = keep if ahead is None else ahead
        tokens, depth = (to_device(row, self._device).unsqueeze(0) for row in (trie.tokens, trie.depth))
        with torch.inference_mode(), attending(plan):
            values = self._trunk.run(tokens, depth, self._no_mask, keep, ahead)
        return dict(zip((*self._points, *self._ahead), values, strict=True))

    def _plain(self, model: LoadedModel, texts: Sequence[Sequence[int]]) -> Mapping[str, Tensor]:
        """The values of each text run by itself: per hook point (tokens, d).

        Finds where the trunk is to read them. Raises CannotPack where no plain module has them.
        """
        try:
            end = [f"blocks.{model.n_layers - 1}.hook_resid_post" for _ in self._ahead]
            plain = PlainHooks(model.model, dict.fromkeys([*self._points, *end]), model.vocabulary)
            places = [place_of(model.model, plain.tap(name)) for name in self._points]
            places += [replace(place_of(model.model, plain.tap(name)), ahead=True) for name in end]
            self._trunk = Trunk(model.model, places)
            read = [plain.read(text) for text in texts]
        except RUN_ERRORS as error:
            raise CannotPack(reason_of(error), model_changed=False) from error
        names = (*self._points, *self._ahead)
        of_point = zip(names, (*self._points, *end), strict=True)
        values = {name: torch.cat([one[point] for one in read]) for name, point in of_point}
        self._probed = Probed(dict(zip(names, places, strict=True)), values)
        return values

    def _known(self, model: LoadedModel, probed: Probed) -> Mapping[str, Tensor]:
        """The same of a model whose plain values are known. Raises CannotPack where others are needed."""
        if set(probed.places) != set(self._points):
            raise CannotPack("other hook points than are known")
        self._trunk = Trunk(model.model, [probed.places[name] for name in self._points])
        return probed.values

    def remember(self, model: LoadedModel, stamps: ModelStamps) -> None:
        """Have the model's plain values, which are let go of here, remembered for the next start."""
        probed, self._probed = self._probed, None
        if probed is None:
            return
        trie = self._filled(build_trie([text[: model.context] for text in packed_texts(model.vocabulary)]))
        plan, keep = self._plan(trie), torch.from_numpy(trie.path)

        def run(decoder: FusedDecoder) -> Iterator[Tensor]:
            tokens, depth = (torch.from_numpy(row).unsqueeze(0) for row in (trie.tokens, trie.depth))
            with torch.inference_mode(), attending(plan):
                for hidden in decoder.hidden_states(tokens, depth):
                    yield hidden.flatten(0, 1).index_select(0, keep)

        stamps.remember(model, self._trunk.layers, probed, Runs(self._run(trie, plan, keep), run))

    def _adopt(self, model: LoadedModel, texts: Sequence[Sequence[int]], plain: Mapping[str, Tensor]) -> None:
        """Give the model attention over a trie and packed weights, and compare its values with `plain`."""
        config = model.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        if unknown := kinds - LAYER_TYPES:
            raise CannotPack(f"layers of type {', '.join(sorted(unknown))}", model_changed=False)
        register()
        try:
            model.model.config._attn_implementation = IMPLEMENTATION
            if config is not model.model.config:
                config._attn_implementation = IMPLEMENTATION
            self._packed = self._pack(texts)
            plan = self._probe(texts, plain)
        except RUN_ERRORS as error:
            raise CannotPack(reason_of(error)) from error
        slides = "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None))
        if slides and self._trunk.layers and not plan.slides:
            raise CannotPack("a sliding window that the attention is not told of")

    def _pack(self, texts: Sequence[Sequence[int]]) -> bool:
        """Give the layers a faster form, where there is one; returns whether that has weights of its own."""
        if self._spread:
            lighten_hooks(self._trunk.layers)
        trie = self._filled(build_trie(texts))
        plan, keep = self._plan(trie), to_device(trie.path, self._device)
        fused = 0 if self._several else fuse_layers(self._trunk, plan, lambda: self._run(trie, plan, keep))
        packed = pack_linears(self._trunk.layers)
        self._trunk.watch()
        return bool(packed or fused)

    def _filled(self, trie: Trie) -> Trie:
        """The trie with as many more nodes as products on a CPU want."""
        return trie if self._sizes is None else trie.filled(self._sizes.padded(len(trie)))

    def _bits(self, texts: Sequence[Sequence[int]], *, encoders_agree: bool) -> str:
        """Whether a text's values are the same bits in any company; or what was not, or not tried."""
        if self._device != "cpu" or self._several:
            return f"not tried on {self._info.device}"
        if (place := differing_place(texts, self._values)) is not None:
            return f"not invariant: {[*self._points, *self._ahead][place]}"
        if self._sizes is not None and not self._sizes.invariant:
            return "not invariant: products of the model"
        return INVARIANT if encoders_agree else "not invariant: products of a dictionary"

    def _values(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per place its values at each token of the texts (tokens, d)."""
        trie = build_trie(texts)
        run = self._filled(trie)
        return list(self._run(run, self._plan(run), to_device(trie.path, self._device)).values())

    def _compile(self, texts: Sequence[Sequence[int]], plain: Mapping[str, Tensor]) -> None:
        """Compile the layers, and on an accelerator the attention; restore them where that does not work."""
        began = time.perf_counter()
        layers = [
            layer
            for number, layer in enumerate(self._trunk.layers)
            if not is_hooked(layer) and not self._trunk.is_read_inside(number)
        ]
        try:
            compile_layers(layers)
            self._compiled = can_compile(self._device)
            self._probe(texts, plain)
        except Exception as error:  # of a compiler, a driver or a kernel: nothing is lost but speed
            restore_layers(layers)
            self._compiled = False
            log.warning("engine.not_compiled", reason=f"{type(error).__name__}: {first_line(error)}")
            return
        log.info("engine.compiled", seconds=round(time.perf_counter() - began, 1))

    def _probe(self, texts: Sequence[Sequence[int]], plain: Mapping[str, Tensor]) -> Plan:
        """Run texts as a trie; returns their plan. Raises CannotPack where values differ from `plain`."""
        trie = self._filled(build_trie(texts))
        plan = self._plan(trie)
        got = self._run(trie, plan, to_device(trie.path, self._device))
        for hook_name, values in got.items():
            difference = Difference.of(plain[hook_name], values)
            log.debug("engine.probe", hook_name=hook_name, worst=difference.worst, median=difference.median)
            if not difference.within(self._dtype):
                raise CannotPack(f"{hook_name}: packed and plain runs differ by {difference}")
        return plan


def keeps_nothing(model: nn.Module, encoders: Sequence[Encoder]) -> bool:
    """Whether modules keep nothing of one text while another thread reads the next."""
    fused = all(isinstance(encoder, FusedEncoder | NormalisingEncoder) for encoder in encoders)
    return fused and not any(LENGTH_DEPENDENT_ROPE & rope_types(module) for module in model.modules())


def rope_types(module: nn.Module) -> set[str]:
    """How a module turns heads by position, if it does: in one way, or in one for each kind of layer."""
    kind = getattr(module, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else {str(kind)}


def sides(
    values: dict[str, Tensor], read: Sequence[str], written: Sequence[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """Of values by hook point: what each SAE reads, and what it reconstructs, on the same device."""
    xs = [values[point] for point in read]
    targets = [
        x if target == source else to_device(values[target], x.device)
        for x, source, target in zip(xs, read, written, strict=True)
    ]
    return xs, targets


def reason_of(error: Exception) -> str:
    if isinstance(error, UnknownModel | Unreachable):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
