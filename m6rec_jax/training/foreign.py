"""Parameters from a folder of Hugging Face: the layers of a Llama, text by its pieces, codes where the folder has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.artifacts.tensors import FILE, INDEX, Stored, open_tensors, read_object
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.pieces import Pieces, of_sentencepiece, read_pieces, stand_for
from m6rec_jax.errors import InputError
from m6rec_jax.model.imports import EMBEDDINGS, HEAD, checked, layers, settings, to_change
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import note
from m6rec_jax.vocab import OPTIONS, SPECIALS

ROWS = 8192  # of a table read at a time


def from_folder(folder: Path, datasets: Sequence[Dataset], blueprint: Blueprint) -> Callable[[Any], Any]:
    """What makes of fresh embeddings of `blueprint`, all on the host, parameters with the layers and the text of a Llama,
    once it is known that they fit.

    Each text piece gets the row of the same piece there, or the mean of those that spell it. Our table is input and
    output at once: an output table of its own is not taken. Items keep their fresh codes, unless `m6rec export` wrote
    the folder from a run that knew them. Raises InputError when the folder holds no such model, or one of other sizes.
    """
    said = f"--init-from {folder}: "
    try:
        tensors, described = _opened(folder)
        wanted = settings(described)
        differ = to_change(blueprint.config, wanted)
        if differ:
            raise InputError(f"its sizes are not this configuration's; train with {' '.join(differ)}")
        found, theirs = checked(blueprint, tensors), read_pieces(folder)
        exported = _exported(folder)
    except InputError as error:
        raise InputError(said + str(error).removeprefix(f"{folder}: ")) from None

    def give(fresh: dict[str, Any]) -> dict[str, Any]:
        table = found[EMBEDDINGS].read()
        ours = of_sentencepiece((datasets[0].path / "tokenizer.model").read_bytes())
        text, counts = text_table(fresh["tables"]["text"], ours, theirs, table, described)
        embeddings, back = {**fresh, "tables": {**fresh["tables"], "text": text}}, 0
        params = {**layers(blueprint, found), "embeddings": embeddings}
        for number, dataset in enumerate(datasets):
            own = blueprint.domain_params(params, number)
            tables, known = _with_codes(exported, dataset, own["embeddings"], table)
            params = blueprint.with_domain(params, number, {**own, "embeddings": {**own["embeddings"], "tables": tables}})  # fmt: skip
            back += known
        items = f"codes of {back:,} items by id" if back else "item codes begin anew"
        untied = HEAD in found and not described.get("tie_word_embeddings", False)
        head = "; lm_head is not taken: input and output share a table here" if untied else ""
        note(f"{said}layers as they are; {counts}; {items}{head}")
        return params

    return give


def text_table(
    fresh: np.ndarray, ours: Pieces, theirs: Pieces, table: np.ndarray, described: Mapping[str, Any]
) -> tuple[np.ndarray, str]:
    """Our text table `[V, D]` from theirs `[any, D]`, and in words how many rows come from where.

    Control symbols are found by name, begin and end also by the ids that config.json gives; others keep fresh rows.
    """
    made, mean = np.array(fresh, np.float32), None
    same = several = none = 0
    rows = len(table)
    for i, ids in stand_for(ours, theirs).items():
        ids = [one for one in ids if one < rows]
        if len(ids) == 1:
            made[i] = table[ids[0]]
            same += 1
        elif ids:
            made[i] = table[ids].astype(np.float32).mean(0)
            several += 1
        else:
            mean = _mean(table) if mean is None else mean
            made[i] = mean
            none += 1
    controls = theirs.controls.copy()
    for name, key in (("<s>", "bos_token_id"), ("</s>", "eos_token_id"), ("<pad>", "pad_token_id")):
        given = described.get(key)
        given = given[0] if isinstance(given, list) and given else given
        if isinstance(given, int):
            controls.setdefault(name, given)
    kept = 0
    for name, i in SPECIALS.items():
        if 0 <= controls.get(name, rows) < rows:
            made[i] = table[controls[name]]
            kept += 1
    return made, (
        f"of {same + several + none:,} text pieces {same:,} by their like, {several:,} by the mean of what spells them, "
        f"{none:,} by the mean of all; {kept} of {len(SPECIALS)} control symbols by name"
    )


def _opened(folder: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors of a folder and its config.json; InputError when there are none that can be read safely."""
    described = read_object(folder / "config.json")
    if "model_type" not in described and "config" in described:
        raise InputError("`m6rec export --format safetensors` wrote it, for other programs; name the run, or export it with --format llama")  # fmt: skip
    settings(described)  # of another architecture is the first thing to know
    pickled = sorted(file.name for suffix in ("*.bin", "*.pth", "*.pt") for file in folder.glob(suffix))
    if pickled and not (folder / FILE).is_file() and not (folder / INDEX).is_file():
        raise InputError(f"{pickled[0]} is a pickle, which can run any program when it is opened; where you trust it, save it again with transformers: AutoModelForCausalLM.from_pretrained(X).save_pretrained(Y, safe_serialization=True)")  # fmt: skip
    return open_tensors(folder), described


def _mean(table: np.ndarray) -> np.ndarray:
    """The mean of all rows, float32; a table may be larger than memory."""
    total = np.zeros(table.shape[1])
    for start in range(0, len(table), ROWS):
        total += table[start : start + ROWS].astype(np.float32).sum(0, dtype=np.float64)
    return (total / len(table)).astype(np.float32)


def _exported(folder: Path) -> tuple[list[dict[str, Any]], pl.DataFrame] | None:
    """The vocabulary slices and the spelled items that `m6rec export` put into a folder; None where it wrote none.

    Other tokenizers have a vocab.json too, without slices.
    """
    file, items = folder / "vocab.json", folder / "items.parquet"
    slices = read_object(file).get("slices") if file.is_file() and items.is_file() else None
    if not isinstance(slices, list):
        return None
    try:
        made = [
            {"domain": str(s["domain"]), "offset": int(s["offset"]), "rows": int(s["rows"])}
            for s in slices[1:]
            if s.get("name") != OPTIONS
        ]
        return made, pl.read_parquet(items, columns=["domain", "item_id", "tokens"])
    except (KeyError, TypeError, ValueError, OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{file} or {items.name}: damaged ({type(error).__name__}); export the folder again") from None


def _with_codes(
    exported: tuple[list[dict[str, Any]], pl.DataFrame] | None,
    dataset: Dataset,
    own: Mapping[str, Any],
    table: np.ndarray,
) -> tuple[dict[str, np.ndarray], int]:
    """The tables of a dataset with code rows of an exported run, and how many items were found in it by id.

    Atomic items get the row of their id, less what our content adds to it. Several levels are taken whole, where every
    item that both know is spelled alike: the same codebooks.
    """
    tables = dict(own["tables"])
    levels = [s for s in exported[0] if s["domain"] == dataset.name] if exported else []
    names = [f"level{i}" for i in range(1, dataset.levels + 1)]
    if exported is None or len(levels) != len(names):
        return tables, 0
    known = exported[1].filter(pl.col("domain") == dataset.name)
    both = dataset.items.select("item_id").with_row_index("row").join(known, on="item_id")
    if not len(both) or not (both["tokens"].list.len() == len(names)).all():
        return tables, 0
    rows, tokens = both["row"].to_numpy(), np.array(both["tokens"].to_list())
    codes = read_arrays(dataset.path / "codes.npz")["codes"][rows]
    if len(names) == 1:
        made = np.array(tables["level1"])
        made[codes[:, 0]] = table[tokens[:, 0]]
        if "content" in own:
            made[codes[:, 0]] -= dataset.content[rows] @ own["content"]
        return tables | {"level1": made}, len(rows)
    if (tokens - [s["offset"] for s in levels] != codes).any():
        return tables, 0
    for name, s in zip(names, levels, strict=True):
        if s["rows"] != len(tables[name]):
            return dict(own["tables"]), 0
        tables[name] = table[s["offset"] : s["offset"] + s["rows"]].astype(np.float32)
    return tables, len(rows)
