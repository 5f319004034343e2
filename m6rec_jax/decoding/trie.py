"""The trie of all spellings as breadth-first arrays; every node knows the range of items below it.

Spellings are ranked in lexicographic order. Children of a node have consecutive ids, leaves come last in rank order,
so `rank = node - leaf0`, and how many allowed spellings lie under a node is one difference of a running sum: a filter
needs no rebuild and no beam can end nowhere. An item has one canonical spelling and may have others, all L codes long:
a spelling that ended earlier would need a code for its end, and no level of the vocabulary has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import numpy as np

NO_NODE = -1


@dataclass(frozen=True)
class Trie:
    """`S` nodes over `N` spellings of `C` items, node 0 the root. Arrays are int32; NumPy when built, arguments of jitted
    programs.

    `tok [S]` code on the edge into a node (0 at the root); `base [S+1]` first child, so that a node has
    `base[i+1] - base[i]` children; `lo, hi [S]` ranks under a node; `ancestor [L+1, N]` the node of each rank at each
    depth (the root at depth 0, leaves at depth L); `row [N]` rank to catalogue row; `rank [C]` catalogue row to the rank
    of its canonical spelling, `others [C, E]` to those of its other ones, N where there is none (E = 0: every item is
    spelled once, and no program knows of more). Static: `width[t]` most children of a node at depth t; `size[t]` nodes
    at depth t.
    """

    tok: np.ndarray
    base: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    ancestor: np.ndarray
    row: np.ndarray
    rank: np.ndarray
    others: np.ndarray
    width: tuple[int, ...] = field(metadata={"static": True})
    size: tuple[int, ...] = field(metadata={"static": True})

    @property
    def levels(self) -> int:
        return len(self.width)

    @property
    def items(self) -> int:
        return self.rank.shape[0]

    @property
    def spellings(self) -> int:
        return self.size[-1]

    @property
    def most(self) -> int:
        """Most spellings of an item; static in jitted programs, for it is a shape."""
        return 1 + self.others.shape[1]

    @property
    def leaf0(self) -> int:
        return sum(self.size[:-1])


jax.tree_util.register_dataclass(Trie)


def build_trie(codes: np.ndarray, rows: np.ndarray | None = None) -> Trie:
    """The trie of spellings `codes [N, L]` (non-negative), in O(N L) after one sort.

    `rows [N]`: the catalogue row each spells, every row of 0..C-1 at least once; the first of a row is its canonical
    spelling (None: spelling i spells row i). `others` takes C times the most further spellings of an item.
    Raises ValueError when a shape is wrong, a code is negative, a row has no spelling, or a spelling is there twice,
    be it of one item or of two.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or 0 in codes.shape or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes {codes.dtype}{list(codes.shape)}: a trie needs integers [C, L], at least one of each")
    if codes.min() < 0:
        raise ValueError(f"codes: row {int(np.argmin(codes.min(1)))} holds {codes.min()}; codes count from 0")
    count, levels = codes.shape
    rows = np.arange(count, dtype=np.int32) if rows is None else _checked_rows(rows, count)
    order = _sorted_rows(codes)
    spelled = codes[order]
    # fresh[r, t]: rank r opens a new node at depth t + 1, because its spelling leaves the one before it by level t
    fresh = np.ones((count, levels), bool)
    np.logical_or.accumulate(spelled[1:] != spelled[:-1], axis=1, out=fresh[1:])
    if not fresh[:, -1].all():
        at = int(np.flatnonzero(~fresh[:, -1])[0])
        a, b = rows[order[at - 1]], rows[order[at]]
        who = f"row {a} is spelled {spelled[at].tolist()} twice" if a == b else f"rows {a} and {b} are both spelled {spelled[at].tolist()}"  # fmt: skip
        raise ValueError(f"codes: {who}")
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
    rank, others = _by_row(rank, rows)
    join = lambda parts: np.concatenate(parts).astype(np.int32)  # noqa: E731
    return Trie(join(tok), join(base), join(lo), join(hi), ancestor, rows[order], rank, others, tuple(width), size)


def allowed_under(trie: Trie, allowed: np.ndarray | None = None) -> np.ndarray:
    """Allowed spellings below each node, int32 `[S]`; `allowed` is bool `[C]`, of all spellings of an item; None
    allows the whole catalogue.

    This is all that a filter is; keep it as long as the filter lives. Raises ValueError on another shape.
    """
    if allowed is None:
        return trie.hi - trie.lo
    allowed = np.asarray(allowed)
    if allowed.shape != trie.rank.shape or allowed.dtype != bool:
        raise ValueError(
            f"allowed {allowed.dtype}{list(allowed.shape)}: a filter is bool [{len(trie.rank)}], one an item"
        )
    counts = np.zeros(trie.spellings + 1, np.int32)
    np.cumsum(allowed[trie.row], dtype=np.int32, out=counts[1:])
    return counts[trie.hi] - counts[trie.lo]


def spelled_ranks(trie: Trie, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All spellings of catalogue rows `[n]`: (their ranks `[m]`, which of the n each spells `[m]`), the canonical ones
    first and in the order of the rows. NumPy, of a trie on the host."""
    rows = np.asarray(rows, np.int64)
    more = trie.others[rows]
    owner, at = np.nonzero(more < trie.spellings)
    return np.concatenate([trie.rank[rows], more[owner, at]]), np.concatenate([np.arange(len(rows)), owner])


def codes_of(trie: Trie, ranks: np.ndarray) -> np.ndarray:
    """The codes of spellings, int32 `[..., L]`."""
    return np.moveaxis(trie.tok[trie.ancestor[1:, ranks]], 0, -1)


def _checked_rows(rows: np.ndarray, count: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.shape != (count,) or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"rows {rows.dtype}{list(rows.shape)}: each of {count} spellings needs one, an integer")
    if len(wrong := rows[(rows < 0) | (rows >= count)]):
        raise ValueError(f"rows: {count} spellings spell rows of 0..{count - 1} at most, not row {wrong[0]}")
    spelled = np.zeros(int(rows.max()) + 1, bool)
    spelled[rows] = True
    if not spelled.all():
        raise ValueError(f"rows: row {int(np.argmin(spelled))} has no spelling; every row of 0..{rows.max()} needs one")
    return rows.astype(np.int32)


def _by_row(rank: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rank of each row's first spelling `[C]`, ranks of its others `[C, E]`), given rank and row of each spelling."""
    count, items = len(rows), int(rows.max()) + 1
    if items == count and (rows == np.arange(count)).all():
        return rank, np.empty((count, 0), np.int32)
    first = np.empty(items, np.int64)
    first[rows[::-1]] = np.arange(count)[::-1]  # of equal places the last one written stays
    again = np.ones(count, bool)
    again[first] = False
    again = np.flatnonzero(again)
    again = again[np.argsort(rows[again], kind="stable")]
    owner = rows[again]
    start = np.flatnonzero(np.diff(owner, prepend=-1))
    place = np.arange(len(owner)) - np.repeat(start, np.diff(np.append(start, len(owner))))
    others = np.full((items, int(place.max(initial=-1)) + 1), count, np.int32)
    others[owner, place] = rank[again]
    return rank[first], others


def _sorted_rows(codes: np.ndarray) -> np.ndarray:
    """Rows of `codes` in lexicographic order: one sort of packed integers where they fit 63 bits."""
    bits = [int(column.max()).bit_length() for column in codes.T]
    if sum(bits) > 63:
        return np.lexsort(codes.T[::-1])
    key = np.zeros(len(codes), np.int64)
    for column, n in zip(codes.T, bits, strict=True):
        key = (key << n) | column
    return np.argsort(key, kind="stable")
