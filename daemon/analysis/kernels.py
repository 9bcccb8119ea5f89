"""Kernels for weighted decoder rows on CUDA: sums, centring, eigenvalues and principal eigenvectors.

cuSOLVER takes one small matrix after the other. The host's cores are quicker (`eigen.c`), but the device
waits for them. Here a block of threads has a matrix in its registers for Householder's reduction to a
tridiagonal (Golub & Van Loan, 8.3.1); a thread finds each eigenvalue by bisection (Sturm counts, 8.4.1),
and each principal eigenvector by inverse iteration shifted above all eigenvalues, as in `eigen.c`.

Written in Triton, which comes with torch's builds for CUDA: import it where there is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 128  # rows of a matrix that the registers of a block hold
TILES = (128, 64, 32)  # rows of what is left of a matrix: a reduction goes on in the least that holds it
SHARED = ((16, 128), (4, 255), (1, 255))  # warps of each tile and registers of a thread: no spills
HALVINGS = 50  # of an interval of twice Gershgorin's radius
SHIFT = 1e-11  # of the principal eigenvalue, by which inverse iteration stays off it
STEPS = 2  # each divides another eigenvector's share by its distance over the shift
NOTHING = 1e-290  # a squared length in a matrix of trace 1 that is nothing
LANES = 32  # eigenvectors that one warp finds
PIVOT = tl.constexpr(1e-30)  # of a trace of 1; a pivot of a Sturm sequence is not below it
STRIP = 256  # coordinates of a row that a block of threads takes


def centred(W_dec: Tensor, indices: Tensor, weights: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W_dec: (M, d), indices and float64 weights: (rows, width), of which the first `counts` (rows,) matter.

    Returns, in float64, sqrt(w_i) (r_i - c) (rows, width, d), zero beyond the counts, the centroids
    c = sum w_i r_i (rows, d), and sum w_i ||r_i||^2 (rows,).
    """
    W_dec, indices, weights, counts = (one.contiguous() for one in (W_dec, indices, weights, counts))
    (rows, width), d = indices.shape, W_dec.shape[1]
    strips = triton.cdiv(d, STRIP)
    spread, centroid = weights.new_empty(rows, width, d), weights.new_empty(rows, d)
    moment = weights.new_empty(rows, strips)
    if rows:
        with torch.cuda.device(W_dec.device):
            centre[rows, strips](
                W_dec, indices, weights, counts, spread, centroid, moment, width, d, strips, N=STRIP
            )
    return spread, centroid, moment.sum(-1)


def weighted_sums(table: Tensor, indices: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """sum_i weights_i table[indices_i] over the first `counts` of each row, in the table's type.

    (M, d), (rows, width) twice and (rows,) -> (rows, d).
    """
    table, indices, weights, counts = (one.contiguous() for one in (table, indices, weights, counts))
    (rows, width), d = indices.shape, table.shape[1]
    sums = table.new_empty(rows, d)
    if rows:
        with torch.cuda.device(table.device):
            add_up[rows, triton.cdiv(d, STRIP)](table, indices, weights, counts, sums, width, d, N=STRIP)
    return sums


def eigen_on_device(gram: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """gram: (rows, width, width) float64, width at most WIDEST, zero beyond the first `counts` (rows,).

    Returns the eigenvalues (rows, width), descending, and the unit eigenvectors (rows, width) of the first,
    arbitrary where that is not above 0. Runs on the device's current stream; nothing waits.
    """
    gram, counts = gram.contiguous(), counts.contiguous()
    rows, width = gram.shape[:2]
    eigenvalues, vectors = gram.new_empty(rows, width), gram.new_zeros(rows, width)
    if not rows:
        return eigenvalues, vectors
    traces = gram.diagonal(dim1=1, dim2=2).sum(-1)
    diagonal, beside, tau = gram.new_zeros(3, width, rows).unbind()  # a column a matrix
    start, pivots = gram.new_zeros(2, width, rows).unbind()
    reflectors = torch.empty_like(gram)
    tile = max(TILES[-1], triton.next_power_of_2(width))
    with torch.cuda.device(gram.device):
        for size, following, (warps, registers) in zip(TILES, (*TILES[1:], 0), SHARED, strict=True):
            if size <= tile:
                reduce[rows,](
                    *(gram, traces, counts, diagonal, beside, tau, reflectors, rows, width, NOTHING),
                    N=size,
                    FOLLOWING=following,
                    num_warps=warps,
                    maxnreg=registers,
                )
        tridiagonals = diagonal, beside, traces, counts, eigenvalues
        bisect[rows,](*tridiagonals, rows, width, HALVINGS, N=tile, num_warps=tile // 32)
        groups = triton.cdiv(rows, LANES)
        iterate[groups,](
            *(*tridiagonals, start, pivots, rows, width, SHIFT),
            STEPS=STEPS,
            N=LANES,
            num_warps=1,
        )
        reflect[rows,](start, reflectors, tau, counts, vectors, rows, width, N=tile, num_warps=1)
    return eigenvalues, vectors


@triton.jit(do_not_specialize=("width",))
def centre(W_dec, indices, weights, counts, spread, centroid, moment, width, d, strips, N: tl.constexpr):
    """A strip of coordinates of one position's rows."""
    row, strip = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(counts + row)
    j = strip * N + tl.arange(0, N)
    inside = j < d
    indices += row * width
    weights += row * width
    sum_of_rows = tl.zeros([N], tl.float64)
    sum_of_squares = tl.zeros([N], tl.float64)
    for i in range(n):
        r = tl.load(W_dec + tl.load(indices + i) * d + j, mask=inside, other=0.0).to(tl.float64)
        weighted = tl.load(weights + i) * r
        sum_of_rows += weighted
        sum_of_squares += weighted * r
    tl.store(centroid + row * d + j, sum_of_rows, mask=inside)
    tl.store(moment + row * strips + strip, tl.sum(sum_of_squares))
    spread += row * width * d
    for i in range(n):
        r = tl.load(W_dec + tl.load(indices + i) * d + j, mask=inside, other=0.0).to(tl.float64)
        tl.store(spread + i * d + j, tl.sqrt(tl.load(weights + i)) * (r - sum_of_rows), mask=inside)
    for i in range(n, width):
        tl.store(spread + i * d + j, tl.zeros([N], tl.float64), mask=inside)


@triton.jit(do_not_specialize=("width",))
def add_up(table, indices, weights, counts, sums, width, d, N: tl.constexpr):
    """A strip of coordinates of one sum."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(counts + row)
    j = tl.program_id(1) * N + tl.arange(0, N)
    inside = j < d
    total = tl.zeros([N], sums.dtype.element_ty)
    for i in range(n):
        at = row * width + i
        total += tl.load(weights + at) * tl.load(
            table + tl.load(indices + at) * d + j, mask=inside, other=0.0
        )
    tl.store(sums + row * d + j, total, mask=inside)


@triton.jit(do_not_specialize=("rows", "width"))
def reduce(
    gram,
    traces,
    counts,
    diagonal,
    beside,
    tau,
    reflectors,
    rows,
    width,
    nothing: tl.float64,
    N: tl.constexpr,
    FOLLOWING: tl.constexpr,
):
    """A / trace = Q T Q^T, from where N rows of the matrix of this block are left until FOLLOWING are.

    A reflector of Q is a row of `reflectors`; what is left of the matrix stays where the next ones will be.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(counts + row)
    first = tl.maximum(n - N, 0)
    steps = tl.minimum(n, N) - FOLLOWING
    if steps > 0:
        i = tl.arange(0, N)
        inside = i < n - first
        corner = row * width * width + first * (width + 1)  # of what is left
        gram += corner
        reflectors += corner
        at = i[:, None] * width + i[None, :]
        trace = tl.load(traces + row)
        whole = i < tl.where(n <= N, n, 0)
        a = tl.load(gram + at, mask=whole[:, None] & whole[None, :], other=0.0)
        a = (a / tl.where(trace > 0.0, trace, 1.0)).to(reflectors.dtype.element_ty)
        remaining = i < tl.where(n <= N, 0, N)
        a += tl.load(reflectors + at, mask=remaining[:, None] & remaining[None, :], other=0.0)
        for k in range(steps):
            column = tl.sum(tl.where(i[:, None] == k, a, 0.0), 0)  # its row: threads add alone
            alpha = tl.sum(tl.where(i == k + 1, column, 0.0))
            below = tl.where(i > k + 1, column, 0.0)
            rest = tl.sum(below * below)
            flat = rest <= nothing  # to reflect
            norm = tl.sqrt(alpha * alpha + rest)
            beta = tl.where(alpha > 0.0, -norm, norm)
            t = tl.where(flat, 0.0, (beta - alpha) / tl.where(flat, 1.0, beta))
            v = below * tl.where(flat, 0.0, 1.0 / tl.where(flat, 1.0, alpha - beta))
            v = tl.where(i == k + 1, 1.0, v)
            p = t * tl.sum(a * v[:, None], 0)
            w = p - (0.5 * t * tl.sum(p * v)) * v
            a -= v[:, None] * w[None, :] + w[:, None] * v[None, :]
            here = (first + k) * rows + row
            tl.store(diagonal + here, tl.sum(tl.where(i == k, column, 0.0)))
            tl.store(beside + here, tl.where(flat, alpha, beta))
            tl.store(tau + here, t)
            tl.store(reflectors + k * width + i, v, mask=inside)
        left = inside & (i >= steps)
        tl.store(reflectors + at, a, mask=left[:, None] & left[None, :])


@triton.jit(do_not_specialize=("rows", "width"))
def bisect(diagonal, beside, traces, counts, eigenvalues, rows, width, halvings, N: tl.constexpr):
    """Every eigenvalue of this block's matrix: number j, descending, in lane j."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(counts + row)
    j = tl.arange(0, N)
    inside = j < n
    at = j.to(tl.int64) * rows + row
    d = tl.load(diagonal + at, mask=inside, other=0.0)
    e = tl.load(beside + at, mask=inside, other=0.0)
    before = tl.load(beside + at - rows, mask=inside & (j > 0), other=0.0)
    radius = tl.max(tl.where(inside, tl.abs(d) + tl.abs(e) + tl.abs(before), 0.0))  # Gershgorin's
    low = tl.zeros([N], d.dtype) - radius
    high = tl.zeros([N], d.dtype) + radius
    for _ in range(halvings):
        middle = 0.5 * (low + high)
        pivot = tl.zeros([N], d.dtype) + 1.0
        smaller = tl.zeros([N], tl.int32)
        square = tl.zeros([], d.dtype)
        for k in range(n):
            pivot = tl.load(diagonal + k * rows + row) - middle - square / pivot
            pivot = tl.where(tl.abs(pivot) < PIVOT, -PIVOT, pivot)
            smaller += (pivot < 0.0).to(tl.int32)
            side = tl.load(beside + k * rows + row)
            square = side * side
        above = smaller > n - 1 - j  # the middle is above eigenvalue number j
        high = tl.where(above, middle, high)
        low = tl.where(above, low, middle)
    value = tl.where(inside, (0.5 * (low + high)).to(tl.float64) * tl.load(traces + row), 0.0)
    tl.store(eigenvalues + row * width + j, value, mask=j < width)


@triton.jit(do_not_specialize=("rows", "width"))
def iterate(
    diagonal,
    beside,
    traces,
    counts,
    eigenvalues,
    x,
    pivots,
    rows,
    width,
    off: tl.float64,
    STEPS: tl.constexpr,
    N: tl.constexpr,
):
    """The eigenvectors x of the largest eigenvalues of N tridiagonals, one in each lane; of any length."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    there = row < rows
    n = tl.load(counts + row, mask=there, other=0)
    trace = tl.load(traces + row, mask=there, other=0.0)
    largest = tl.load(eigenvalues + row * width, mask=there, other=0.0) / tl.where(trace > 0.0, trace, 1.0)
    shift = tl.where(largest > 0.0, largest + off * largest, 1.0)
    over = tl.zeros([N], tl.float64) + 1.0  # what makes x of a length near 1
    for step in tl.static_range(STEPS):
        pivot = tl.zeros([N], tl.float64) + 1.0
        value = tl.zeros([N], tl.float64)
        side = tl.zeros([N], tl.float64)
        for k in range(width):
            at = k * rows + row
            active = k < n
            ratio = side / pivot
            if step == 0:
                on = tl.load(diagonal + at, mask=active, other=0.0).to(tl.float64)
                pivot = tl.where(active, shift - on - side * ratio, 1.0)
                tl.store(pivots + at, pivot, mask=active)
                power = (k + 1.0) * (k + 1.0) * (k + 1.0)
                start = over * tl.cos(tl.sqrt(power))  # no symmetry makes it orthogonal to x
            else:
                pivot = tl.load(pivots + at, mask=active, other=1.0)
                start = over * tl.load(x + at, mask=active, other=0.0)
            value = start + ratio * value
            tl.store(x + at, value, mask=active)
            side = tl.load(beside + at, mask=active, other=0.0).to(tl.float64)
        value = tl.zeros([N], tl.float64)
        square = tl.zeros([N], tl.float64)
        for from_end in range(width):
            k = width - 1 - from_end
            at = k * rows + row
            active = k < n
            side = tl.load(beside + at, mask=active, other=0.0).to(tl.float64)
            forward = tl.load(x + at, mask=active, other=0.0)
            value = (forward + side * value) / tl.load(pivots + at, mask=active, other=1.0)
            square += value * value
            tl.store(x + at, value, mask=active)
        over = 1.0 / tl.sqrt(tl.where(square > 0.0, square, 1.0))


@triton.jit(do_not_specialize=("rows", "width"))
def reflect(start, reflectors, tau, counts, vectors, rows, width, N: tl.constexpr):
    """Q x of length 1: the eigenvector of the tridiagonal as one of the matrix."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(counts + row)
    i = tl.arange(0, N)
    inside = i < n
    x = tl.load(start + i.to(tl.int64) * rows + row, mask=inside, other=0.0)
    square = tl.sum(x * x)
    x /= tl.sqrt(tl.where(square > 0.0, square, 1.0))
    reflectors += row * width * width
    for step in range(n):
        k = n - 1 - step
        v = tl.load(reflectors + k * width + i, mask=inside & (i > k), other=0.0)
        x -= tl.load(tau + k * rows + row) * tl.sum(v * x) * v
    tl.store(vectors + row * width + i, x, mask=inside)
