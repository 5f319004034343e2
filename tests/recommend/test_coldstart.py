from itertools import chain, combinations
from pathlib import Path

import pytest

from m6rec_jax.errors import InputError
from m6rec_jax.recommend.coldstart import ASKS, ENGINES, GATE, PARTS, TABLE, diagram, table, way

THERE = (*PARTS, GATE)
SUBSETS = list(chain.from_iterable(combinations(THERE, n) for n in range(len(THERE) + 1)))
PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("asks", ASKS)
def test_every_request_has_a_way_of_parts_that_exist_and_ends_with_popularity(engine, asks):
    for there in SUBSETS:
        if engine == "model" and "model" not in there:
            with pytest.raises(InputError, match="engine=model"):
                way(asks, there, engine)
            continue
        taken = way(asks, there, engine)
        assert set(taken.parts) <= {*there, "popularity"} and taken.parts[-1] == "popularity"
        if asks in ("attributes", "nothing") or engine == "popularity":
            assert set(taken.parts) <= {"segment", "popularity"}
        if engine == "memory":
            assert "model" not in taken.parts
        if engine == "model" and asks in ("history", "session"):
            assert taken.parts[0] == "model"


def test_the_table_says_what_the_routes_promise():
    everything = set(THERE)
    assert way("history", everything).route == "model+memory"
    assert way("history", everything - {GATE}).route == way("history", everything - {"memory"}).route == "model"
    assert way("history", everything - {"model"}).parts == ("memory", "item-knn", "popularity")
    assert way("history", {"popularity", "item-knn"}).route == "item-knn"
    assert way("session", everything).parts == ("memory", "item-knn", "segment", "popularity")
    assert way("session", everything - {"memory"}).route == "session-item-knn"
    assert way("attributes", everything).parts == ("segment", "popularity")
    assert way("nothing", everything).parts == ("popularity",)
    with pytest.raises(InputError, match="engine=best"):
        way("history", everything, "best")


def test_the_page_is_drawn_from_the_table():
    """When this fails, put what `python -m m6rec_jax.recommend.coldstart` prints into docs/routing.md."""
    said = PAGE.read_text(encoding="utf-8")
    assert f"\n{table()}\n" in said
    assert said.count("```mermaid") == 1 and f"```mermaid\n{diagram()}\n```" in said


def test_the_diagram_leads_to_every_way_once():
    lines = diagram().splitlines()
    for line in TABLE:
        assert sum(f"<b>{line.route}</b><br/>{', then '.join(line.parts)}" in text for text in lines) == sum(
            (other.route, other.parts) == (line.route, line.parts) for other in TABLE
        )
    arrows = [text.split() for text in lines if " -- " in text]
    named = {text.split("[")[0].split("{")[0].strip() for text in lines if "[" in text or "{" in text}
    assert {words[-1].split("[")[0] for words in arrows if "no" in words} <= named  # no arrow into nothing
