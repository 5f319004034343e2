"""The weights of a run for other programs: a folder of plain arrays, a Hugging Face Llama, or one file for small devices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.artifacts.checkpoints import load_params
from m6rec_jax.artifacts.run import Run, read_run
from m6rec_jax.artifacts.tensors import by_path, write_tensors
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.errors import InputError
from m6rec_jax.model.export import llama
from m6rec_jax.model.items import ItemTable, item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.recommend.edge import write_edge
from m6rec_jax.vocab import BOS, EOS, OPTIONS, PAD

FORMATS, DTYPES = ("safetensors", "llama", "edge"), {"float32": np.float32, "bfloat16": jnp.bfloat16}


def export(run: Path | str, out: Path | str, kind: str, *, step: int | str = "best", dtype: str = "float32") -> tuple[int, list[str]]:  # fmt: skip
    """Write the parameters of a step into the new folder `out`; returns the step and the files.

    `kind`: safetensors (every parameter by its path) or llama (`model.export.llama`, ids as in the run). Both get
    `tokenizer.model`, `vocab.json` (which ids are whose) and `items.parquet` (`domain, item_id, tokens`). edge: `out` is
    one file, int8 (`recommend.edge`). Raises InputError when `out` is there already, or the model has no place there.
    """
    if kind not in FORMATS or dtype not in DTYPES:
        raise InputError(f"format={kind}, dtype={dtype}: choose {' or '.join(FORMATS)}, and {' or '.join(DTYPES)}")
    if kind == "edge" and dtype != "float32":
        raise InputError(f"format=edge, dtype={dtype}: its numbers are int8; leave --dtype out")
    if Path(out).exists():
        what = "file" if kind == "edge" else "folder"
        raise InputError(f"{out}: is there already; name a new {what} with --out, or remove it")
    record = read_run(run)
    blueprint = Blueprint(record.config.model, record.vocab, record.content_width, record.more_widths)
    step, params = load_params(run, step, blueprint.shapes())
    params = jax.device_get(params)
    facts = [facts_of(record, i) for i in range(len(record.names))] if record.config.model.content else []
    if kind == "edge":
        said = {"step": step, "code": record.code, "names": record.names}
        write_edge(Path(out), blueprint, params, facts, (record.folder() / "tokenizer.model").read_bytes(), said)
        return step, [f"{Path(out).stat().st_size:,} bytes"]
    if kind == "llama":
        described, tensors = llama(blueprint, params, record.config.data.length, facts)
        described["dtype"] = dtype
    else:
        described, tensors = {"config": record.config.as_dict(), "code": record.code}, dict(by_path(params))
    tensors = {name: np.asarray(x, DTYPES[dtype]) for name, x in tensors.items()}
    with atomic_path(out) as folder:
        folder.mkdir()
        write_tensors(folder, tensors)
        _write(folder / "config.json", described)
        _write(folder / "vocab.json", {"step": step, **record.vocab.as_dict(), "slices": slices(record)})
        if kind == "llama":
            _write(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
        shutil.copyfile(record.folder() / "tokenizer.model", folder / "tokenizer.model")
        spellings(record).write_parquet(folder / "items.parquet")
        files = sorted(path.name for path in folder.iterdir())
    return step, files


def facts_of(record: Run, domain: int) -> ItemTable:
    """The content of a domain's catalogue and which of its items were seen, from the run itself."""
    folder = record.folder(domain)
    seen = pl.read_parquet(folder / "items.parquet", columns=["seen"])["seen"].to_numpy()
    return item_table(read_arrays(folder / "codes.npz")["content"], seen)


def slices(record: Run) -> list[dict[str, Any]]:
    """The vocabulary: names, first ids, ids in use and rows of each slice."""
    return [
        {"name": s.name, "offset": s.offset, "size": s.size, "rows": s.padded, "domain": record.names[s.domain]}
        for s in record.vocab.slices
    ]


def spellings(record: Run) -> pl.DataFrame:
    """`domain, item_id, tokens`: the token ids of each item, level 1 first."""
    made = []
    for number, name in enumerate(record.names):
        folder = record.folder(number)
        offsets = np.array([s.offset for s in record.vocab.slices[1:] if s.domain == number and s.name != OPTIONS])
        tokens = (read_arrays(folder / "codes.npz")["codes"] + offsets).astype(np.int32)
        ids = pl.read_parquet(folder / "items.parquet", columns=["item_id"])["item_id"]
        made.append(pl.DataFrame({"domain": [name] * len(ids), "item_id": ids, "tokens": tokens.tolist()},
                                 schema_overrides={"tokens": pl.List(pl.Int32)}))  # fmt: skip
    return pl.concat(made)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
