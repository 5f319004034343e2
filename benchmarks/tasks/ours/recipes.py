"""What the backbone of each dataset learns before it is asked or tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.tasks.problem import Problem


@dataclass(frozen=True)
class Recipe:
    """What the backbone of a dataset learns: shares of the mixture by task, steps, and settings of its own. `after`: the
    dataset whose backbone it begins with, and whose tokenizer it speaks. `asked`: the task of the card that is asked and
    tuned, where it is not the problem's own."""

    mixture: dict[str, float]
    steps: int
    after: str = ""
    settings: tuple[str, ...] = ()
    asked: str = ""


SCORED = {"past": 0.25, "like": 0.25, "next-item": 0.2, "text-infill": 0.3}
# Few rows and many titles: nothing but counts to learn to read them first, and no history, whose titles are learnt by heart.
COUNTED = {"counts": 0.5, "brief": 0.25, "text-infill": 0.25}
SHORT = ("--data.length=96", "--data.rows=64")  # the newest events, counts in words, the candidate
# What writes, and what tells 36 classes apart, is wider, drops less and learns faster.
WIDE = (
    "--model.width=128",
    "--model.dropout=0.1",
    "--model.embed_dropout=0.1",
    "--optim.learning_rate=0.003",
)
FOUND = {"next": 0.45, "next-item": 0.2, "describe": 0.15, "plausibility": 0.1, "text-causal": 0.1}
RECIPES = {
    "movie": Recipe(COUNTED, 100, "book", (*SHORT, "--optim.learning_rate=0.0005"), "brief"),
    "book": Recipe(COUNTED, 200, "", SHORT, "brief"),
    "ml-100k": Recipe(SCORED, 1000, "", SHORT),
    "kuairec": Recipe({"kind": 0.7, "text-infill": 0.3}, 400, "", (*WIDE, "--model.embed_dropout=0.2", *SHORT)),
    "kuairec-caption": Recipe({"caption": 0.6, "text-causal": 0.3, "next-item": 0.1}, 300, "", WIDE),
    "xrec-amazon": Recipe({"why": 0.8, "text-causal": 0.2}, 400, "", WIDE),
    "xrec-yelp": Recipe({"why": 0.8, "text-causal": 0.2}, 400, "", WIDE),
    "redial": Recipe({"reply": 0.7, "text-causal": 0.2, "next-item": 0.1}, 400, "", WIDE),
    "beauty": Recipe(FOUND, 400, "", ("--model.vectors=128", "--model.id_dropout=0.5")),
}


def recipe_of(problem: Problem) -> Recipe:
    """The recipe of a problem: its own, or that of its dataset."""
    return RECIPES.get(problem.name) or RECIPES[problem.dataset]


def behind(problem: Problem, settings: dict[str, Any]) -> tuple[Recipe, ...]:
    """The recipe of the run that is asked (of another dataset where `settings` name one, `of`), and of those it begins with."""
    made, recipe = [], RECIPES.get(settings.get("of", problem.name)) or RECIPES.get(problem.dataset)
    while recipe is not None:
        made.append(recipe)
        recipe = RECIPES.get(recipe.after)
    return tuple(made)


def asked(problem: Problem) -> str:
    """The task of the dataset's card that is asked and tuned."""
    return recipe_of(problem).asked or problem.template
