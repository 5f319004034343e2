"""Content vectors and field ids: fitted once, applicable to items that came later, on disk without pickle."""

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp

from m6rec_jax.data.features import (
    UNKNOWN,
    Encoder,
    Fields,
    TfidfEncoder,
    fit_encoder,
    fit_fields,
    item_texts,
    pack_strings,
    unpack_strings,
)
from m6rec_jax.data.spectral import right_vectors
from tests.fixtures import tiny_tables


def canonical(titles, categories=None, prices=None, text=None) -> pl.DataFrame:
    n = len(titles)
    return pl.DataFrame(
        {
            "item_id": [str(i) for i in range(n)],
            "title": titles,
            "text": text or [""] * n,
            "categories": categories or [[] for _ in range(n)],
            "attributes": [[] for _ in range(n)],
            "num_price": prices or [None] * n,
        },
        schema_overrides={"categories": pl.List(pl.String), "attributes": pl.List(pl.String), "num_price": pl.Float64},
    )


TITLES = tiny_tables()["items"]["title"].to_list()


def test_similar_texts_have_similar_vectors_in_any_script():
    encoder: Encoder
    encoder, vectors = fit_encoder(TITLES)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    new = encoder.encode(["小米手机 壳", "a lipstick, blue"])
    for vector, word in zip(new, ("小米手机", "blue lipstick"), strict=True):
        near = np.argsort(-(vectors @ vector))[:5]
        assert all(word in TITLES[i] for i in near)


def test_a_text_is_encoded_alike_alone_and_among_others(tmp_path):
    encoder, together = fit_encoder(TITLES)
    np.savez(tmp_path / "encoder.npz", **encoder.arrays())
    with np.load(tmp_path / "encoder.npz", allow_pickle=False) as data:
        again = TfidfEncoder.from_arrays(data)
    np.testing.assert_allclose(np.vstack([again.encode([t]) for t in TITLES]), together, atol=1e-6)


def test_the_same_texts_give_the_same_bits():
    (a, x), (b, y) = fit_encoder(TITLES), fit_encoder(list(TITLES))
    assert a.terms == b.terms and a.components.tobytes() == b.components.tobytes() and x.tobytes() == y.tobytes()


def test_a_short_field_counts_as_one_term_beside_its_words():
    encoder, _ = fit_encoder(["x\nskin care", "y\nskin care", "z\ncare skin", "skin care"])
    assert "=skin care" in encoder.terms and "=care skin" in encoder.terms
    assert not any(t.startswith("=x") for t in encoder.terms)


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["a"], ["?!"], ["a", ""]])
def test_next_to_nothing_can_be_fitted(texts):
    encoder, _ = fit_encoder(texts)
    made = encoder.encode([*texts, "never seen", ""])
    assert made.shape[0] == len(texts) + 2 and made.shape[1] >= 1
    assert np.isfinite(made).all() and not made[-2:].any()


def test_leading_directions_explain_what_an_exact_decomposition_does():
    rng = np.random.default_rng(0)
    dense = (rng.random((300, 120)) < 0.1) * rng.random((300, 120)) @ np.diag(1 / np.arange(1, 121) ** 0.5)
    found = right_vectors(sp.csr_array(dense, dtype=np.float32), 16)
    np.testing.assert_allclose(found.T @ found, np.eye(16), atol=1e-4)
    exact = np.linalg.svd(dense, compute_uv=False)[:16]
    assert np.linalg.norm(dense @ found) ** 2 > 0.995 * (exact**2).sum()


def test_ids_and_buckets_of_known_and_unknown_values():
    items = canonical(list("abcdef"), [["x"], ["y", "x"], [], ["z"], ["x"], ["y"]], [1.0, 2.0, 3.0, 4.0, 5.0, None])
    fields = fit_fields(items)
    made = Fields.from_arrays(fields.arrays()).apply(items)
    assert made["category_ids"].to_list() == [[1], [2, 1], [], [3], [1], [2]]
    assert made["bucket_price"].to_list() == [0, 1, 2, 3, 4, None]
    assert made["numbers"].to_list()[0] == ["price very low, lowest 20 percent"]
    assert made["numbers"].to_list()[4:] == [["price very high, top 20 percent"], []]
    new = fields.apply(canonical(["n", "m"], [["x", "new"], []], [1e9, float("nan")]))
    assert new["category_ids"].to_list() == [[1, UNKNOWN], []]
    assert new["bucket_price"].to_list() == [4, None]


def test_item_texts_keep_the_title_on_a_line_of_its_own():
    items = canonical(["one\ntwo", ""], [["c", "d"], []], [5.0, None], ["", "about"])
    items = fit_fields(items).apply(items)
    assert item_texts(items) == ["one two\nc\nd\nprice very low, lowest 20 percent", "\nabout"]


def test_strings_survive_packing():
    for strings in ([], ["a"], ["小米", "", "b c"]):
        assert unpack_strings(pack_strings(strings)) == strings
