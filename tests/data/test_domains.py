"""Several datasets as one: ids that do not meet, every entry used, shares as weighed, refusals by name."""

from dataclasses import replace

import numpy as np
import pytest

from m6rec_jax.config import DataConfig, MixtureConfig
from m6rec_jax.config.data import DEFAULT_MIXTURE
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.domains import joint_pools, joint_records, joint_shares, joint_vocab, labels, open_domains
from m6rec_jax.data.examples import Shift
from m6rec_jax.data.loader import build_row
from m6rec_jax.data.plan import Plan
from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError
from m6rec_jax.vocab import Vocab
from tests.domains import films  # noqa: F401
from tests.fixtures import tiny_card, tiny_tables

CONFIG, MIXTURE = DataConfig(length=64, rows=8, block=512), MixtureConfig(dict(DEFAULT_MIXTURE))


def plan_of(paths, weights=()):
    domains = open_domains(paths, weights)
    pools = joint_pools(domains, MIXTURE, "train", CONFIG)
    return domains, Plan(pools, joint_shares(domains, MIXTURE, pools), CONFIG, 0), joint_records(domains, "train")


def test_the_joint_id_space_is_text_then_each_domains_levels():
    one, other = Vocab(500, (300,)), Vocab(500, (8, 8, 8))
    both = one.joined(other)
    assert [s.name for s in both.slices] == ["text", "level1", "domain2_level1", "domain2_level2", "domain2_level3"]
    assert both.slices[:2] == one.slices and [s.atomic for s in both.slices] == [False, True, False, False, False]
    shift = one.size - one.text.end
    assert [s.offset for s in both.slices[2:]] == [s.offset + shift for s in other.levels]
    assert (both.domain(0), both.domain(1), both.levels) == (one, other, one.levels)
    assert Vocab.from_dict(both.as_dict()) == both and "others" not in one.as_dict()


@pytest.mark.parametrize("order", [1, -1])
def test_rows_of_one_domain_are_its_own_rows_moved_up(tiny_dataset, films, order):  # noqa: F811
    """A joint row, brought back by its domain's offsets, is the row that the dataset makes alone."""
    paths = [tiny_dataset, films][::order]
    domains, plan, records = plan_of(paths)
    vocab, text = joint_vocab(domains), domains[0].dataset.vocab.text.end
    begins = [text, next(s.offset for s in vocab.slices if s.domain == 1)]
    assert begins[1] == text + (128 if order == 1 else 3 * 128)  # one level, or three, lie before
    met = [set(), set()]
    for number in range(200):
        place = plan.entries(0).take(np.array([number]))
        pool = plan.pools[int(place.task[0])]
        d, own = pool.domain, domains[pool.domain].dataset
        row = build_row(plan, records, place, plan.pools)
        here = replace(place, record=place.record - domains[d].records["train"])
        alone = build_row(plan, own.records("train"), here, [replace(p, shift=Shift()) for p in plan.pools])
        for name in ("tokens", "targets"):
            back = np.where(row[name] >= begins[d], row[name] - begins[d] + text, row[name])
            assert (back == alone[name]).all() and not ((row[name] >= text) & (row[name] < begins[d])).any()
        # Rows of the second domain lie behind those of the first, spare ones included: 128 hold either catalogue.
        assert (np.where(row["item_rows"] >= 0, row["item_rows"] - 128 * d, -1) == alone["item_rows"]).all()
        met[d] |= set(vocab.slice_index(row["tokens"]).tolist())
    of = [{i for i, s in enumerate(vocab.slices) if i == 0 or s.domain == d} for d in (0, 1)]
    assert met == of


def test_every_record_of_both_domains_is_drawn_for_every_task(tiny_dataset, films):  # noqa: F811
    domains, plan, records = plan_of([tiny_dataset, films])
    blocks, used, number = 60, [], 0
    drawn = [plan.entries(b) for b in range(blocks)]
    for t, pool in enumerate(plan.pools):
        mine = {pair for e in drawn for pair in zip(e.record[e.task == t], e.start[e.task == t], strict=True)}
        assert mine == set(zip(pool.records, pool.starts, strict=True)), pool.task.name
        kept = records.take(pool.records[:3])
        first = domains[pool.domain].records["train"]
        alone = domains[pool.domain].dataset.records("train").take(pool.records[:3] - first)
        assert [(r.kind, r.row, r.items.tolist()) for r in kept] == [(r.kind, r.row, r.items.tolist()) for r in alone]
    while len(used) < 2 * CONFIG.block:
        used += plan.row(number).number.tolist()
        number += 1
    assert sorted(used[: 2 * CONFIG.block]) == list(range(2 * CONFIG.block))


@pytest.mark.parametrize("weights", [(), (1.0, 0.25)])
def test_a_weight_is_the_share_of_the_target_tokens(tiny_dataset, films, weights):  # noqa: F811
    domains, plan, records = plan_of([tiny_dataset, films], weights)
    targets = np.zeros(len(plan.pools))
    for number in range(500):
        row = build_row(plan, records, plan.row(number), plan.pools)
        np.add.at(targets, row["task_ids"], row["loss_weights"] > 0)
    of_domain = np.array([targets[[p.domain == d for p in plan.pools]].sum() for d in (0, 1)])
    wanted = np.array(weights or (1.0, 1.0))
    np.testing.assert_allclose(of_domain / of_domain.sum(), wanted / wanted.sum(), atol=0.03)
    next_item = [i for i, some in enumerate(labels(domains, plan.pools)) if "next-item" in some]
    assert [labels(domains, plan.pools)[i][1] for i in next_item] == ["next-item@tiny", "next-item@films"]


def test_what_cannot_be_trained_together_is_refused_by_name(tiny_dataset, films, tiny_levels, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="named 'tiny' like .*plain; prepare it again with another `name:`"):
        open_domains([tiny_dataset, tiny_levels])
    tables = tiny_tables(seed=5)
    tables["items"] = tables["items"][:30]
    tables["events"] = tables["events"].filter(tables["events"]["i"].is_in(tables["items"]["id"].implode()))
    other = prepare(tiny_card(tables, name="other"), tmp_path / "other", vocab_size=480)
    with pytest.raises(InputError, match=f"{other.path}: another tokenizer than {tiny_dataset}'s.*m6rec prepare --like {tiny_dataset}"):  # fmt: skip
        open_domains([tiny_dataset, other.path])
    with pytest.raises(InputError, match="=0: a weight is above 0"):
        open_domains([tiny_dataset, films], [1, 0])
    with pytest.raises(InputError, match="weights: 1 given for 2 datasets"):
        open_domains([tiny_dataset, films], [1])


def test_like_may_lend_the_tokenizer_alone(tiny, films, tmp_path):  # noqa: F811
    data = open_dataset(films)
    assert data.tokenizer.model == tiny.tokenizer.model and (data.levels, data.content.shape[1]) == (3, 24)
    assert data.catalogue == 40 and tiny.levels == 1
    with pytest.raises(InputError, match="--borrow tokenizer: .*--like"):
        prepare(tiny_card(), tmp_path / "out", borrow="tokenizer")
    with pytest.raises(InputError, match="--borrow codes: choose one of everything, tokenizer"):
        prepare(tiny_card(), tmp_path / "out", like=tiny.path, borrow="codes")
    with pytest.raises(InputError, match="--vocab-size 9999"):
        prepare(tiny_card(), tmp_path / "out", like=tiny.path, borrow="tokenizer", vocab_size=9999)
