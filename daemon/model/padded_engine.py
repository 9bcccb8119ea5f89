"""The general engine: TransformerLens on right-padded batches, one forward pass for all SAEs.

Slower than it could be, and simple: causal attention never looks right, so padding on the right needs no
mask and changes no result. At the start this is tried: a padded batch against plain Hugging Face modules, one
text at a time, at the hook points that are read. Knows nothing about analysis, files or samples.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor

from daemon.devices import to_device
from daemon.errors import ConfigError
from daemon.model.cuda_streams import Launch
from daemon.model.encoding import Encoder
from daemon.model.extraction import Counted, Extraction, Started
from daemon.model.failures import sense
from daemon.model.float64 import full_precision
from daemon.model.hook_points import canonical, check_widths, hook_points_of
from daemon.model.loading import LoadedModel, bridge_of, model_info
from daemon.model.log_probs import Predictions, with_log_probs
from daemon.model.plain_hooks import PlainHooks
from daemon.model.plain_trace import Unreachable
from daemon.model.positions import SaeStage, comparable_cards
from daemon.model.probe import Difference, padded_texts
from daemon.model.sae import LoadedSae, layer_of
from daemon.model.unembedding import Unembedding
from daemon.records import IntArray, Positions

BoolArray = npt.NDArray[np.bool_]
RUN_ERRORS = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


log = structlog.get_logger()


class PaddedEngine:
    """Implements `daemon.model.engine.Engine` with TransformerLens as it comes."""

    shares_prefixes = False
    concurrent = False
    preparations: tuple[Callable[[], None], ...] = ()

    def __init__(
        self,
        model: LoadedModel,
        saes: Sequence[LoadedSae],
        encoders: Sequence[Encoder],
        positions: Positions,
        *,
        unembedding: Unembedding | None = None,
    ) -> None:
        """Takes the model's modules over. With `unembedding`, the model's own, it predicts tokens too.

        Raises ConfigError where the model lacks a hook point that an SAE names, where TransformerLens gives
        other values there than the model by itself, or where plain modules can't tell.
        """
        points = [hook_points_of(entry) for entry in saes]
        self._stage = SaeStage(tuple(saes), tuple(encoders), positions, model.devices, model.bos)
        self.encoders = self._stage.encoders
        self.saes = self._stage.saes
        self._unembedding = unembedding
        self.info = model_info(
            model,
            [entry.info for entry in saes],
            "padded",
            comparable_cards(saes, positions),
            log_probs=unembedding is not None,
            bits="not tried in padded batches",
        )
        self._name, self._dtype, self._device = model.location.name, model.dtype, model.device
        self._read = [read for read, _ in points]
        self._written = [written for _, written in points]
        self._end = f"blocks.{model.n_layers - 1}.hook_resid_post"  # what tokens are predicted from
        end = [] if unembedding is None else [self._end]
        self._points = tuple(dict.fromkeys([*self._read, *self._written, *end]))
        self._stop_at_layer = max(map(layer_of, self._points)) + 1
        special = list(map(int, model.tokenizer.all_special_ids))
        texts = [text[: model.context] for text in padded_texts(model.vocabulary, special)]
        plain = plain_values(model, self._points, texts)  # before the modules change hands
        self._bridge = bridge_of(model)
        for point in self._points:
            if canonical(point) not in self._bridge.hook_dict:
                raise ConfigError(self._absent(point))
        self._try(texts, plain)

    def _try(self, texts: Sequence[Sequence[int]], plain: Sequence[dict[str, Tensor]] | Unreachable) -> None:
        """Run texts as one padded batch. Raises ConfigError where values are not those of `plain`."""
        tokens, _ = padded_tokens(texts)
        try:
            values = self._values(to_device(tokens, self._device))
        except RUN_ERRORS as error:
            raise ConfigError(
                f"model {self._name}: TransformerLens can't run it ({type(error).__name__}: {sense(error)}):"
                " use dictionaries at hook_resid_pre or hook_resid_post, or another model"
            ) from error
        points = list(zip(self._read, self._written, strict=True))
        check_widths(self._stage.saes, points, {point: x.shape[-1] for point, x in values.items()})
        if isinstance(plain, Unreachable):
            raise ConfigError(
                f"model {self._name}: what TransformerLens gives at {', '.join(self._points)} can't be"
                f" checked against plain modules ({plain}): use a dictionary at another hook point"
            )
        for row, (text, expected) in enumerate(zip(texts, plain, strict=True)):
            for point in self._points:
                difference = Difference.of(expected[point], values[point][row, : len(text)])
                log.debug("engine.probe", hook_name=point, worst=difference.worst, median=difference.median)
                if not difference.within(self._dtype):
                    raise ConfigError(self._refusal(point, text, expected[point], difference))

    def _absent(self, point: str) -> str:
        """The message that the model lacks a hook point: whose it is, and which may be meant."""
        source = next(
            entry.info.source
            for entry, *places in zip(self._stage.saes, self._read, self._written, strict=True)
            if point in places
        )
        known = {name.lower(): name for name in self._bridge.hook_dict}
        block = f"blocks.{layer_of(point)}."
        close = difflib.get_close_matches(
            point.lower(), [name for name in known if name.startswith(block)], n=1, cutoff=0.8
        )
        hint = f"did you mean {known[close[0]]}? correct" if close else "correct"
        return (
            f"SAE {source}: model {self._name} has no hook point {point}: {hint} the hook in its cfg.json, or"
            " use a dictionary of this model"
        )

    def _refusal(self, point: str, text: Sequence[int], expected: Tensor, difference: Difference) -> str:
        """Why values differ: by what stands beside a text, or already where it is alone."""
        alone = self._values(torch.tensor([text], device=self._device))[point][0]
        if Difference.of(expected, alone).within(self._dtype):
            return (
                f"model {self._name}: at {point} a text's values change with what stands after it, by"
                f" {difference}: it reads texts in both directions, and lensd reads causal models only"
            )
        return (
            f"model {self._name}: at {point} TransformerLens gives other values than the model by itself,"
            f" different by {difference}: use dictionaries at hook_resid_pre or hook_resid_post, or another"
            " version of transformer-lens"
        )

    def residuals(
        self, tokens: Tensor, keep: Tensor, ahead: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """tokens: (rows, width), keep: (K,) of all positions -> (K, d) each SAE reads, and reconstructs; and
        with `ahead` (P,) of all positions the last layer's output there (P, d_model).

        What SAEs read is on the device of the SAE.
        """
        values = self._values(tokens)
        kept = {point: x.flatten(0, 1)[to_device(keep, x.device)] for point, x in values.items()}
        devices = [entry.W_dec.device for entry in self.saes]
        read = [to_device(kept[point], device) for point, device in zip(self._read, devices, strict=True)]
        written = [
            x if target == source else to_device(kept[target], x.device)
            for x, source, target in zip(read, self._read, self._written, strict=True)
        ]
        end = []
        if ahead is not None:
            last = values[self._end].flatten(0, 1)
            end.append(last[to_device(ahead, last.device)])
        return read, written, end

    def _values(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens: (rows, width) on the device -> per hook point (rows, width, d), heads side by side.

        Raises ConfigError for a hook point that does not fire, or has not one row for each token.
        """
        captured: dict[str, Tensor] = {}

        def capture(activation: Tensor, hook: object, name: str) -> None:
            rows = by_token(activation, tokens)
            if rows is not None:
                captured[name] = rows

        fwd_hooks = [
            (canonical(point), lambda activation, hook, name=point: capture(activation, hook, name))
            for point in self._points
        ]
        with torch.inference_mode(), full_precision(self._dtype):
            self._bridge.run_with_hooks(
                tokens, return_type=None, stop_at_layer=self._stop_at_layer, fwd_hooks=fwd_hooks
            )
        for point in self._points:
            if point not in captured:
                raise ConfigError(
                    f"model {self._name}: hook point {point} gives no row of values for each token: use a"
                    " dictionary at another hook point"
                )
        return captured

    def extract(self, texts: Sequence[Sequence[int]]) -> Extraction:
        """See `Engine.extract`."""
        return self.finish(self.start(texts))

    def start(self, texts: Sequence[Sequence[int]], counted: Counted = None) -> Started:
        """See `Engine.start`."""
        return self._begin(texts, counted, self._stage.predicted_texts(len(texts)))

    def _begin(self, texts: Sequence[Sequence[int]], counted: Counted, n_predicted: int) -> Started:
        """Read texts, and predict the tokens of the first `n_predicted`, where they are to be predicted."""
        with Launch(self.info.device) as forward:
            tokens, inside = padded_tokens(texts)
            lengths = inside.sum(1)
            offsets = np.concatenate(([0], np.cumsum(lengths)))
            path = np.flatnonzero(inside), offsets, tokens[inside], counted
            readings = self._stage.choose(*path)
            padded, keep = (to_device(one, self._device) for one in (tokens, readings.keep))
            predicted = None
            if self._unembedding is None or not n_predicted:
                read, written, _ = self.residuals(padded, keep)
            else:
                chosen = Predictions.of(*path, n_predicted)
                read, written, end = self.residuals(padded, keep, to_device(chosen.ahead, self._device))
                predicted = chosen.predicted(self._unembedding, *end)
        n, idle = tokens.size, tokens.size - int(lengths.sum())
        return Started(texts, readings, read, written, forward, n, idle, counted, predicted)

    def finish(self, started: Started) -> Extraction:
        """See `Engine.finish`."""
        extraction = self._stage.finish(started, partial(self._begin, n_predicted=0))
        return with_log_probs(extraction, started, self._begin)


def padded_tokens(texts: Sequence[Sequence[int]]) -> tuple[IntArray, BoolArray]:
    """Texts as rows of one array, each filled up with its own last token; and where they are.

    Values that are not finite after a text reach into it, by shares of 0: a token of its own is no worse.
    """
    lengths = np.array([len(text) for text in texts])
    inside = np.arange(int(lengths.max())) < lengths[:, None]
    tokens = np.repeat([text[-1] for text in texts], inside.shape[1]).reshape(inside.shape)
    tokens[inside] = np.concatenate(texts)
    return tokens, inside


def by_token(activation: Tensor, tokens: Tensor) -> Tensor | None:
    """A hook point's values as (rows, width, d); None where they are of another shape.

    Some modules work on all rows as one.
    """
    rows, width = tokens.shape
    if activation.ndim == 2 and len(activation) == rows * width:
        activation = activation.view(rows, width, -1)
    if activation.ndim < 3 or activation.shape[:2] != (rows, width):
        return None
    return activation.flatten(2)


def plain_values(
    model: LoadedModel, points: Sequence[str], texts: Sequence[Sequence[int]]
) -> list[dict[str, Tensor]] | Unreachable:
    """The values of plain modules: of each text, per hook point (length, d); or why they can't tell.

    Raises ConfigError where the model does not run.
    """
    try:
        plain = PlainHooks(model.model, points, model.vocabulary)
        return [plain.read(text) for text in texts]
    except Unreachable as error:
        return error
    except RUN_ERRORS as error:
        raise ConfigError(
            f"model {model.location.name}: can't be run in {str(model.dtype).removeprefix('torch.')} on"
            f" {model.device} ({type(error).__name__}: {sense(error)}): try another model.dtype"
        ) from error
