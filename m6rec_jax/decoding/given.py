"""Items that are given: how likely each is after a history, and by which steps. Nothing is searched for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m6rec_jax.decoding import programs
from m6rec_jax.decoding.requests import Requests, mass_of
from m6rec_jax.decoding.shapes import BATCH_TOKENS, batches, bucket, pad, rectangle
from m6rec_jax.decoding.steps import Steps
from m6rec_jax.decoding.trie import Trie, codes_of, spelled_ranks
from m6rec_jax.decoding.wave import BATCH_CHILDREN, Wave
from m6rec_jax.vocab import Vocab

Rows = Sequence[np.ndarray]  # catalogue rows of each user
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
LEAST_ROWS = 16  # the fewest rows a user that a program is compiled for; others are four times as many, and again


def check_rows(given: Rows, users: int, catalogue: int) -> None:
    """ValueError unless these are catalogue rows, a list a user."""
    if len(given) != users:
        raise ValueError(f"{users} histories, {len(given)} lists of candidates")
    for u, rows in enumerate(given):
        if len(rows) and not 0 <= np.min(rows) <= np.max(rows) < catalogue:
            raise ValueError(f"candidates of user {u}: a row outside the catalogue of {catalogue} items")


def score(wave: Wave, trie: Trie, vocab: Vocab, requests: Requests, given: Rows) -> list[Parts]:
    """(scores, log-probability by the model, log of the memory's share) of each user's rows, in the order given: those
    of the best spelling of each. `trie` is that of the wave, on the host.

    Users with like numbers of spellings and like prefixes share a program. Very many are read in lots, each history once.
    """
    nothing = np.zeros(0, np.float32)
    made: list[Parts] = [(nothing, nothing, nothing)] * len(given)
    lengths, levels, codebook = requests.lengths, trie.levels, max(s.size for s in vocab.levels)
    spelled = [spelled_ranks(trie, rows) for rows in given]
    widths = np.array([_width(len(ranks)) if len(ranks) else 0 for ranks, _ in spelled], np.int64)
    for J in sorted({int(n) for n in widths} - {0}):
        same = np.flatnonzero(widths == J)
        lot, most = _lot(J, codebook if levels > 1 else 1, levels - 1)  # of one level, one row of logits serves all
        for at, T, B in batches(lengths[same], min(most, BATCH_CHILDREN // codebook), wave.devices.count):
            chosen = same[at]
            carried = [mass_of(given[u], requests.support[u], requests.mass[u]) for u in chosen]
            prefixes, gate, heat = _asked(requests, chosen, B, T)
            own = (
                *prefixes, codes_of(trie, rectangle([spelled[u][0] for u in chosen], B, J, 0, np.int32)),
                rectangle(carried, B, J, 0, np.float32), gate, heat,
            )  # fmt: skip
            found = wave.devices.run(programs.rank, (wave.define, lot), (wave.params, wave.items), own)
            parts = [np.asarray(part) for part in found]
            for i, u in enumerate(chosen):
                ranks, owner = spelled[u]
                scores, logp, logmass = (part[i, : len(ranks)] for part in parts)
                if len(ranks) > len(given[u]):
                    best = _best(scores, owner)
                    scores, logp, logmass = scores[best], logp[best], logmass[best]
                made[u] = scores, logp, logmass
    return made


def _best(scores: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Place of the highest of the scores of each owner 0..n-1; of equal ones the first."""
    order = np.lexsort((-scores, owner))
    return order[np.unique(owner[order], return_index=True)[1]]


def walk(wave: Wave, vocab: Vocab, requests: Requests, rows: np.ndarray, only: Rows | None, others: int) -> Steps:
    """The steps to items `rows [U, J]` (-1 = none), with as many `others` beside each.

    What may be shown to a user: `only` these rows, where they are given; else what the wave lets through, less the
    request's own exclusions.
    """
    trie, there, J = wave.trie, rows >= 0, _width(rows.shape[1])
    steps = Steps.empty(len(rows), rows.shape[1], trie.levels, others)
    told = [np.unique(some) for some in (requests.exclude if only is None else only)]
    sign, lengths = np.int32(-1 if only is None else 1), requests.lengths
    codebook = max(s.size for s in vocab.levels)
    wanted = np.pad(np.maximum(rows, 0), ((0, 0), (0, J - rows.shape[1])))
    asked = np.flatnonzero(there.any(1))
    most_told = max((len(told[u]) for u in asked), default=0)  # each is looked for under each node
    lot, most = _lot(J, trie.most * max(codebook, *trie.width, most_told), trie.most * (trie.levels - 1))
    for at, T, B in batches(lengths[asked], most, wave.devices.count):
        chosen = asked[at]
        some = [told[u] for u in chosen]
        prefixes, _, heat = _asked(requests, chosen, B, T)
        own = (
            *prefixes, rectangle(some, B, bucket(max(map(len, some)), 32, 4), -1, np.int32),
            np.pad(wanted[chosen], ((0, B - len(chosen)), (0, 0))), heat,
        )  # fmt: skip
        shared = wave.params, wave.items, trie, wave.under, sign
        found = wave.devices.run(programs.walk, (wave.define, others, lot), shared, own)
        steps.put(chosen, found, there[chosen])
    return steps


def _width(rows: int) -> int:
    return bucket(rows, LEAST_ROWS, 4)


def _lot(J: int, each: int, tokens: int) -> tuple[int, int]:
    """How many of J rows (a `_width`) a program reads at a time, and most users of one on a device: with `each` numbers
    and so many `tokens` a row, not more than other programs have."""
    fits = lambda rows: (BATCH_CHILDREN // (rows * each), BATCH_TOKENS // max(1, rows * tokens))  # noqa: E731
    lot = J
    while lot > 1 and not min(fits(lot)):
        lot //= 4
    return lot, max(1, min(fits(lot)))


def _asked(requests: Requests, chosen: np.ndarray, B: int, T: int) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:  # fmt: skip
    """Prefixes, gates and temperatures of some users as the arrays of a program of shape (B, T)."""
    spare = (0, B - len(chosen))
    heat = np.pad(requests.temperature[chosen], spare, constant_values=1)
    return pad([requests.prompts[u] for u in chosen], B, T), np.pad(requests.gate[chosen], spare), heat
