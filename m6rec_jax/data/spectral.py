"""Leading eigenvectors of large sparse matrices, the same at every run: subspace iteration from a seeded start.

Orthonormalised through the small Gram matrix, which is all matrix products: a tall QR is many times slower on few cores.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

OVERSAMPLE = 16
ITERATIONS = 4


def leading(
    apply: Callable[[np.ndarray], np.ndarray], size: int, width: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvalues [w], eigenvectors [size, w]) of the symmetric operator `apply`, the largest first, w <= width.

    Directions whose eigenvalue is nothing beside the largest are left out.
    """
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((size, min(width + OVERSAMPLE, size)), np.float32)
    for _ in range(ITERATIONS):
        basis = _orthonormal(apply(basis))
    basis = _orthonormal(basis)  # once more: through float32 products the first time is only nearly exact
    values, vectors = np.linalg.eigh((basis.T @ apply(basis)).astype(np.float64))
    order = np.argsort(-values, kind="stable")[:width]
    order = order[values[order] > 1e-6 * np.abs(values).max(initial=0)]
    made = (basis @ vectors[:, order].astype(np.float32)).astype(np.float32)
    # An eigenvector has no sign of its own: its largest entry is made positive.
    signs = np.sign(made[np.abs(made).argmax(0), np.arange(made.shape[1])]) if made.size else np.ones(made.shape[1])
    return values[order], made * signs.astype(np.float32)


def right_vectors(matrix: sp.csr_array, width: int) -> np.ndarray:
    """Leading right singular vectors `[columns, w]`, w <= width."""
    turned = sp.csr_array(matrix.T)
    rows, columns = int(matrix.shape[0]), int(matrix.shape[1])
    return leading(lambda x: turned @ (matrix @ x), columns, min(width, rows, columns))[1]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32; rows of nothing stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(norms > 1e-6, vectors / np.maximum(norms, 1e-6), 0).astype(np.float32)


def _orthonormal(x: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns of `x`; empty directions vanish."""
    values, vectors = np.linalg.eigh((x.T @ x).astype(np.float64))
    kept = values > 1e-10 * values.max(initial=0)
    return x @ (vectors[:, kept] / np.sqrt(values[kept])).astype(np.float32)
