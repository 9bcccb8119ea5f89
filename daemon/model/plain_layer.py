"""The places of one decoder layer, told apart by what went through its modules for one short text.

Module names, as transformers has them for its decoder families, propose candidates. Of these the one is taken
whose values add up: resid_pre + attn_out = resid_mid and resid_mid + mlp_out = resid_post, or all three at
once where attention and MLP are parallel. Knows no engine and no SAE.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from daemon.devices import to_exact
from daemon.model.plain_trace import ATTENTION, Change, LayerTrace, Tap, Unreachable, is_linear, same

EXPERTS = ("experts", "router")  # modules of a mixture, which has no one inner layer
EPSILONS = ("eps", "variance_epsilon", "epsilon")
USUAL_EPSILONS = (1e-5, 1e-6)  # of norms that keep theirs to themselves
ADDED_TOLERANCE = 1e-3  # of a sum, as a share of what is added
ROUNDINGS = 8.0  # of a sum, in units of its dtype's epsilon


def find_tap(name: str, trace: LayerTrace) -> Tap:
    """`name` is a hook's inside a layer, such as `attn.hook_z`. Raises Unreachable."""
    if name not in PLACES:
        raise Unreachable(f"{name} is none of the places that plain modules are read at")
    return PLACES[name](trace)


def branch_outputs(trace: LayerTrace, path: str) -> Iterator[Tap]:
    """Where what a branch adds may be read: after a norm of it, at its end, at its last product."""
    raw = trace.get(path, "out")
    scale = float(getattr(trace.config, "residual_multiplier", 1.0))
    changes = [None] if scale == 1.0 else [None, functools.partial(torch.mul, other=scale)]
    for change in changes:
        for norm in trace.norms:
            if same(trace.get(norm, "in"), raw):
                yield trace.tap(norm, "out", change)
        yield trace.tap(path, "out", change)
        for linear in reversed(trace.paths(is_linear, path)):
            if trace.get(linear, "out").shape == raw.shape:
                yield trace.tap(linear, "out", change)
                break


def sum_error(total: Tensor, added: Tensor, value: Tensor) -> float:
    """How far `value` is from the sum, of which `added` is a part; below 1 where rounding explains it."""
    if value.shape != total.shape:
        return torch.inf
    rounding = ROUNDINGS * torch.finfo(total.dtype).eps * total.double().norm(dim=-1)
    allowed = ADDED_TOLERANCE * added.double().norm(dim=-1) + rounding
    return float(((value.double() - total.double()).norm(dim=-1) / allowed).max())


def closest(trace: LayerTrace, start: Tensor, taps: Iterator[Tap]) -> tuple[float, Tap, str] | None:
    """The tap whose value, added to `start`, a module reads or the layer gives; and that module's path."""
    best: tuple[float, Tap, str] | None = None
    for tap in taps:
        added = trace.at(tap)
        if added.shape != start.shape:
            continue
        for (path, side), value in trace.values.items():
            if side == ("in" if path else "out"):
                error = sum_error(start + added, added, value)
                if error < 1 and (best is None or error < best[0]):
                    best = error, tap, path
    return best


def after_attention(trace: LayerTrace) -> tuple[float, Tap, str] | None:
    """Where attention and MLP follow one another: the tap of attn_out, and what reads resid_mid."""
    return closest(trace, trace.get("", "in"), branch_outputs(trace, trace.attention))


def parallel(trace: LayerTrace) -> tuple[Tap, Tap]:
    """Where both are added at once: the taps of attn_out and mlp_out."""
    pre, post = trace.get("", "in"), trace.get("", "out")
    found: list[tuple[float, Tap, Tap]] = []
    for one in branch_outputs(trace, trace.attention):
        for other in branch_outputs(trace, trace.mlp[1]):
            added = trace.at(one) + trace.at(other)
            found.append((sum_error(pre + added, added, post), one, other))
    error, attention, mlp = min(found, key=lambda each: each[0])
    if not error < 1:
        raise Unreachable("residual stream, attention and MLP do not add up")
    return attention, mlp


def attn_out(trace: LayerTrace) -> Tap:
    sequential = after_attention(trace)
    return sequential[1] if sequential is not None else parallel(trace)[0]


def mlp_out(trace: LayerTrace) -> Tap:
    try:
        sequential = after_attention(trace)
    except Unreachable:  # another kind of mixer: the stream is what the MLP's norm reads
        mid = resid_mid(trace)
        found = closest(trace, trace.at(mid), branch_outputs(trace, trace.mlp[1]))
        if found is None:
            raise Unreachable("residual stream and MLP do not add up") from None
        return found[1]
    if sequential is None:
        return parallel(trace)[1]
    mid_value = trace.get(sequential[2], "in")
    starts = [mid_value]  # or, where norms come after sums, that sum normed
    starts += [trace.get(norm, "out") for norm in trace.norms if same(trace.get(norm, "in"), mid_value)]
    sums = [closest(trace, start, branch_outputs(trace, trace.mlp[1])) for start in starts]
    best = min((each for each in sums if each is not None), key=lambda each: each[0], default=None)
    if best is None:
        raise Unreachable("resid_mid and MLP do not add up")
    return best[1]


def resid_mid(trace: LayerTrace) -> Tap:
    """The values that a module reads between attention and MLP."""
    try:
        sequential = after_attention(trace)
    except Unreachable:
        return trace.tap(mlp_norm(trace), "in")
    if sequential is None:
        raise Unreachable("attention and MLP are added at once: there is no sum between them")
    return trace.tap(sequential[2], "in")


def attention_norm(trace: LayerTrace) -> str:
    """ln1: the norm that attention reads; where there is none, the one of what it gives."""
    return norm_at(trace, ("out", trace.get(trace.mixer, "in")), ("in", trace.get(trace.mixer, "out")))


def mlp_norm(trace: LayerTrace) -> str:
    """ln2: the same of the MLP. Raises Unreachable where attention reads it too."""
    begins, ends = trace.mlp
    norm = norm_at(trace, ("out", trace.get(begins, "in")), ("in", trace.get(ends, "out")))
    if any(
        same(trace.get(name, "in"), trace.get(norm, "out"))
        for name in ATTENTION
        if (name, "in") in trace.values
    ):
        raise Unreachable("attention and MLP read one norm: there is no ln2")
    return norm


def norm_at(trace: LayerTrace, *wanted: tuple[str, Tensor]) -> str:
    """The first norm that gives ("out") or reads ("in") one of these values. Raises Unreachable."""
    for side, value in wanted:
        for norm in trace.norms:
            if same(trace.get(norm, side), value):
                return norm
    raise Unreachable("the layer has no such norm")


def post_norm(trace: LayerTrace, path: str) -> str:
    """The norm of what a branch gives, where it reads a norm too: ln1_post or ln2_post."""
    return norm_at(trace, ("in", trace.get(path, "out")))


def normalized(trace: LayerTrace, norm: str) -> Tap:
    """A norm's result before its weight: centred or not, whichever explains the result."""
    module = trace.block.get_submodule(norm)
    x, expected = trace.get(norm, "in"), trace.get(norm, "out").double()
    own = [float(getattr(module, name)) for name in EPSILONS if hasattr(module, name)]
    parameters = (getattr(module, name, None) for name in ("weight", "bias"))
    weight, bias = (None if p is None else to_exact(p.detach()).double() for p in parameters)
    for epsilon in own or USUAL_EPSILONS:
        for centres in (False, True):
            change = functools.partial(normalise, epsilon=epsilon, centres=centres)
            unweighted = change(x).double()
            for scale in [1.0] if weight is None else [weight, 1 + weight]:
                got = unweighted * scale + (0.0 if bias is None else bias)
                rounding = ROUNDINGS * torch.finfo(x.dtype).eps * expected.norm(dim=-1)
                if bool(((got - expected).norm(dim=-1) <= rounding).all()):
                    return trace.tap(norm, "in", change)
    raise Unreachable(f"{type(module).__name__} is no norm of a known kind")


def normalise(x: Tensor, epsilon: float, centres: bool) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if centres:
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def output_product(trace: LayerTrace, path: str) -> str:
    """The last product of attention or of an MLP, which gives what the residual stream takes."""
    linears = trace.paths(is_linear, path)
    if not linears or any(part in name for name in linears for part in EXPERTS):
        raise Unreachable(f"{path} has no one last product")
    return linears[-1]


def attention_input(trace: LayerTrace, which: str) -> Tap:
    """hook_q, hook_k or hook_v: products before norms and rotation."""
    attention = trace.attention
    last = output_product(trace, attention)
    for path in trace.paths(is_linear, attention):
        if path.rpartition(".")[2] in (f"{which}_proj", {"q": "query", "k": "key", "v": "value"}[which]):
            return trace.tap(path, "out")
    z = trace.get(last, "in")
    for path in trace.paths(is_linear, attention):
        if path != last and trace.get(path, "out").shape[1] > z.shape[1]:
            return trace.tap(
                path, "out", part_of_product(trace, trace.get(path, "out"), z, "qkv".index(which))
            )
    raise Unreachable(f"{attention} has no product for {which}")


def part_of_product(trace: LayerTrace, qkv: Tensor, z: Tensor, part: int) -> Change:
    """The function that takes queries (0), keys (1) or values (2) out of one product of all three.

    They lie one after the other, or so within each head. A first token attends to itself alone, so that the
    right way is the one by which its values are what attention gives. Raises Unreachable.
    """
    heads, width = int(trace.config.num_attention_heads), z.shape[1]
    for cut in (functools.partial(contiguous_split, width=width), functools.partial(by_head, heads=heads)):
        try:
            values = cut(qkv, part=2).reshape(len(qkv), -1, width // heads)
            repeated = values.repeat_interleave(heads // values.shape[1], dim=1).flatten(1)
        except (RuntimeError, ZeroDivisionError):  # it does not come out even
            continue
        if repeated.shape == z.shape and sum_error(repeated[:1], repeated[:1], z[:1]) < 1:
            return functools.partial(cut, part=part)
    raise Unreachable("queries, keys and values are one product of unknown order")


def contiguous_split(qkv: Tensor, width: int, part: int) -> Tensor:
    """Queries of so many values, then keys and values, which share the rest."""
    rest = (qkv.shape[1] - width) // 2
    begins = [0, width, width + rest, width + 2 * rest]
    return qkv[:, begins[part] : begins[part + 1]]


def by_head(qkv: Tensor, heads: int, part: int) -> Tensor:
    return qkv.view(len(qkv), heads, 3, -1)[:, :, part].flatten(1)


def mlp_products(trace: LayerTrace) -> tuple[str, str | None, str]:
    """The gate, what it is multiplied by (None without gates), and the last product. Raises Unreachable."""
    begins, ends = trace.mlp
    if begins != ends:
        return begins, None, ends
    linears = trace.paths(is_linear, begins)
    last = output_product(trace, begins)
    first = [
        path for path in linears if path != last and same(trace.get(path, "in"), trace.get(begins, "in"))
    ]
    if any(part in path for path, _ in trace.block.named_modules() for part in EXPERTS) or not first:
        raise Unreachable(f"{begins} has no one inner layer")
    if len(first) == 1:
        return first[0], None, last
    gates = [path for path in first if path.rpartition(".")[2] in ("gate_proj", "w1", "gate")]
    if len(first) != 2 or len(gates) != 1:
        raise Unreachable(f"{begins} has products of unknown meaning")
    other = next(path for path in first if path != gates[0])
    return gates[0], other, last


def mlp_pre(trace: LayerTrace) -> Tap:
    gate, _, last = mlp_products(trace)
    given, taken = trace.get(gate, "out").shape[1], trace.get(last, "in").shape[1]
    if given == 2 * taken:  # gate and the rest in one product, in this order
        return trace.tap(gate, "out", lambda x: x[:, : x.shape[1] // 2])
    return trace.tap(gate, "out")


def mlp_pre_linear(trace: LayerTrace) -> Tap:
    gate, other, last = mlp_products(trace)
    if other is not None:
        return trace.tap(other, "out")
    if trace.get(gate, "out").shape[1] == 2 * trace.get(last, "in").shape[1]:
        return trace.tap(gate, "out", lambda x: x[:, x.shape[1] // 2 :])
    raise Unreachable("the MLP has no gate")


# By what follows `blocks.L.`.
PLACES: dict[str, Callable[[LayerTrace], Tap]] = {
    "hook_resid_mid": resid_mid,
    "hook_attn_out": attn_out,
    "hook_mlp_out": mlp_out,
    "attn.hook_in": lambda trace: trace.tap(trace.attention, "in"),
    "attn.hook_out": lambda trace: trace.tap(trace.attention, "out"),
    "attn.hook_z": lambda trace: trace.tap(output_product(trace, trace.attention), "in"),
    "attn.hook_q": lambda trace: attention_input(trace, "q"),
    "attn.hook_k": lambda trace: attention_input(trace, "k"),
    "attn.hook_v": lambda trace: attention_input(trace, "v"),
    "mlp.hook_in": lambda trace: trace.tap(trace.mlp[0], "in"),
    "mlp.hook_out": lambda trace: trace.tap(trace.mlp[1], "out"),
    "mlp.hook_pre": mlp_pre,
    "mlp.hook_pre_linear": mlp_pre_linear,
    "mlp.hook_post": lambda trace: trace.tap(mlp_products(trace)[2], "in"),
    "ln1.hook_in": lambda trace: trace.tap(attention_norm(trace), "in"),
    "ln1.hook_normalized": lambda trace: normalized(trace, attention_norm(trace)),
    "ln1.hook_out": lambda trace: trace.tap(attention_norm(trace), "out"),
    "ln1_post.hook_normalized": lambda trace: normalized(trace, post_norm(trace, trace.attention)),
    "ln1_post.hook_out": lambda trace: trace.tap(post_norm(trace, trace.attention), "out"),
    "ln2.hook_in": lambda trace: trace.tap(mlp_norm(trace), "in"),
    "ln2.hook_normalized": lambda trace: normalized(trace, mlp_norm(trace)),
    "ln2.hook_out": lambda trace: trace.tap(mlp_norm(trace), "out"),
    "ln2_post.hook_normalized": lambda trace: normalized(trace, post_norm(trace, trace.mlp[1])),
    "ln2_post.hook_out": lambda trace: trace.tap(post_norm(trace, trace.mlp[1]), "out"),
}
