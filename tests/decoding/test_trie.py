"""The trie spells the catalogue, the whole catalogue and nothing else, under any filter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from m6rec_jax.decoding.trie import Trie, allowed_under, build_trie, codes_of, spelled_ranks


@st.composite
def catalogues(draw) -> np.ndarray:
    levels = draw(st.integers(1, 4))
    codes = draw(hnp.arrays(np.int32, st.tuples(st.integers(1, 40), st.just(levels)), elements=st.integers(0, 5)))
    order = draw(st.permutations(range(len(unique := np.unique(codes, axis=0)))))
    return unique[np.array(order)]


def children(trie: Trie, node: int) -> range:
    return range(trie.base[node], trie.base[node + 1])


def spellings(trie: Trie) -> dict[tuple[int, ...], int]:
    """Every path from the root to a leaf, and the catalogue row it ends at."""
    paths = {(): 0}
    for _ in range(trie.levels):
        paths = {(*path, int(trie.tok[c])): c for path, node in paths.items() for c in children(trie, node)}
    return {path: int(trie.row[node - trie.leaf0]) for path, node in paths.items()}


@given(catalogues())
def test_accepts_exactly_the_catalogue(codes):
    trie = build_trie(codes)
    assert spellings(trie) == {tuple(code): row for row, code in enumerate(codes.tolist())}
    assert trie.size[-1] == trie.items == len(codes)
    assert sum(trie.size) == len(trie.tok) == len(trie.base) - 1
    assert (trie.row[trie.rank] == np.arange(len(codes))).all()


@given(catalogues(), st.data())
def test_several_spellings_of_an_item(codes, data):
    """The trie is that of the spellings; rows lead to all of an item's, the first one in front."""
    items = data.draw(st.integers(1, len(codes)))
    rows = np.append(np.arange(items), data.draw(hnp.arrays(np.int64, len(codes) - items, elements=st.integers(0, items - 1))))  # fmt: skip
    rows = rows[np.array(data.draw(st.permutations(range(len(codes)))))]
    trie, alone = build_trie(codes, rows), build_trie(codes)
    assert spellings(trie) == {tuple(code): row for row, code in zip(rows, codes.tolist(), strict=True)}
    assert (trie.items, trie.spellings, trie.most) == (items, len(codes), np.bincount(rows).max())
    assert all(np.array_equal(getattr(trie, name), getattr(alone, name)) for name in ("tok", "base", "lo", "hi", "ancestor"))  # fmt: skip
    for row in range(items):
        own = alone.rank[rows == row].tolist()  # in the order given
        others = trie.others[row]
        assert [int(trie.rank[row]), *others[others < len(codes)].tolist()] == own
    some = np.array(data.draw(st.lists(st.integers(0, items - 1), max_size=4)), int)
    ranks, owner = spelled_ranks(trie, some)
    assert sorted(zip(owner.tolist(), codes_of(trie, ranks).tolist(), strict=True)) == sorted(
        (i, code) for i, row in enumerate(some) for code in codes[rows == row].tolist()
    )
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=items, max_size=items)))
    assert (allowed_under(trie, allowed) == allowed_under(alone, allowed[rows])).all()


@given(catalogues())
def test_children_of_a_node_have_ascending_codes_and_width_is_their_most(codes):
    trie = build_trie(codes)
    depth = np.repeat(np.arange(trie.levels + 1), trie.size)
    for node in range(trie.leaf0):
        below = list(children(trie, node))
        assert below and (np.diff(trie.tok[below]) > 0).all()
        assert (depth[below] == depth[node] + 1).all()
    for t in range(trie.levels):
        assert trie.width[t] == max(len(children(trie, n)) for n in np.flatnonzero(depth == t))


@given(catalogues(), st.data())
def test_allowed_under_counts_what_a_walk_counts(codes, data):
    trie = build_trie(codes)
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes))))
    under = allowed_under(trie, allowed)

    def walk(node: int) -> int:
        return sum(map(walk, children(trie, node))) if node < trie.leaf0 else int(allowed[trie.row[node - trie.leaf0]])

    assert under.tolist() == [walk(node) for node in range(len(trie.tok))]
    assert (allowed_under(trie) == allowed_under(trie, np.ones(len(codes), bool))).all()


@given(catalogues())
def test_ancestors_are_the_nodes_on_the_way_down(codes):
    trie = build_trie(codes)
    for row, code in enumerate(codes):
        rank = trie.rank[row]
        node = 0
        for t, c in enumerate(code):
            assert trie.ancestor[t, rank] == node
            node = next(n for n in children(trie, node) if trie.tok[n] == c)
            assert trie.lo[node] <= rank < trie.hi[node]
        assert trie.ancestor[trie.levels, rank] == node


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_codes_too_wide_to_pack_sort_the_same(seed):
    rng = np.random.default_rng(seed)
    small = np.unique(rng.integers(0, 4, (30, 4)), axis=0)
    wide = small * (2**30)
    a, b = build_trie(small), build_trie(wide[:, :3] if len(np.unique(small[:, :3], axis=0)) == len(small) else wide)
    if b.levels == a.levels:
        assert (a.row == b.row).all() and (a.base == b.base).all()


def test_bad_codes_are_named():
    with pytest.raises(ValueError, match=r"rows 0 and 2 are both spelled \[1, 2\]"):
        build_trie(np.array([[1, 2], [0, 1], [1, 2]]))
    with pytest.raises(ValueError, match=r"row 1 is spelled \[1, 2\] twice"):
        build_trie(np.array([[1, 2], [0, 1], [1, 2]]), np.array([1, 0, 1]))
    with pytest.raises(ValueError, match="row 1 has no spelling"):
        build_trie(np.array([[0], [1], [2]]), np.array([0, 2, 0]))
    for rows, says in (
        ([0, -1], "not row -1"),
        ([0, 2], "not row 2"),
        ([0], "each of 2 spellings"),
        ([0.0, 1.0], "float"),
    ):
        with pytest.raises(ValueError, match=says):
            build_trie(np.array([[0], [1]]), np.array(rows))
    with pytest.raises(ValueError, match="row 1 holds -3"):
        build_trie(np.array([[1], [-3]]))
    for codes in (np.zeros((0, 2), int), np.zeros((2, 0), int), np.zeros(3, int), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="integers"):
            build_trie(codes)
    with pytest.raises(ValueError, match=r"bool \[2\]"):
        allowed_under(build_trie(np.array([[0], [1]])), np.ones(3, bool))
