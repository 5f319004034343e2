"""From a run's `InstanceScorer` to what answers the same instances faster: late interaction or early exit."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from m6rec_jax.data.instances.layout import Laid
from m6rec_jax.decoding.exits import ExitScorer
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.decoding.late import CACHE_BYTES, LateScorer
from m6rec_jax.decoding.shapes import Prompt
from m6rec_jax.model.items import widened
from m6rec_jax.vocab import OPTIONS


def late_scorer(scorer: InstanceScorer, cache_bytes: int = CACHE_BYTES) -> LateScorer:
    """Its model with parts kept. Raises InputError when it was trained without late interaction."""
    return LateScorer(scorer.blueprint.bind(_params(scorer)), scorer.items, cache_bytes=cache_bytes)


def exit_scorer(scorer: InstanceScorer) -> ExitScorer:
    """Its model with exits. Raises InputError when its layers were not trained to answer."""
    return ExitScorer(scorer.blueprint.bind(_params(scorer)), scorer.items)


def option_table(scorer: InstanceScorer, task: str) -> Float[Array, "C D"]:
    """The output table's rows of a task's options, which both scorers are given. Raises InputError when it has none."""
    rows = scorer.option_rows(task)
    embeddings = _params(scorer)["embeddings"]
    return widened(embeddings, jnp.asarray(embeddings["tables"][OPTIONS])[rows])


def prompts(laid: Sequence[Laid]) -> list[Prompt]:
    """Instances that are laid out (`Instances.laid_out`), as both scorers read them."""
    return [(one.source, one.source_rows) for one in laid]


def chances(logits: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "n C"]:
    """The chance of each option: what `InstanceScorer.chances` gives."""
    return np.asarray(jax.nn.softmax(logits, axis=-1))


def _params(scorer: InstanceScorer) -> dict:
    return nnx.to_pure_dict(scorer.params)
