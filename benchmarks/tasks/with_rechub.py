"""DIN as torch-rechub has it, run by an environment that has it: with_rechub.py ASKED.npz ANSWERED.npz"""

from __future__ import annotations

import copy
import sys

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIN

EPOCHS, PATIENCE, BATCH, BINS = 40, 5, 256, 11


def main() -> None:
    with np.load(sys.argv[1], allow_pickle=False) as file:
        asked = {name: file[name] for name in file.files}
    torch.manual_seed(int(asked["seed"]))
    torch.set_num_threads(2)
    width, items = int(asked["width"]), int(asked["items"])
    target = SparseFeature("asked", vocab_size=items, embed_dim=width, padding_idx=0)
    past = [SequenceFeature(name, vocab_size=items, embed_dim=width, pooling="concat", shared_with="asked", padding_idx=0) for name in ("liked", "disliked")]  # fmt: skip
    twice = [
        target,
        SparseFeature("asked_again", vocab_size=items, embed_dim=width, shared_with="asked", padding_idx=0),
    ]
    counts = [
        SparseFeature(f"count{i}", vocab_size=BINS, embed_dim=width) for i in range(asked["train_counts"].shape[1])
    ]
    model = DIN(counts, past, twice, {"dims": [64, 32], "dropout": 0.2}, {"dims": [32]})
    optimizer = torch.optim.Adam(model.parameters(), lr=float(asked["set_rate"]), weight_decay=1e-5)
    loss_of, rng = torch.nn.BCELoss(), np.random.default_rng(int(asked["seed"]))
    best, kept, since = -1.0, copy.deepcopy(model.state_dict()), 0
    labels = torch.tensor(asked["train_label"], dtype=torch.float32)
    for _ in range(EPOCHS):
        model.train()
        for at in np.array_split(rng.permutation(len(labels)), max(1, round(len(labels) / BATCH))):
            optimizer.zero_grad()
            loss_of(model(inputs(asked, "train", at)), labels[at]).backward()
            optimizer.step()
        found = roc_auc_score(asked["valid_label"], probabilities(model, asked, "valid"))
        if found > best:
            best, kept, since = found, copy.deepcopy(model.state_dict()), 0
        elif (since := since + 1) >= PATIENCE:
            break
    model.load_state_dict(kept)
    np.savez(sys.argv[2], **{split: probabilities(model, asked, split) for split in ("valid", "test")})


def inputs(asked: dict[str, np.ndarray], split: str, at: np.ndarray) -> dict[str, torch.Tensor]:
    made = {name: torch.tensor(asked[f"{split}_{name}"][at]) for name in ("asked", "liked", "disliked")}
    counts = asked[f"{split}_counts"][at]
    return (
        made
        | {"asked_again": made["asked"]}
        | {f"count{i}": torch.tensor(counts[:, i]) for i in range(counts.shape[1])}
    )


@torch.no_grad()
def probabilities(model: DIN, asked: dict[str, np.ndarray], split: str) -> np.ndarray:
    model.eval()
    return model(inputs(asked, split, np.arange(len(asked[f"{split}_label"])))).numpy()


if __name__ == "__main__":
    main()
