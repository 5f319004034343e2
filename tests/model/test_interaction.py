"""Late interaction: which parts an example is cut into, and that they meet in the last layers alone, shown by gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.data.packing import pack_row
from m6rec_jax.errors import InputError
from m6rec_jax.model.interaction import MOST_PARTS, cut, part_numbers, part_starts
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.vocab import BOS, END_SOURCE, END_TARGET, SEP, SOURCE, SPECIALS, TARGET, Vocab
from tests.framed import WORDS, framed, instance, sequence, words

CONFIG = ModelConfig(layers=3, width=16, heads=2, ffn=32, late=1)
VOCAB = Vocab(len(SPECIALS) + WORDS, (40,))
ITEMS = item_table(np.zeros((40, 4)), np.ones(40, bool))
LENGTH = 96


def view(row):
    return View(*(jnp.asarray(row[name])[None] for name in ("positions", "k_start", "k_end")))


def parts_of(row):
    return [np.asarray(x)[0] for x in cut(jnp.asarray(row["tokens"])[None], *view(row))]


@pytest.fixture(scope="module")
def params():
    made = Blueprint(CONFIG, VOCAB, 4).init(0)
    made["part"] = jax.random.normal(jax.random.key(1), made["part"].shape)
    return made


def hidden(config, params, row):
    return (
        Blueprint(config, VOCAB, 4)
        .bind(params)
        .hidden(row["tokens"][None], row["item_rows"][None], view(row), ITEMS)[0]
    )


def test_parts_are_counted_from_the_request_and_positions_begin_anew():
    a, b, ask = [200, 201], [202, 203, 204], [205, 206]
    tokens = framed([a, b], ask)
    assert tokens.tolist() == [BOS, SOURCE, *a, SEP, *b, END_SOURCE, TARGET, *ask, END_TARGET]
    positions, start, end, number = parts_of(pack_row([(sequence(tokens), 0)], 16))
    assert number[:13].tolist() == [3] * 4 + [2] * 4 + [1] + [0] * 4
    assert positions[:13].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 1, 2, 3]
    assert start[:13].tolist() == [0] * 4 + [4] * 4 + [8] + [9] * 4
    assert end[:13].tolist() == [4] * 4 + [8] * 4 + [9] + [10, 11, 12, 13]  # the request reads left to right
    assert (end[13:] <= start[13:]).all()  # padding sees nothing


def test_the_host_cuts_as_the_device_does():
    rng = np.random.default_rng(3)
    examples = [instance(rng, parts) for parts in (3, 1, 6, 2)]
    _, start, _, number = parts_of(pack_row([(sequence(one), 0) for one in examples], LENGTH))
    at = 0
    for one in examples:
        here = slice(at, at + len(one))
        starts = part_starts(one)
        assert np.unique(start[here] - at).tolist() == starts.tolist()
        assert number[here].tolist() == part_numbers(np.diff([*starts, len(one)])).tolist()
        at += len(one)
    many = part_starts(framed([[SPECIALS["<pad>"] + 200]] * (MOST_PARTS + 5), [200]))
    assert part_numbers(np.diff([*many, many[-1] + 3])).max() == MOST_PARTS - 1


def test_only_framed_bidirectional_examples_are_cut():
    rng = np.random.default_rng(4)
    one = instance(rng, 3)
    text = np.array([*words(rng, 4), SEP, *words(rng, 4)], np.int32)  # an item's text: no frame
    left_to_right = sequence(one, order=np.arange(len(one), dtype=np.int32))
    row = pack_row([(left_to_right, 0), (sequence(text, order=text * 0), 0), (sequence(one), 0)], LENGTH)
    positions, start, end, number = parts_of(row)
    for name, found in (("positions", positions), ("k_start", start), ("k_end", end)):
        whole = len(one) + len(text)
        assert found[:whole].tolist() == row[name][:whole].tolist()
        assert found[whole : whole + len(one)].tolist() != row[name][whole : whole + len(one)].tolist()
    assert (number[: len(one) + len(text)] == 0).all()


def test_parts_meet_in_the_last_layers_and_nowhere_else(params):
    """Gradients of every token's state with respect to every token's input, with one joined layer and with none reached."""
    rng = np.random.default_rng(5)
    row = pack_row([(sequence(instance(rng, 3)), 0), (sequence(instance(rng, 2)), 0)], LENGTH)
    real = row["segment_ids"] > 0
    visible = (row["segment_ids"][:, None] == row["segment_ids"]) & (row["order"] <= row["order"][:, None])
    starts = parts_of(row)[1]
    x = jax.random.normal(jax.random.key(2), (1, LENGTH, 16))

    def seen(every):
        def states(x):
            model = Blueprint(CONFIG, VOCAB, 4).bind(params)
            model.embeddings.read = lambda *_: x
            found, _ = model.routed(row["tokens"][None], row["item_rows"][None], view(row), ITEMS, every=True)
            return found[every, 0].sum(-1)

        return np.abs(np.asarray(jax.jacrev(states)(x))[:, 0]).sum(-1) > 0

    assert (seen(2)[real] == visible[real]).all()
    assert (seen(1)[real] == (visible & (starts[:, None] == starts))[real]).all()


def test_with_every_layer_joined_it_is_the_plain_model(params):
    row = pack_row([(sequence(instance(np.random.default_rng(6), 4)), 0)], LENGTH)
    bare = {**params, "part": params["part"] * 0}
    plain = {name: value for name, value in params.items() if name != "part"}
    joined = hidden(replace(CONFIG, late=3), bare, row)
    np.testing.assert_allclose(joined, hidden(replace(CONFIG, late=0), plain, row), atol=1e-6)
    assert np.abs(joined - hidden(CONFIG, bare, row)).max() > 1e-3  # and with fewer it is another
    assert np.abs(joined - hidden(replace(CONFIG, late=3), params, row)).max() > 1e-3  # told apart by their embeddings


def test_rows_of_other_tasks_go_through_all_layers_as_ever(params):
    rng = np.random.default_rng(7)
    tokens = np.array([BOS, *words(rng, 20)], np.int32)
    row = pack_row([(sequence(tokens, order=np.arange(21, dtype=np.int32)), 0)], LENGTH)
    bare = {**params, "part": params["part"] * 0}
    plain = {name: value for name, value in params.items() if name != "part"}
    np.testing.assert_allclose(
        hidden(CONFIG, bare, row)[:21], hidden(replace(CONFIG, late=0), plain, row)[:21], atol=1e-6
    )


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match="late=4 is more than model.layers=3"):
        replace(CONFIG, late=4)
    with pytest.raises(InputError, match=r"late=1 and model.exits=true"):
        replace(CONFIG, exits=True)
