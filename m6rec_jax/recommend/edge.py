"""A run as one file for small devices (`m6rec_jax.edge`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.edge.file import Tensor, pack
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import ItemTable
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.quantised import SUMMED
from m6rec_jax.vocab import domain_prefix


def write_edge(
    out: Path, blueprint: Blueprint, params: Mapping[str, Any], items: list[ItemTable], tokenizer: bytes,
    facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the file `out` of parameters on the host.

    `items`: the facts of each domain's catalogue, where the model reads item content; `facts` are said in the header.
    Raises InputError for a model of experts, which the runner does not compute.
    """
    config = blueprint.config
    if config.experts:
        raise InputError(f"model.experts={config.experts}: the runner of --format edge computes one feed-forward network a layer; train with model.experts=0")  # fmt: skip
    described = {
        **facts,
        "model": {
            "layers": config.layers, "shared_layers": config.shared_layers, "width": config.width, "heads": config.heads,
            "kv_heads": config.n_kv, "head_size": config.head_dim, "rope_theta": config.rope_theta,
            "norm_eps": config.norm_eps,
        },
        "vocab": blueprint.vocab.as_dict(),
        "slices": [
            {"name": s.name, "offset": s.offset, "size": s.size, "domain": s.domain, "atomic": s.atomic}
            for s in blueprint.vocab.slices
        ],
        "options": blueprint.vocab.as_dict().get("options", []),
        "domains": blueprint.vocab.domains,
    }  # fmt: skip
    made = pack(described, tensors(blueprint, params, items), tokenizer)
    with atomic_path(out) as path:
        path.write_bytes(made)


def tensors(blueprint: Blueprint, params: Mapping[str, Any], items: list[ItemTable]) -> dict[str, Tensor]:
    """What the runner reads, float32: spare rows left out, content of items multiplied out, unseen items' ids zero."""
    host, embeddings = (lambda x: np.asarray(x, np.float32)), params["embeddings"]
    made = {f"block.{name}": Tensor(host(x), SUMMED.get(name)) for name, x in params["block"].items()}
    made["final_norm"] = Tensor(host(params["final_norm"]))
    for s in blueprint.vocab.slices:
        table = host(embeddings["tables"][s.name])[: s.size]
        if s.atomic and blueprint.config.content:
            table = np.where(np.asarray(items[s.domain].seen)[: s.size, None], table, 0)
        made[f"tables.{s.name}"] = Tensor(table, SUMMED["tables"])
    if blueprint.config.content:
        for domain, facts in enumerate(items):
            matrix = embeddings["more_content"][f"{domain_prefix(domain)}content"] if domain else embeddings["content"]
            made[f"content.{domain}"] = Tensor(np.asarray(facts.content) @ host(matrix), SUMMED["tables"])
    if blueprint.config.embed:
        made["projection"] = Tensor(host(embeddings["projection"]), (0,))
    return made
