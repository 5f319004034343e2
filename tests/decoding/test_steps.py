"""The steps to an item: their product is its probability, and what stood beside them is what might have been shown."""

import numpy as np
import pytest

from m6rec_jax.decoding import programs
from m6rec_jax.decoding.scoring import level_logps
from tests.decoding.worlds import CATALOGUE, world

ALLOWED = np.arange(CATALOGUE) % 4 != 1
HEAT = np.linspace(0.7, 1.6, 8).astype(np.float32)
OTHERS = 3


@pytest.fixture(params=["all", "filter", "candidates"])
def asked(request, any_world):
    """(the engine's keywords, which items each user may be shown bool [U, C]), with exclusions where there may be some."""
    users, rng = len(any_world.histories), np.random.default_rng(7)
    if request.param == "candidates":
        own = [rng.permutation(CATALOGUE)[:n] for n in (1, 3, 9, 16, 2, 5, 12, 7)]
        return {"candidates": own}, np.stack([np.isin(np.arange(CATALOGUE), rows) for rows in own])
    gone = [rng.integers(CATALOGUE, size=n) for n in (0, 5, 30, 7, 80, 1, 2, 60)]  # some twice, some forbidden anyway
    may = np.tile(ALLOWED if request.param == "filter" else np.ones(CATALOGUE, bool), (users, 1))
    for one, rows in zip(may, gone, strict=True):
        one[rows] = False
    return {"exclude": gone, "allowed": ALLOWED if request.param == "filter" else None}, may


def test_steps_are_what_the_search_summed_and_what_it_passed_by(any_world, asked):
    """Asked of every item that may be shown, the steps of one item are the other choices of its siblings."""
    options, may = asked
    engine, codes = any_world.engine, any_world.engine.codes
    width = int(may.sum(1).max())
    rows = np.full((len(may), width), -1)
    for one, there in zip(rows, may, strict=True):
        one[: there.sum()] = np.flatnonzero(there)
    steps = engine.steps(any_world.histories, rows, temperature=HEAT, others=OTHERS, **options)
    for u, history in enumerate(any_world.histories):
        n, L = int(may[u].sum()), codes.shape[1]
        items = rows[u, :n]
        said = steps.logp[u, :n]
        assert said.sum(1) == pytest.approx(any_world.logp(history, float(HEAT[u]))[items], abs=1e-4)
        assert np.array_equal(steps.codes[u, :n], codes[items])
        assert (steps.codes[u, n:] == -1).all() and (steps.place[u, n:] == 0).all() and (steps.other_rows[u, n:] == -1).all()  # fmt: skip
        for i, level in np.ndindex(n, L):
            beside = (codes[items, :level] == codes[items[i], :level]).all(1)
            known = {int(code): float(x) for code, x in zip(codes[items, level][beside], said[beside, level], strict=True)}  # fmt: skip
            mine = known.pop(int(codes[items[i], level]))
            assert steps.choices[u, i, level] == len(known) + 1
            ahead = sum(x > mine + 1e-6 for x in known.values())
            assert ahead < steps.place[u, i, level] <= 1 + sum(x > mine - 1e-6 for x in known.values())
            found = {int(c): float(x) for c, x in zip(steps.other_codes[u, i, level], steps.other_logp[u, i, level], strict=True) if c >= 0}  # fmt: skip
            best = sorted(known.values(), reverse=True)[:OTHERS]
            assert list(found.values()) == pytest.approx(best, abs=1e-5)
            assert all(known[code] == pytest.approx(x, abs=1e-5) for code, x in found.items())
            spelled = steps.other_rows[u, i, level][: len(found)]
            if level == L - 1:
                assert all(codes[row].tolist() == [*codes[items[i], :level], code] for row, code in zip(spelled, found, strict=True))  # fmt: skip
                assert may[u][spelled].all()
            else:
                assert (spelled == -1).all()


def test_the_steps_of_a_list_multiply_to_the_model_part_of_its_scores(any_world):
    engine, histories = any_world.engine, any_world.histories
    mass = np.full((len(histories), 2), 0.5), np.full(len(histories), 0.3, np.float32)
    shared = {"temperature": HEAT, "exclude": histories, "allowed": ALLOWED}
    lists = engine.recommend(histories, k=5, memory=(np.tile([2, 50], (8, 1)), mass[0]), gate=mass[1], **shared)
    steps = engine.steps(histories, lists.rows, **shared)
    assert (lists.rows >= 0).all()
    assert steps.logp.sum(2) == pytest.approx(lists.model_logp, abs=1e-4)
    assert np.exp(steps.logp).prod(2) == pytest.approx(np.exp(lists.model_logp), rel=1e-4)
    alone = [engine.steps([h], lists.rows[u : u + 1], temperature=HEAT[u], exclude=[h], allowed=ALLOWED) for u, h in enumerate(histories)]  # fmt: skip
    for name in ("logp", "other_logp"):
        assert np.concatenate([getattr(one, name) for one in alone]) == pytest.approx(
            getattr(steps, name), abs=1e-4, rel=1e-5
        )
    assert np.array_equal(np.concatenate([one.place for one in alone]), steps.place)


def test_a_place_is_one_more_than_the_codes_that_are_likelier(any_world):
    engine, histories = any_world.engine, any_world.histories
    rng = np.random.default_rng(7)
    for u, history in enumerate(histories):
        rows = rng.permutation(CATALOGUE)[None, :9]
        steps = engine.steps([history], rows, temperature=HEAT[u], candidates=rows, others=9)
        assert (steps.place >= 1).all() and (steps.place <= steps.choices).all()
        likelier = (steps.other_logp > steps.logp[..., None] + 1e-6).sum(-1)
        as_likely = (steps.other_logp > steps.logp[..., None] - 1e-6).sum(-1)
        assert (likelier < steps.place).all() and (steps.place <= 1 + as_likely).all()


def test_a_place_does_not_hang_on_the_last_bit_of_a_number_that_is_computed_twice(any_world, monkeypatch):
    engine, rows = any_world.engine, np.arange(9)[None]
    ask = lambda others: engine.steps([any_world.histories[0]], rows, others=others).place  # noqa: E731
    exact, expected = level_logps, ask(6)

    def shaken(*asked):
        for every, said in exact(*asked):
            yield every, said - 1e-6

    monkeypatch.setattr("m6rec_jax.decoding.steps.level_logps", shaken)
    assert np.array_equal(ask(7), expected)  # 7: a program of its own, traced with what is shaken


def test_log_probabilities_of_given_rows_are_those_of_a_full_forward(any_world):
    engine, histories = any_world.engine, any_world.histories
    rng = np.random.default_rng(3)
    rows = [rng.permutation(CATALOGUE)[:n] for n in (4, 0, 16, 17, 1, 2, 90, 5)]
    found = engine.logp(histories, rows, temperature=HEAT)
    for history, some, heat, logp in zip(histories, rows, HEAT, found, strict=True):
        assert logp == pytest.approx(any_world.logp(history, float(heat))[some], abs=1e-4)


def test_very_many_rows_are_read_in_lots_and_the_answer_stays(any_world, monkeypatch):
    engine, histories = any_world.engine, any_world.histories[:3]
    rng, heat = np.random.default_rng(5), HEAT[:3]
    rows = [rng.permutation(CATALOGUE)[:n] for n in (60, 3, 0)]
    table = np.full((3, 60), -1)
    for one, some in zip(table, rows, strict=True):
        one[: len(some)] = some
    memory, gate = (np.tile([2, 50], (3, 1)), np.full((3, 2), 0.5)), np.full(3, 0.3, np.float32)

    def ask():
        return (
            engine.rank(histories, rows, temperature=heat, memory=memory, gate=gate),
            engine.steps(histories, table, temperature=heat, exclude=histories, others=OTHERS),
            engine.steps(histories, table, temperature=heat, candidates=rows, others=OTHERS),
        )

    whole, lots = ask(), []
    for name in ("rank", "walk"):
        program = getattr(programs, name)
        monkeypatch.setattr(programs, name, lambda *args, p=program, at=1 if name == "rank" else 2: lots.append(args[at]) or p(*args))  # fmt: skip
    monkeypatch.setattr("m6rec_jax.decoding.given.BATCH_TOKENS", 9)  # four rows of three levels
    monkeypatch.setattr("m6rec_jax.decoding.given.BATCH_CHILDREN", 16 * CATALOGUE if engine.codes.shape[1] == 1 else 1 << 20)  # fmt: skip
    for name, one, other in zip(("rank", "exclude", "candidates"), whole, ask(), strict=True):
        for part in one.__dataclass_fields__:
            a, b = getattr(one, part), getattr(other, part)
            same = np.array_equal(a, b) if a.dtype.kind in "iub" else a == pytest.approx(b, abs=1e-4, rel=1e-5)
            assert same, (name, part)
    if engine.codes.shape[1] == 1:  # where one row of logits serves all, they are read at once; steps are not
        assert lots[:2] == [16, 64] and set(lots[2:]) == {16}
    else:
        assert set(lots) == {4}


def test_memory_does_not_grow_with_the_rows_asked_for(monkeypatch):
    """Temporary bytes of the compiled programs, for 64 rows and for 16 times as many."""
    w = world(3, layers=1)
    engine, history = w.engine, [w.histories[5]]
    monkeypatch.setattr("m6rec_jax.decoding.given.BATCH_TOKENS", 32)
    for name, ask in (("rank", lambda rows: engine.logp(history, [rows])), ("walk", lambda rows: engine.steps(history, rows[None]))):  # fmt: skip
        program, calls = getattr(programs, name), []
        monkeypatch.setattr(programs, name, lambda *args, p=program, calls=calls: calls.append(args) or p(*args))
        for count in (64, 1024):
            ask(np.arange(count) % CATALOGUE)
        few, many = (program.lower(*args).compile().memory_analysis().temp_size_in_bytes for args in calls)
        static = 1 if name == "rank" else 2
        lots = [args[static] for args in calls]
        assert lots == [16, 16] and many < 1.5 * few, (name, few, many)
        whole = (*calls[1][:static], 1024, *calls[1][static + 1 :])
        assert program.lower(*whole).compile().memory_analysis().temp_size_in_bytes > 6 * many


def test_rows_that_are_none_are_refused(any_world):
    with pytest.raises(ValueError, match="outside the catalogue of 90"):
        any_world.engine.steps([np.array([1])], np.array([[90]]))
    with pytest.raises(ValueError, match="1 histories, 2 lists"):
        any_world.engine.logp([np.array([1])], [np.array([1])] * 2)
