from itertools import chain, combinations

import pytest

from m6rec_jax.errors import InputError
from m6rec_jax.recommend.coldstart import ENGINES, PARTS, TABLE, way

SUBSETS = list(chain.from_iterable(combinations(PARTS, n) for n in range(len(PARTS) + 1)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("known", [True, False])
def test_every_request_has_a_way_of_parts_that_exist_and_ends_with_popularity(engine, known):
    for there in SUBSETS:
        if engine == "model" and "model" not in there:
            with pytest.raises(InputError, match="engine=model"):
                way(known, there, engine)
            continue
        taken = way(known, there, engine)
        assert set(taken.parts) <= {*there, "popularity"} and taken.parts[-1] == "popularity"
        if not known or engine == "popularity":
            assert taken.parts == ("popularity",)
        if engine == "memory":
            assert "model" not in taken.parts


def test_the_table_says_what_the_routes_promise():
    everything = set(PARTS)
    assert way(True, everything).route == "model+memory"
    assert way(True, everything - {"memory"}).route == "model"
    assert way(True, everything - {"model"}).parts == ("memory", "item-knn", "popularity")
    assert way(True, {"popularity", "item-knn"}).route == "item-knn"
    assert way(False, everything).route == "popularity"
    assert TABLE[-1].needs == () and TABLE[-2].needs == ()  # whatever is missing, some line holds
    with pytest.raises(InputError, match="engine=best"):
        way(True, everything, "best")
