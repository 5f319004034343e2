"""The trie of all spellings as breadth-first arrays; every node knows the range of items below it.

Items are ranked by their spelling in lexicographic order. Children of a node have consecutive ids, leaves come last
in rank order, so `rank = node - leaf0`, and how many allowed items lie under a node is one difference of a running
sum: a filter needs no rebuild and no beam can end nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import numpy as np

NO_NODE = -1


@dataclass(frozen=True)
class Trie:
    """`S` nodes over `N` items, node 0 the root. Arrays are int32; NumPy when built, arguments of jitted programs.

    `tok [S]` code on the edge into a node (0 at the root); `base [S+1]` first child, so that a node has
    `base[i+1] - base[i]` children; `lo, hi [S]` ranks under a node; `ancestor [L+1, N]` the node of each rank at each
    depth (the root at depth 0, leaves at depth L); `row [N]` rank to catalogue row; `rank [C]` catalogue row to rank.
    Static: `width[t]` most children of a node at depth t; `size[t]` nodes at depth t.
    """

    tok: np.ndarray
    base: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    ancestor: np.ndarray
    row: np.ndarray
    rank: np.ndarray
    width: tuple[int, ...] = field(metadata={"static": True})
    size: tuple[int, ...] = field(metadata={"static": True})

    @property
    def levels(self) -> int:
        return len(self.width)

    @property
    def items(self) -> int:
        return self.size[-1]

    @property
    def leaf0(self) -> int:
        return sum(self.size[:-1])


jax.tree_util.register_dataclass(Trie)


def build_trie(codes: np.ndarray) -> Trie:
    """The trie of spellings `codes [C, L]` (non-negative; row = catalogue row), in O(C L) after one sort.

    Raises ValueError when the shape is wrong, a code is negative, or two rows share a spelling.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or 0 in codes.shape or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes {codes.dtype}{list(codes.shape)}: a trie needs integers [C, L], at least one of each")
    if codes.min() < 0:
        raise ValueError(f"codes: row {int(np.argmin(codes.min(1)))} holds {codes.min()}; codes count from 0")
    count, levels = codes.shape
    order = _sorted_rows(codes)
    spelled = codes[order]
    # fresh[r, t]: rank r opens a new node at depth t + 1, because its spelling leaves the one before it by level t
    fresh = np.ones((count, levels), bool)
    np.logical_or.accumulate(spelled[1:] != spelled[:-1], axis=1, out=fresh[1:])
    if not fresh[:, -1].all():
        at = int(np.flatnonzero(~fresh[:, -1])[0])
        raise ValueError(f"codes: rows {order[at - 1]} and {order[at]} are both spelled {spelled[at].tolist()}")
    size = (1, *(int(n) for n in fresh.sum(0)))
    first = np.cumsum((0, *size))  # first node of each depth; the last entry is S
    ancestor = np.zeros((levels + 1, count), np.int32)
    tok, lo = [np.zeros(1, np.int32)], [np.zeros(1, np.int32)]
    base, width = [], []
    opens = [np.zeros(1, np.int64)]  # ranks that open a node, depth by depth
    for t in range(levels):
        at = np.flatnonzero(fresh[:, t])
        ancestor[t + 1] = first[t + 1] + np.cumsum(fresh[:, t], dtype=np.int32) - 1
        children = np.diff(np.searchsorted(at, np.append(opens[-1], count)))
        base.append(first[t + 1] + np.cumsum(children) - children)
        width.append(int(children.max()))
        tok.append(spelled[at, t])
        lo.append(at)
        opens.append(at)
    base.append(np.full(size[-1] + 1, first[-1]))
    hi = [np.append(at[1:], count) for at in opens]
    rank = np.empty(count, np.int32)
    rank[order] = np.arange(count, dtype=np.int32)
    join = lambda parts: np.concatenate(parts).astype(np.int32)  # noqa: E731
    return Trie(join(tok), join(base), join(lo), join(hi), ancestor, order.astype(np.int32), rank, tuple(width), size)


def allowed_under(trie: Trie, allowed: np.ndarray | None = None) -> np.ndarray:
    """Allowed items below each node, int32 `[S]`; `allowed` is bool `[C]`, None allows the whole catalogue.

    This is all that a filter is; keep it as long as the filter lives. Raises ValueError on another shape.
    """
    if allowed is None:
        return trie.hi - trie.lo
    allowed = np.asarray(allowed)
    if allowed.shape != trie.rank.shape or allowed.dtype != bool:
        raise ValueError(
            f"allowed {allowed.dtype}{list(allowed.shape)}: a filter is bool [{len(trie.rank)}], one an item"
        )
    counts = np.zeros(trie.items + 1, np.int32)
    np.cumsum(allowed[trie.row], dtype=np.int32, out=counts[1:])
    return counts[trie.hi] - counts[trie.lo]


def _sorted_rows(codes: np.ndarray) -> np.ndarray:
    """Rows of `codes` in lexicographic order: one sort of packed integers where they fit 63 bits."""
    bits = [int(column.max()).bit_length() for column in codes.T]
    if sum(bits) > 63:
        return np.lexsort(codes.T[::-1])
    key = np.zeros(len(codes), np.int64)
    for column, n in zip(codes.T, bits, strict=True):
        key = (key << n) | column
    return np.argsort(key, kind="stable")
