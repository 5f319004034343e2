"""Which figure chooses the best checkpoint, and which way it is better."""

import pytest

from m6rec_jax.artifacts.best import best_of, better, check_measured, gain, smaller_is_better
from m6rec_jax.errors import InputError

FALL = ("loss/next-item", "loss/next-item@films", "log_loss/click", "log_loss/click@films", "ece/click")
RISE = (
    "ndcg@10",
    "ndcg@10@films",
    "recall@10/search",
    "auc/loss",
    "accuracy/topic",
    "macro_f1/topic",
    "log_likelihood/x",
)


def test_the_measure_alone_decides_the_direction_whatever_task_and_domain_are_called():
    assert all(map(smaller_is_better, FALL)) and not any(map(smaller_is_better, RISE))


@pytest.mark.parametrize(("name", "at", "sign"), [("loss/a", 1, -1), ("ndcg@10", 0, 1)])
def test_the_first_of_the_best_is_kept_and_only_a_better_one_takes_its_place(name, at, sign):
    assert best_of(name, [0.9, 0.2, 0.2, 0.9]) == at and gain(name, 0.5) == sign * 0.5
    assert better(name, 0.3, None) and not better(name, None, 0.3) and not better(name, None, None)
    assert better(name, 0.4, 0.3) is (sign > 0) and better(name, 0.2, 0.3) is (sign < 0)
    assert not better(name, 0.3, 0.3)
    assert better(name, -5.0, None)  # a figure below any number that could stand for none


def test_an_unknown_figure_is_one_line_with_the_known_ones():
    measured = {"loss/a": 1.0, "unigram/a": 2.0, "auc/click": 0.5}
    for name in ("auc/clik", "unigram/a", "loss"):
        with pytest.raises(InputError, match=rf"^train.best={name}: validation .* name one of auc/click, loss/a$"):
            check_measured(name, measured)
    check_measured("auc/click", measured)
    check_measured("ndcg@10", measured)  # nobody set it, and there may be no validation user
