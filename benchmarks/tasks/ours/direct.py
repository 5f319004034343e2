"""A run that answers by itself, as it was trained: chances, likelihoods, vectors, texts; nothing is tuned."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.tasks.measures import grounded
from benchmarks.tasks.nearest import TEMPLATES, K, filled
from benchmarks.tasks.ours.backbone import backbone
from benchmarks.tasks.ours.recipes import asked
from benchmarks.tasks.problem import SPLITS, Problem
from benchmarks.tasks.problems import read_problem
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.data.instances import read_instances
from m6rec_jax.data.instances.layout import Laid, encode_instance
from m6rec_jax.data.rendering import render
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.decoding.nearest import nearest
from m6rec_jax.progress import note
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.vocab import EOS

MOST = 64  # tokens of a text


def chances(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
    """The chance of each option, `[n, C]`."""
    data, run = backbone(problem, options, seed)
    scorer = InstanceScorer.load(run, "latest")
    return {split: scorer.chances(read_instances(data, asked(problem), split)) for split in SPLITS[1:]}


def retrieved(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
    """Rows of the K items of the whole catalogue whose vectors are nearest to the query's, history left out: `[n, K]`."""
    data, run = backbone(problem, options, seed)
    scorer = InstanceScorer.load(run, "latest")
    assert problem.catalogue is not None
    row_of = {one: i for i, one in enumerate(problem.catalogue["item_id"].to_list())}
    vectors = scorer.item_vectors(_catalogue(problem, data, scorer.length))
    made = {}
    for split in SPLITS[1:]:
        own = [
            np.array([row_of[event["item"]] for event in events]) for events in problem.part(split)["history"].to_list()
        ]
        asked = read_instances(data, problem.template, split)
        made[split] = nearest(scorer.queries(asked.laid_out(scorer.length)), vectors, K, own)[0]
    return made


def _catalogue(problem: Problem, data: Dataset, room: int) -> list[Laid]:
    """Every item of the catalogue as the target of a query that says nothing else."""
    assert problem.catalogue is not None
    row_of = {one: i for i, one in enumerate(data.items["item_id"].to_list())}
    made = []
    for item in problem.catalogue.iter_rows(named=True):
        fields = {"history": [], "item": item["title"], "id": row_of[item["item_id"]], "categories": item["categories"]}
        one = render(problem.wording, fields)
        made.append(encode_instance(one, data.tokenizer, data.vocab, data.codes, "retrieval", room))
    return made


def written(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, list[str]]:
    """Texts as `generate` gives them: of several drafts the likeliest that names nothing which its source does not;
    where none holds, the filled template."""
    data, run = backbone(problem, options, seed)
    engine, scorer = Recommender.load(run, "latest", data).engine, InstanceScorer.load(run, "latest")
    form = next(iter(TEMPLATES[problem.task]))
    plain = filled(problem, {"form": form}, seed, options)
    made = {}
    for split in SPLITS[1:]:
        laid = read_instances(data, problem.template, split).laid_out(scorer.length - MOST)
        sources = problem.texts(split)
        texts, scores = list(plain[split]), np.full(len(laid), -np.inf)
        own = np.zeros(len(laid), bool)
        for draft in range(settings["drafts"]):
            found = engine.write(
                [one.source for one in laid], item_rows=[one.source_rows for one in laid], most=MOST,
                temperature=settings["temperature"], top_p=0.95, seeds=[draft + 1000 * i for i in range(len(laid))],
            )  # fmt: skip
            tokens = [np.array([*one.tokens, EOS], np.int32) for one in found]
            told = [replace(one, target=t, target_rows=np.full(len(t), -1, np.int32)) for one, t in zip(laid, tokens, strict=True)]  # fmt: skip
            likely = scorer.likelihood(told)[0]
            for i, one in enumerate(found):
                text = one.text.strip()
                if text and one.finish == "end" and likely[i] > scores[i] and grounded(text, sources[i]):
                    texts[i], scores[i], own[i] = text, likely[i], True
        note(f"{problem.name} {split}: {own.mean():.0%} of the texts are the model's own")
        made[split] = texts
    return made


def plausible(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, np.ndarray]:
    """The mean log-likelihood of each second statement after the first, by the run of another dataset: `[n]`."""
    lender = read_problem(settings["of"], options)
    assert lender is not None
    data, run = backbone(lender, options, seed)
    scorer = InstanceScorer.load(run, "latest")
    laid = [
        encode_instance(
            render(problem.wording, row), data.tokenizer, data.vocab, data.codes, "plausibility", scorer.length
        )
        for row in problem.part("test").iter_rows(named=True)
    ]
    return {"test": scorer.likelihood(laid)[0]}


ANSWERS = {
    "scoring": chances, "classify": chances, "retrieval": retrieved, "plausibility": plausible,
    "explanation": written, "chat": written, "caption": written,
}  # fmt: skip


def answers(problem: Problem, settings: dict[str, Any], seed: int, options: Namespace) -> dict[str, Any]:
    """What the run of a problem says, by its task."""
    return ANSWERS[problem.task](problem, settings, seed, options)


def settings(problem: Problem) -> tuple[dict[str, Any], ...]:
    """Of texts how many drafts and how bold; of the rest nothing is chosen."""
    if ANSWERS[problem.task] is written:
        return tuple({"drafts": n, "temperature": t} for n, t in ((4, 0.5), (1, 0.0), (4, 0.8), (8, 0.5)))
    return ({"of": "beauty"},) if problem.task == "plausibility" else ({},)
