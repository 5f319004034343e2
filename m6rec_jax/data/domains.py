"""Several datasets trained as one: what each is called, where its ids lie among all, what share of the targets it has.

Domains share the tokenizer. Each has its own items, codes and records; an example is made in the ids of its own dataset,
as it is when the model serves, and moved to its place in the joint id space last (DESIGN section 9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np

from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.artifacts.run import folder_name
from m6rec_jax.config import DataConfig, MixtureConfig
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.examples import Shift
from m6rec_jax.data.instances.builder import tasks_of_domains
from m6rec_jax.data.plan import Pool, make_pools, mixture_shares
from m6rec_jax.data.records import BadRecords, RecordReader
from m6rec_jax.data.tasks import Facts
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import PAD_MULTIPLE, Vocab

ATTRIBUTE_SAMPLE, ATTRIBUTE_MOST = 1000, 32  # users looked at, and most tokens kept, for what is known of a user


@dataclass(frozen=True)
class Domain:
    """A dataset among those trained together; `records`: how many records of a split come before its own."""

    dataset: Dataset
    facts: Facts
    shift: Shift
    records: Mapping[str, int]
    weight: float = 1.0

    @property
    def name(self) -> str:
        return self.dataset.name


def open_domains(paths: Sequence[Path | str], weights: Sequence[float] = ()) -> list[Domain]:
    """Open datasets to be trained together, in this order.

    Raises InputError when there is none, when two have one name or different tokenizers, or when a weight is not above 0.
    """
    if not paths:
        raise InputError("--dataset: none given; name at least one folder that `m6rec prepare` wrote")
    weights = list(weights) or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise InputError(f"weights: {len(weights)} given for {len(paths)} datasets; give one a dataset")
    datasets = [open_dataset(path) for path in paths]
    first, named = datasets[0], dict[str, Dataset]()
    for dataset, weight in zip(datasets, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise InputError(f"--dataset {dataset.path}={weight:g}: a weight is above 0; leave the dataset out instead")
        if (other := named.setdefault(folder_name(dataset.name), dataset)) is not dataset:
            raise InputError(f"--dataset {dataset.path}: named {dataset.name!r} like {other.path}; prepare it again with another `name:` in its card, or leave one out")  # fmt: skip
        if _tokenizer(dataset) != _tokenizer(first):
            raise InputError(f"--dataset {dataset.path}: another tokenizer than {first.path}'s, and datasets trained together share one; prepare it with m6rec prepare --like {first.path} --borrow tokenizer")  # fmt: skip
    made, tokens, rows, records = [], 0, 0, {"train": 0, "valid": 0}
    options = reduce(Vocab.joined, (dataset.vocab for dataset in datasets)).codes_end
    for dataset, weight in zip(datasets, weights, strict=True):
        text_end, codes_end = dataset.vocab.text.end, dataset.vocab.codes_end
        shift = Shift(text_end, tokens, rows, codes_end, options - codes_end)
        made.append(Domain(dataset, facts_of(dataset), shift, dict(records), weight))
        tokens += codes_end - text_end
        options += sum(dataset.vocab.options)
        rows += -(-dataset.catalogue // PAD_MULTIPLE) * PAD_MULTIPLE
        records = {split: n + dataset.manifest["sizes"][f"{split}_records"] for split, n in records.items()}
    return made


def joint_vocab(domains: Sequence[Domain]) -> Vocab:
    """One id space: text, then the code levels of each domain, then the options of all."""
    return reduce(Vocab.joined, (domain.dataset.vocab for domain in domains))


def joint_records(domains: Sequence[Domain], split: str, bad: BadRecords | None = None) -> RecordReader:
    """The records of a split of all domains, one domain after the other; `bad` lets damaged ones be left out."""
    readers = [domain.dataset.records(split) for domain in domains]
    return RecordReader([path for reader in readers for path in reader.paths], bad)


def joint_pools(domains: Sequence[Domain], mixture: MixtureConfig, split: str, config: DataConfig) -> list[Pool]:
    """The pools of every domain, one a task of the mixture each, over `joint_records`."""
    return [
        replace(pool, records=pool.records + domain.records[split], shift=domain.shift, domain=number)
        for number, (domain, own) in enumerate(zip(domains, tasks_of_domains(domains), strict=True))
        for pool in make_pools(mixture, domain.dataset.index, split, config, domain.facts, own)
    ]


def joint_shares(domains: Sequence[Domain], mixture: MixtureConfig, pools: Sequence[Pool]) -> np.ndarray:
    """Shares of target tokens `[pools]`: those of the mixture within a domain, whose sum is its weight among all weights.

    What tasks without a record in a domain leave goes to that domain's other tasks.
    """
    if len(domains) == 1:
        return mixture_shares(mixture, list(pools))
    shares = []
    for number, domain in enumerate(domains):
        own = [pool for pool in pools if pool.domain == number]
        usable = mixture_shares(mixture, own) * np.array([len(pool.records) > 0 for pool in own])
        if not usable.any():
            raise InputError(f"--dataset {domain.dataset.path}: no record of it fits any task of the mixture; add a task, prepare more data, or leave it out")  # fmt: skip
        shares.append(domain.weight * usable / usable.sum())
    together = np.concatenate(shares)
    return together / together.sum()


def labels(domains: Sequence[Domain], pools: Sequence[Pool]) -> list[tuple[str, ...]]:
    """What each pool is logged under: its task and, among several domains, `task@domain` as well."""
    if len(domains) == 1:
        return [(pool.task.name,) for pool in pools]
    return [(pool.task.name, f"{pool.task.name}@{domains[pool.domain].name}") for pool in pools]


def facts_of(dataset: Dataset) -> Facts:
    """What task builders must know of a dataset."""
    kind_weights = np.array(dataset.manifest.get("kind_weights") or [1.0], np.float32)
    known = dataset.users["attributes"] if "attributes" in dataset.users.columns else None
    if known is None or int(known.list.len().sum() or 0) == 0:
        return Facts(dataset.vocab, dataset.codes, dataset.timed, kind_weights)

    @lru_cache(maxsize=1 << 16)
    def attributes(user: int) -> np.ndarray:
        said = known[user]
        return np.array(dataset.tokenizer.encode(", ".join([] if said is None else said)), np.int32)

    longest = max(len(attributes(user)) for user in range(min(len(known), ATTRIBUTE_SAMPLE)))
    room = 1 + min(longest, ATTRIBUTE_MOST)
    return Facts(dataset.vocab, dataset.codes, dataset.timed, kind_weights, attributes, room)


def _tokenizer(dataset: Dataset) -> str:
    return file_digest(dataset.path / "tokenizer.model")
