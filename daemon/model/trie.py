"""Merges token sequences into one: their trie, numbered in preorder.

Sequences that begin alike share those tokens, so that each is computed once. Node j carries its token, its
depth (the position id) and `end[j]`, one past its last descendant; node i may attend to node j exactly when
j <= i < end[j]. That one rule is causal, block-diagonal and tree attention.
Knows no torch, no model and no samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from daemon.records import IntArray


@dataclass(frozen=True, slots=True)
class Trie:
    """The trie of N texts, of n nodes."""

    tokens: IntArray  # (n,) token ids
    depth: IntArray  # (n,) 0 at a text's first token
    end: IntArray  # (n,) one past the last descendant
    path: IntArray  # (sum of the texts' lengths,) the nodes of each text in turn, in the order given
    offsets: IntArray  # (N + 1,) where each text's path begins

    def __len__(self) -> int:
        return len(self.tokens)

    def filled(self, n: int) -> Trie:
        """The same with more nodes, up to `n`, that belong to no text and attend to themselves only.

        Their token is the first of the first text: a token that overflows alone does so in that text too.
        """
        more = n - len(self)
        return replace(
            self,
            tokens=np.concatenate((self.tokens, np.full(more, self.tokens[0]))),
            depth=np.pad(self.depth, (0, more)),
            end=np.concatenate((self.end, np.arange(len(self), n) + 1)),
        )

    @property
    def leaf(self) -> IntArray:
        """(N,) the node of each text's last token."""
        return self.path[self.offsets[1:] - 1]


def build_trie(texts: Sequence[Sequence[int]]) -> Trie:
    """The trie of N texts in any order. Raises ValueError for an empty one."""
    if empty := [number for number, text in enumerate(texts) if not len(text)]:
        raise ValueError(f"text {empty[0]} is empty")
    order = sorted(range(len(texts)), key=lambda i: tuple(texts[i]))
    lengths = np.array([len(texts[i]) for i in order])
    ids = np.full((len(texts), lengths.max()), -1, np.int64)  # (N, longest), sorted
    position = np.arange(ids.shape[1])
    ids[position < lengths[:, None]] = np.concatenate([texts[i] for i in order])
    shared = shared_lengths(ids, lengths)
    added = lengths - shared
    first = np.concatenate(([0], np.cumsum(added)))  # the first node that each text adds, then n

    # Row r of a column d: the text whose node at depth d is on r's path, which is the last one to branch off
    # above d; and the next one to do so, where that node's subtree ends.
    branches = position >= shared[:, None]
    row = np.arange(len(texts))[:, None]
    owner = np.maximum.accumulate(np.where(branches, row, 0), axis=0)
    following = np.minimum.accumulate(np.where(branches, row, len(texts))[::-1], axis=0)[::-1]
    closes = np.concatenate([following[1:], np.full((1, len(position)), len(texts))])

    text, depth = np.nonzero(branches & (position < lengths[:, None]))  # of each node, in preorder
    node = first[owner] + position - shared[owner]
    in_order = np.argsort(order)
    offsets = np.concatenate(([0], np.cumsum(lengths[in_order])))
    return Trie(
        tokens=ids[text, depth],
        depth=depth,
        end=first[closes[text, depth]],
        path=node[in_order][position < lengths[in_order, None]],
        offsets=offsets,
    )


def shared_lengths(ids: IntArray, lengths: IntArray) -> IntArray:
    """(N,) how many tokens each of N sorted texts shares with the one before it, 0 for the first.

    ids: (N, longest), -1 where a text has ended.
    """
    alike = (ids[1:] == ids[:-1]) & (ids[1:] >= 0)
    return np.concatenate(([0], np.logical_and.accumulate(alike, axis=1).sum(1)))


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """Some consecutive queries, and the keys that any of them attends to."""

    queries: slice
    keys: slice | IntArray  # (K,) node numbers, ascending; a slice where they are consecutive


def attention_blocks(end: IntArray, block: int) -> list[AttentionBlock]:
    """The attention of a trie, in runs of at most `block` queries."""
    blocks = []
    for start in range(0, len(end), block):
        stop = min(start + block, len(end))
        needed = np.flatnonzero(end[:stop] > start)
        consecutive = needed[-1] - needed[0] + 1 == len(needed)
        keys = slice(int(needed[0]), stop) if consecutive else needed
        blocks.append(AttentionBlock(slice(start, stop), keys))
    return blocks
