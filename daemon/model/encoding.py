"""An SAE taken apart into a product and an activation, so that noise can be added in between.

encode(x) = activate(pre_acts(x)), and pre_acts(x + e) = pre_acts(x) + project(e): a bank of noise is
projected once, not once per sample. Knows nothing about models, texts or samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import structlog
import torch
from torch import Tensor

from daemon.analysis.geometry import DecoderRows, weighted_sum
from daemon.analysis.sparse import SparseActs, from_dense, joined
from daemon.devices import on_mps, to_device, to_exact
from daemon.model.onednn import ChunkedLinear, OneDnnLinear, Product, packs, product, split_product
from daemon.model.overflow import NORMALISING, Bounds
from daemon.model.row_sizes import ROW_STEP
from daemon.model.sae import LoadedSae
from daemon.model.saeformat import TRANSCODERS

LAYER_NORM_EPSILON = 1e-5  # of SAELens, to which it belongs when it normalises alone
PROBE_ROWS, LEAST_PROBE_ROWS = 64, 8
PROBE_NUMBERS = 1 << 20  # in their dense activations, with more than the least rows
PROBE_FEATURES = 1 << 18  # that are decoded
PROBE_SCALES = (0.1, 1.0, 10.0, 100.0)  # of the residuals it is tried on
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # relative; in float32 a feature may flip

# In the dense activations that are made at a time, by kind of device. MPS ends the process at a tensor of
# 4 GiB, and has counted wrongly which entries of large ones fire.
PIECE_NUMBERS = {"cpu": 1 << 25, "cuda": 1 << 28, "mps": 1 << 28}
COLUMNS = 1 << 11  # of W_enc that are float64 at a time

# Makes the activation of a dictionary's kind on a device.
Build = Callable[[Any, str | torch.device], Callable[[Tensor], Tensor]]

log = structlog.get_logger()


class Encoder(Protocol):
    """One SAE. x: (N, d_in), in its dtype."""

    decoder: DecoderRows
    bounds: Bounds

    @property
    def affine(self) -> bool:
        """Whether the decoding of a mean is the mean of decodings."""
        ...

    @property
    def linears(self) -> Sequence[ChunkedLinear]:
        """Its products that multiply by chunks of rows."""
        ...

    @property
    def activate(self) -> Callable[[Tensor], Tensor]:
        """(N, d_pre) -> dense feature activations (N, d_sae)."""
        ...

    @property
    def pre_acts(self) -> Callable[[Tensor], Tensor]:
        """x -> (N, d_pre)."""
        ...

    @property
    def project(self) -> Callable[[Tensor], Tensor]:
        """Noise (M, d_in) added to x -> the change of `pre_acts` (M, d_pre)."""
        ...

    def trusts_noise(self, projected: Tensor) -> Tensor:
        """(M,) bool: the rows of projected noise (M, d_pre) that overflow beside no trusted x."""
        ...

    def finite(self, x: Tensor) -> Tensor:
        """(N,) bool: the rows that are finite, and have finite pre-activations and activations."""
        ...

    def encode(self, x: Tensor) -> SparseActs: ...

    def decode(self, acts: SparseActs, x: Tensor) -> Tensor:
        """The reconstruction (N, d_out), row by row, by the features that x has. It depends on x itself where
        the dictionary normalises by statistics of x, or is a skip transcoder."""
        ...


def encoder_of(
    entry: LoadedSae, model_dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> Encoder:
    """The fastest encoder of a dictionary that agrees with the dictionary's own, else that one.

    Of a dictionary that a stamp vouches for, the encoder that agreed when the stamp was written.
    `model_dtype` is what the residuals are before they are the dictionary's. The product runs on `device`:
    the dictionary's own, or MPS for a dictionary on the host.
    """
    decoder = DecoderRows.of(entry.W_dec)
    device = device or entry.W_dec.device
    build = ACTIVATIONS.get(entry.info.architecture)
    if entry.vouched and build is not None:
        return normalising(entry, FusedEncoder(entry, decoder, build, product, device))
    plain = PlainEncoder(entry, decoder)
    if build is not None:
        for multiply in (split_product, product) if can_split(entry, model_dtype) else (product,):
            try:
                encoder = normalising(entry, FusedEncoder(entry, decoder, build, multiply, device))
                if agree(plain, encoder, entry, model_dtype):
                    return encoder
            except (TypeError, RuntimeError) as error:  # of a torch that has no such product
                if on_mps(device):  # it lacks an operation, and the host has them all
                    break
                if multiply is product:
                    raise
                log.info("sae.not_split", sae=entry.info.source, reason=str(error))
    log.info("sae.encoded_by_saelens", sae=entry.info.source, architecture=entry.info.architecture)
    return plain


def normalising(entry: LoadedSae, fused: FusedEncoder) -> FusedEncoder | NormalisingEncoder:
    """The encoder with what a dictionary does to rows before, if it does."""
    normalises = entry.sae.cfg.normalize_activations in NORMALISING
    return NormalisingEncoder(entry, fused) if normalises else fused


def can_split(entry: LoadedSae, model_dtype: torch.dtype) -> bool:
    """Whether what a dictionary reads is bfloat16 still, and worth a product of its own."""
    return (
        entry.W_dec.device.type == "cuda"
        and entry.W_dec.dtype == torch.float32
        and model_dtype == torch.bfloat16
        and not entry.center_residual
        and entry.sae.cfg.normalize_activations not in NORMALISING
    )


class NoiseOnX:
    """What encoders have in common that add noise to x itself: `pre_acts` is x."""

    bounds: Bounds

    def pre_acts(self, x: Tensor) -> Tensor:
        return x

    def project(self, noise: Tensor) -> Tensor:
        return noise

    def trusts_noise(self, projected: Tensor) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(projected, dim=-1)
        return lengths < self.bounds.longest

    def finite(self, x: Tensor) -> Tensor:
        return self.bounds.finite(x, self._steps)

    def _steps(self, x: Tensor) -> tuple[Tensor, ...]:
        """All that is computed of x on its way to activations, and back."""
        raise NotImplementedError


class PlainEncoder(NoiseOnX):
    """SAELens's own encode and decode; noise is added to x itself.

    SAELens keeps what it normalised by on the module, so one thread at a time may use it.
    """

    linears: Sequence[ChunkedLinear] = ()

    def __init__(self, entry: LoadedSae, decoder: DecoderRows) -> None:
        self.decoder = decoder
        self.bounds = Bounds.of(entry.sae)
        self._entry = entry
        self._d_sae = entry.info.d_sae

    @property
    def affine(self) -> bool:
        return self._entry.sae.cfg.normalize_activations not in NORMALISING

    def activate(self, pre_acts: Tensor) -> Tensor:
        return self._entry.encode(pre_acts)

    def _steps(self, x: Tensor) -> tuple[Tensor, ...]:
        sae = self._entry.sae
        there_and_back = sae.run_time_activation_norm_fn_out(sae.run_time_activation_norm_fn_in(x))
        return there_and_back, sae.process_sae_in(x) @ sae.W_enc, self._entry.encode(x)

    def encode(self, x: Tensor) -> SparseActs:
        return by_rows(self._entry.encode, x, self._d_sae, x.device)

    def decode(self, acts: SparseActs, x: Tensor) -> Tensor:
        pieces = [
            self._decoded(acts.select(rows), x[rows]) for rows in row_pieces(len(x), self._d_sae, x.device)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _decoded(self, acts: SparseActs, x: Tensor) -> Tensor:
        self._entry.sae.run_time_activation_norm_fn_in(x)  # has the module keep the statistics of these rows
        return self._entry.decode(acts.to_dense(self._d_sae), x)


class FusedEncoder:
    """One product with every bias folded in, and the activation on its result.

    Both may be on a device of their own, and with them pre-activations, projected noise, and what `activate`
    takes and gives. All else is where the dictionary is.
    """

    affine = True

    def __init__(
        self,
        entry: LoadedSae,
        decoder: DecoderRows,
        build: Build,
        multiply: Callable[[Tensor, Tensor | None], Product],
        device: str | torch.device,
    ) -> None:
        """`multiply` makes the product by W_enc: of what the model gives, not of any x."""
        sae = entry.sae
        if not packs(sae.W_enc):  # these products want rows; the dictionary shares them
            sae.W_enc.data = sae.W_enc.T.contiguous().T
        W_enc = sae.W_enc.T  # (d_sae, d_in)
        bias = torch.zeros(len(W_enc), dtype=torch.float64, device=W_enc.device)
        if entry.info.architecture != "gated":
            bias += sae.b_enc
        if sae.cfg.apply_b_dec_to_input and entry.info.architecture not in TRANSCODERS:
            b_dec = sae.b_dec.double()
            for start in range(0, len(W_enc), COLUMNS):
                columns = slice(start, start + COLUMNS)
                bias[columns] -= W_enc[columns].double() @ b_dec
        self.decoder = decoder
        self.bounds = Bounds.of(sae)
        W_enc, bias = to_device(W_enc, device), to_device(bias.to(W_enc.dtype), device)
        self._device = torch.device(device)
        self._product = multiply(W_enc, bias)
        shared = self._product.packed if isinstance(self._product, OneDnnLinear) else None
        self._project = product(W_enc, None) if shared is None else OneDnnLinear(shared, None)
        self.activate = build(sae, device)
        self._b_dec = sae.b_dec
        self._skip = None if entry.W_skip is None else product(entry.W_skip.contiguous(), None)
        self._written = sae.W_dec
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            self._written = sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True)

    @property
    def linears(self) -> Sequence[ChunkedLinear]:
        products = (self._product, self._project, self._skip)
        return [one for one in products if isinstance(one, ChunkedLinear)]

    def pre_acts(self, x: Tensor) -> Tensor:
        return self._product(to_device(x, self._device))

    def project(self, noise: Tensor) -> Tensor:
        return self._project(to_device(noise, self._device))

    def trusts_noise(self, projected: Tensor) -> Tensor:
        return to_exact(projected).abs().amax(-1) < self.bounds.pre_act

    def finite(self, x: Tensor) -> Tensor:
        return self.bounds.finite(x, self._steps)

    def _steps(self, x: Tensor) -> tuple[Tensor, ...]:
        pre_acts = self.pre_acts(x)
        return to_exact(pre_acts), to_exact(self.activate(pre_acts))

    def encode(self, x: Tensor) -> SparseActs:
        return by_rows(self._encoded, x, len(self._written), self._device)

    def _encoded(self, x: Tensor) -> Tensor:
        return to_exact(self.activate(self.pre_acts(x)))

    def decode(self, acts: SparseActs, x: Tensor) -> Tensor:
        written = weighted_sum(acts.indices, acts.values, acts.counts, self._written)
        reconstruction: Tensor = written + self._b_dec
        return reconstruction if self._skip is None else reconstruction + self._skip(x)


class NormalisingEncoder(NoiseOnX):
    """A dictionary that normalises each row of x by statistics of that row; keeps none of them.

    Noise is added to x itself, as it is not linear in what becomes of x.
    """

    affine = False

    def __init__(self, entry: LoadedSae, inner: FusedEncoder) -> None:
        """`inner` encodes rows that are normalised already."""
        self.decoder, self.bounds = inner.decoder, inner.bounds
        self._inner = inner
        self._statistics = (
            layer_norm if entry.sae.cfg.normalize_activations == "layer_norm" else constant_norm
        )
        self._undone = entry.info.architecture not in TRANSCODERS  # their output is of another place

    @property
    def linears(self) -> Sequence[ChunkedLinear]:
        return self._inner.linears

    def activate(self, pre_acts: Tensor) -> Tensor:
        normalised, _, _ = self._statistics(pre_acts)
        return to_exact(self._inner.activate(self._inner.pre_acts(normalised)))

    def _steps(self, x: Tensor) -> tuple[Tensor, ...]:
        normalised, scale, shift = self._statistics(x)
        pre_acts = self._inner.pre_acts(normalised)
        there_and_back = normalised * scale + shift
        return there_and_back, to_exact(pre_acts), to_exact(self._inner.activate(pre_acts))

    def encode(self, x: Tensor) -> SparseActs:
        normalised, _, _ = self._statistics(x)
        return self._inner.encode(normalised)

    def decode(self, acts: SparseActs, x: Tensor) -> Tensor:
        decoded = self._inner.decode(acts, x)
        if not self._undone:
            return decoded
        _, scale, shift = self._statistics(x)
        return decoded * scale + shift


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, d_in) normalised as SAELens does, and the scale and the shift that undo it: (N, 1) each."""
    shift = x.mean(-1, keepdim=True)
    centred = x - shift
    scale = centred.std(-1, keepdim=True)
    return centred / (scale + LAYER_NORM_EPSILON), scale, shift


def constant_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for rows of the length sqrt(d_in)."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return x / scale, scale, torch.zeros_like(scale)


def row_pieces(n: int, d_sae: int, device: torch.device) -> list[slice]:
    """Rows in pieces whose dense activations are of bounded size."""
    numbers = PIECE_NUMBERS.get(device.type, PIECE_NUMBERS["cuda"])
    rows = max(1, numbers // d_sae // ROW_STEP) * ROW_STEP
    return [slice(start, start + rows) for start in range(0, max(1, n), rows)]


def by_rows(encode: Callable[[Tensor], Tensor], x: Tensor, d_sae: int, device: torch.device) -> SparseActs:
    """encode(x) for x (N, d_in), whose dense activations (N, d_sae) are made piece by piece on a device."""
    return joined([from_dense(encode(x[rows])) for rows in row_pieces(len(x), d_sae, device)])


def standard(sae: Any, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    return torch.relu


def jumprelu(sae: Any, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    threshold = to_device(sae.threshold.clamp(min=0), device)
    return lambda pre_acts: pre_acts.where(pre_acts > threshold, 0)


def topk(sae: Any, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    k = int(sae.cfg.k)

    def activate(pre_acts: Tensor) -> Tensor:
        largest, indices = torch.topk(pre_acts, k, dim=-1, sorted=False)
        return torch.zeros_like(pre_acts).scatter_(-1, indices, largest.relu())

    if not sae.cfg.rescale_acts_by_decoder_norm:
        return activate
    norms = to_device(sae.W_dec.norm(dim=-1), device)
    return lambda pre_acts: activate(pre_acts * norms)


def gated(sae: Any, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    scale, b_mag, b_gate = (to_device(one, device) for one in (sae.r_mag.exp(), sae.b_mag, sae.b_gate))

    def activate(pre_acts: Tensor) -> Tensor:
        magnitudes = torch.relu(pre_acts * scale + b_mag)
        return magnitudes.where(pre_acts + b_gate > 0, 0)

    return activate


# By the name of SAELens's architecture.
ACTIVATIONS: dict[str, Build] = {
    "standard": standard,
    "jumprelu": jumprelu,
    "topk": topk,
    "gated": gated,
    "transcoder": standard,
    "skip_transcoder": standard,
    "jumprelu_transcoder": jumprelu,
    "jumprelu_skip_transcoder": jumprelu,
}


def agree(plain: Encoder, fused: Encoder, entry: LoadedSae, model_dtype: torch.dtype) -> bool:
    """Whether two encoders give the same features and reconstructions on random residuals of a model."""
    dtype, device = entry.W_dec.dtype, entry.W_dec.device
    rows = max(LEAST_PROBE_ROWS, min(PROBE_ROWS, PROBE_NUMBERS // entry.info.d_sae))
    noise = torch.randn(rows, entry.info.d_in, generator=torch.Generator().manual_seed(0))
    errors, sizes = torch.zeros(2, len(PROBE_SCALES)), torch.zeros(2, len(PROBE_SCALES))
    for number, scale in enumerate(PROBE_SCALES):
        x = (scale * noise).to(model_dtype).to(device, dtype)
        with torch.inference_mode():
            expected, got = (encoder.encode(x) for encoder in (plain, fused))
            few = slice(max(1, PROBE_FEATURES // expected.width))
            pairs = [
                (expected.to_dense(entry.info.d_sae), got.to_dense(entry.info.d_sae)),
                tuple(encoder.decode(expected.select(few), x[few]) for encoder in (plain, fused)),
            ]
            for kind, (a, b) in enumerate(pairs):
                errors[kind, number] = torch.linalg.vector_norm(b - a)
                sizes[kind, number] = torch.linalg.vector_norm(a)
    error, size = errors.norm(dim=1), sizes.norm(dim=1)
    return bool((error <= PROBE_TOLERANCE[dtype] * size).all())
