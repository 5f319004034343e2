"""A run's scorer of instances, made quicker: the same chances from kept parts, and from the last of all exits."""

import jax
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.data.instances.layout import Laid
from m6rec_jax.decoding.exits import Exits
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.decoding.quick import chances, exit_scorer, late_scorer, option_table, prompts
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.vocab import SPECIALS, Vocab
from tests.framed import WORDS, instance

VOCAB = Vocab(len(SPECIALS) + WORDS, (40,), options=(2, 3))
TASKS = [{"name": "click", "options": ["no", "yes"]}, {"name": "rate", "options": ["low", "mid", "high"]}]
ITEMS = item_table(np.zeros((40, 4)), np.ones(40, bool))


def scorer_of(**settings):
    blueprint = Blueprint(ModelConfig(layers=3, width=16, heads=2, ffn=32, **settings), VOCAB, 4)
    params = blueprint.init(0)
    if "part" in params:
        params["part"] = jax.random.normal(jax.random.key(1), params["part"].shape)
    return InstanceScorer(blueprint, params, ITEMS, TASKS, length=128)


@pytest.fixture(scope="module")
def laid():
    rng, none = np.random.default_rng(0), np.zeros(0, np.int32)
    found = [instance(rng, int(n)) for n in rng.integers(1, 9, 6)]
    return [Laid(one, np.full(len(one), -1, np.int32), none, none, none) for one in found]


@pytest.mark.parametrize("task", ["click", "rate"])
def test_kept_parts_give_the_chances_of_the_run(laid, task):
    scorer = scorer_of(late=1)
    quick = late_scorer(scorer)
    for _ in range(2):
        found = chances(quick.score(prompts(laid), option_table(scorer, task)))
        np.testing.assert_allclose(found, scorer.option_chances(task, laid), atol=1e-5)
    assert np.ptp(found, axis=0).min() > 1e-3


def test_with_no_exit_it_gives_the_chances_of_the_run(laid):
    scorer = scorer_of(exits=True)
    left = exit_scorer(scorer).score(prompts(laid), option_table(scorer, "rate"), Exits((), ()))
    np.testing.assert_allclose(chances(left.scores), scorer.option_chances("rate", laid), atol=1e-5)


def test_a_task_without_options_is_refused():
    with pytest.raises(InputError, match="task text: no options"):
        option_table(scorer_of(late=1), "text")
