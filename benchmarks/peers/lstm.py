"""An LSTM that reads a history and predicts its next item: what sequence models were before Transformers (GRU4Rec).

Item embeddings also serve as the output layer; the loss is a softmax over the whole catalogue at every position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.peers.task import BATCH, Rank, Task, best


class NextItem(nnx.Module):
    """Logits of the next item after every position: `[B,T] -> [B,T,C]`; items are catalogue rows, -1 is padding."""

    def __init__(self, catalogue: int, width: int, dropout: float, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(catalogue, width, embedding_init=nnx.initializers.normal(width**-0.5), rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(width, width, rngs=rngs))
        self.bias = nnx.Param(jnp.zeros(catalogue))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def states(self, items: jax.Array) -> jax.Array:
        """What the LSTM knows after each position, `[B,T,D]`. Padding comes last, so no real position sees it."""
        return self.dropout(self.lstm(self.dropout(self.embed(jnp.maximum(items, 0)))))

    def logits(self, states: jax.Array) -> jax.Array:
        """`[..., D] -> [..., C]`."""
        return self.embed.attend(states) + self.bias


def lstm(task: Task) -> Rank:
    """Train a NextItem on the training sequences; the lists are those after the last item of each history."""
    s = task.settings
    model = NextItem(task.catalogue, s["width"], s["dropout"], nnx.Rngs(task.seed))
    optimizer = nnx.Optimizer(model, optax.adam(s["learning_rate"]), wrt=nnx.Param)
    rows, rng = windows(task.sequences, s["length"]), np.random.default_rng(task.seed)
    model.train()
    for _ in range(s["epochs"]):
        for batch in batches(rows, s["batch"], rng):
            _step(model, optimizer, batch)
    model.eval()

    def rank() -> np.ndarray:
        asked = [h[-s["length"] :] for h in task.histories]
        lists = [np.zeros((0, task.k), np.int32)]
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            lengths = np.array([len(h) for h in part])
            scores = _scores(model, padded(part, s["length"]), np.maximum(lengths - 1, 0))
            rows = best(np.asarray(scores), task.histories[start : start + BATCH], task.k)
            lists.append(np.where(lengths[:, None] > 0, rows, -1))  # nothing to read, nothing to say
        return np.concatenate(lists)

    return rank


@nnx.jit
def _step(model: NextItem, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    def loss_of(model: NextItem) -> jax.Array:
        wanted = batch[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model.logits(model.states(batch[:, :-1])), jnp.maximum(wanted, 0)
        )
        return jnp.where(wanted >= 0, losses, 0).sum() / jnp.maximum((wanted >= 0).sum(), 1)

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def _scores(model: NextItem, items: jax.Array, last: jax.Array) -> jax.Array:
    return model.logits(model.states(items)[jnp.arange(len(items)), last])


def windows(sequences: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Sequences cut into pieces of at most length + 1 items that share one, so that each step is predicted once."""
    return [s[at : at + length + 1] for s in sequences for at in range(0, len(s) - 1, length)]


def batches(rows: Sequence[np.ndarray], size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """One epoch: rows of like length together, int32 `[size,T]`, in random order; T - 1 is a power of two.

    The last rows are drawn again to fill a batch: each shape is compiled once.
    """
    lengths = np.array([len(row) for row in rows])
    order = np.lexsort((rng.random(len(rows)), np.ceil(np.log2(lengths - 1))))
    order = np.concatenate([order, rng.choice(len(rows), -len(rows) % size)]).reshape(-1, size)
    for at in rng.permutation(order):
        longest = int(lengths[at].max())
        yield padded([rows[i] for i in at], (1 << (longest - 2).bit_length()) + 1)


def padded(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Rows side by side, int32 `[rows, length]`, -1 after the last item."""
    table = np.full((len(rows), length), -1, np.int32)
    for own, row in zip(table, rows, strict=True):
        own[: len(row)] = row
    return table
