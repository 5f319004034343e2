"""Instances dealt over devices of a process: the answers of one."""

import jax
import numpy as np

from m6rec_jax.data.instances.layout import Laid
from m6rec_jax.decoding.instances import InstanceScorer
from tests.multidevice.test_retrieval import BLUEPRINT
from tests.objectives.test_scoring import ITEMS, prompt

TASKS = [{"name": name, "options": options} for name, options in (("click", ["no", "yes"]), ("topic", list("abcde")))]


def test_two_devices_answer_as_one():
    rng = np.random.default_rng(0)
    text = lambda n: rng.integers(140, 170, n).astype(np.int32)  # noqa: E731
    none = lambda x: np.full(len(x), -1, np.int32)  # noqa: E731
    laid = []
    for n in (3, 80, 5, 40, 7):
        source, target = prompt(text(n), text(4)), text(n % 6 + 1)
        laid.append(Laid(source, none(source), target, none(target), np.zeros((0, 2), np.int32)))
    params = BLUEPRINT.init(0)
    one, two = (InstanceScorer(BLUEPRINT, params, ITEMS, TASKS, devices=some) for some in (None, jax.devices()[:2]))
    for answer in (
        lambda scorer: scorer.option_chances("topic", laid),
        lambda scorer: scorer.likelihood(laid)[0],
        lambda scorer: scorer.queries(laid),
        lambda scorer: scorer.item_vectors(laid),
    ):
        np.testing.assert_allclose(answer(two), answer(one), rtol=1e-4, atol=1e-5)
