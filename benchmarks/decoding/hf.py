"""Hugging Face transformers on the exported weights, run by an environment that has it: hf.py JOB ANSWER

`hf` is `generate` as its documentation has it; `hf-strong` is what one would write with the same library for speed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor
from work import System, Work, answer, children


def load(work: Work, job: dict[str, Any]) -> LlamaForCausalLM:
    """The exported model, in the arithmetic and on the threads of the job."""
    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    return AutoModelForCausalLM.from_pretrained(work.folder / "llama", dtype=dtype, attn_implementation="sdpa").eval()


class LevelSoftmax(LogitsProcessor):
    """Log-probabilities over the ids of the level at hand, as the model was trained, in place of the whole vocabulary."""

    def __init__(self, start: int, offsets: list[int], sizes: list[int]) -> None:
        self.start, self.offsets, self.sizes = start, offsets, sizes

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        level = input_ids.shape[1] - self.start
        ids = slice(self.offsets[level], self.offsets[level] + self.sizes[level])
        out = torch.full_like(scores, -torch.inf)
        out[:, ids] = F.log_softmax(scores[:, ids], dim=-1)
        return out


def plain(work: Work, job: dict[str, Any]) -> System:
    """`generate` with beams, and a dict trie asked for the tokens that may follow."""
    model, beams = load(work, job), job["beams"]
    L, T = work.codes.shape[1], work.prefixes.shape[1]
    trie: dict[int, Any] = {}
    for spelling in (work.codes + work.offsets).tolist():
        node = trie
        for token in spelling:
            node = node.setdefault(token, {})

    def allowed(batch_id: int, ids: torch.Tensor) -> list[int]:
        node = trie
        for token in ids[T:].tolist():
            node = node.get(token, {})
        # `generate` wants a token to go on with also after a beam that it has given up, which spells nothing.
        return list(node) or [int(work.offsets[min(len(ids) - T, L - 1)])]

    # The processor is what `prefix_allowed_tokens_fn=allowed` would make. It is made here so that the softmax over a
    # level can stand before it; behind it, that would be a softmax over what is allowed.
    processors = LogitsProcessorList(
        [LevelSoftmax(T, work.offsets.tolist(), work.sizes.tolist()), PrefixConstrainedLogitsProcessor(allowed, beams)]
    )
    settings = {
        "num_beams": beams, "num_return_sequences": beams, "do_sample": False, "length_penalty": 0.0,
        "min_new_tokens": L, "max_new_tokens": L, "eos_token_id": None, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def search(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = torch.from_numpy(work.prefixes[users].astype(np.int64))
        made = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=processors, **settings)
        tokens = made.sequences[:, T:].numpy().reshape(len(users), beams, L)
        return work.rows(tokens - work.offsets), made.sequences_scores.float().numpy().reshape(len(users), beams)

    return System(search)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room for the ids, so that a step copies no prefix."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, beams: int, room: int) -> None:
        super().__init__()
        B, K, T, h = keys.shape
        self.start = self.length = T
        self.buffers = tuple(keys.new_empty(B * beams, K, T + room, h) for _ in range(2))
        for buffer, once in zip(self.buffers, (keys, values), strict=True):
            buffer.view(B, beams, K, T + room, h)[:, :, :, :T] = once[:, None]
        self._view()

    def _view(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        end = self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        self._view()
        return self.keys, self.values

    def follow(self, parent: torch.Tensor) -> None:
        """Give every beam the ids' part of the beam it grew from; the prefix is the same for all beams of a user."""
        for buffer in self.buffers:
            buffer[:, :, self.start : self.length] = buffer[parent, :, self.start : self.length]


def strong(work: Work, job: dict[str, Any]) -> System:
    """One prefill a user, its cache repeated for the beams, a table as the trie, an output head of one level."""
    model, beams = load(work, job), job["beams"]
    L, T = work.codes.shape[1], work.prefixes.shape[1]
    child = torch.from_numpy(children(work.codes, int(work.sizes.max())))

    def log_probabilities(hidden: torch.Tensor, level: int) -> torch.Tensor:
        ids = slice(int(work.offsets[level]), int(work.offsets[level] + work.sizes[level]))
        return F.log_softmax(F.linear(hidden, model.lm_head.weight[ids]).float(), dim=-1)

    @torch.inference_mode()
    def search(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, B = torch.from_numpy(work.prefixes[users].astype(np.int64)), len(users)
        cache = DynamicCache()
        hidden = model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        hidden = hidden[:, None]  # one beam a user: the empty spelling
        node, score = torch.zeros(B, 1, dtype=torch.long), torch.zeros(B, 1)
        spelled = torch.zeros(B, 1, 0, dtype=torch.long)
        for level in range(L):
            codes = int(work.sizes[level])
            logp = log_probabilities(hidden, level)
            after = child[node, :codes]
            grown = (score[..., None] + logp).masked_fill(after < 0, -torch.inf).flatten(1)
            width = min(beams, grown.shape[1])
            score, slot = grown.topk(width, dim=1)
            parent, code = slot // codes, slot % codes
            node = after.flatten(1).gather(1, slot).clamp(min=0)
            history = spelled.gather(1, parent[..., None].expand(-1, -1, level))
            spelled = torch.cat([history, code[..., None]], dim=2)
            if level == L - 1:
                break
            if level == 0:
                for i, layer in enumerate(cache.layers):
                    cache.layers[i] = RoomyLayer(layer.keys, layer.values, width, L - 1)
            else:
                own = (torch.arange(B)[:, None] * width + parent).flatten()
                for layer in cache.layers:
                    layer.follow(own)
            tokens = (code + int(work.offsets[level])).reshape(B * width, 1)
            places = torch.full_like(tokens, T + level)
            hidden = model.model(tokens, past_key_values=cache, position_ids=places, use_cache=True).last_hidden_state
            hidden = hidden.reshape(B, width, -1)
        return work.rows(spelled.numpy()), score.numpy()

    return System(search)


if __name__ == "__main__":
    torch.manual_seed(0)
    threads = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["threads"]
    torch.set_num_interop_threads(threads)
    answer({"hf": plain, "hf-strong": strong}, sys.argv)
