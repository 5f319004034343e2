"""Hugging Face's Llama trained by torch, run by an environment that has them: hf.py JOB

`autocast`: float32 parameters, products in bfloat16; otherwise parameters and moments have the dtype of the job.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from answers import fastest, serve
from transformers import LlamaConfig, LlamaForCausalLM

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
torch.manual_seed(0)
work, dtype = Path(job["work"]), getattr(torch, job["dtype"])
described = json.loads((work / "config.json").read_text(encoding="utf-8"))
model = LlamaForCausalLM(LlamaConfig(**described, attn_implementation="sdpa"))
with np.load(work / "llama.npz", allow_pickle=False) as file:
    model.load_state_dict({name: torch.from_numpy(file[name]) for name in file.files}, strict=False)
model.tie_weights()
model.config.use_cache = False
if not job["autocast"]:
    model = model.to(dtype)
context = (lambda: torch.autocast("cpu", dtype=dtype)) if job["autocast"] else nullcontext
batches = torch.from_numpy(np.load(work / "batches.npy").astype(np.int64))
optim = job["optim"]
matrices = [p for name, p in model.named_parameters() if "proj" in name]
others = [p for name, p in model.named_parameters() if "proj" not in name]
groups = [{"params": matrices, "weight_decay": optim["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
adam = torch.optim.AdamW(groups, lr=optim["learning_rate"], betas=(optim["b1"], optim["b2"]), fused=True)


def loss_of(ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), use_cache=False).loss


run = torch.compile(loss_of) if job["compiled"] else loss_of


def step(number: int) -> None:
    with context():
        loss = run(batches[number % len(batches)])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip"])
    adam.step()
    adam.zero_grad(set_to_none=True)


def start() -> dict[str, float]:
    with torch.no_grad(), context():
        return {"loss": float(loss_of(batches[0]))}


def peak(size: int) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return fastest(lambda: a @ b)


serve(start, step, peak)
