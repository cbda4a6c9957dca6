"""DenseFT: one basis, so that colours compare; deterministic; robust against outliers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imatch.core.types import ImatchError, Tokens, grid_xy, normalise
from imatch.data.embeddings import Embeddings
from imatch.data.shards import Shards
from imatch.data.store import Stored
from imatch.features import denseft
from imatch.viz import figures

SIZE = (64, 96)
RED, BLUE = np.eye(8)[:2]


def stored(folder: Path, fields: list[np.ndarray], grid: bool = True, first: int = 0) -> Embeddings:
    """A store of one photograph a field of (h, w, d) tokens."""
    rows, tokens = [], []
    for i, values in enumerate(fields):
        h, w, d = values.shape
        rows.append({"id": f"{first + i:03d}.png", "size": SIZE, "sha256": f"{i:064x}", "position": None})
        xy = grid_xy((h, w), SIZE)
        vector = np.eye(d, dtype=np.float32)[0]
        tokens.append(Tokens(vector, values.reshape(-1, d).astype(np.float16), xy, (h, w) if grid else None))
    Shards(folder).write(0, rows, tokens)
    Shards(folder).merge()
    return Stored(folder)


def noisy(seed: int, h: int = 4, w: int = 6, d: int = 8) -> np.ndarray:
    """Three kinds of tokens in bands, with a little noise."""
    random = np.random.default_rng(seed)
    kinds = np.eye(d)[np.arange(h * w) * 3 // (h * w)].reshape(h, w, d)
    return kinds * random.uniform(1, 5, (h, w, 1)) + random.normal(0, 0.01, (h, w, d))


def test_equal_tokens_have_equal_colours_in_all_photographs(tmp_path):
    left = np.where(np.arange(6)[None, :, None] < 3, RED, BLUE) * np.ones((4, 1, 1))
    embeddings = stored(tmp_path, [left, left[:, ::-1], left[:2, 1:5]])
    basis = denseft.fit_embeddings(embeddings)
    red, blue = basis(embeddings.tokens(0))[0, [0, -1]]
    assert np.abs(red - blue).max() == 1
    for row, field in enumerate((left, left[:, ::-1], left[:2, 1:5])):
        wanted = np.where(field[..., :1] > 0, red, blue)
        assert np.array_equal(basis(embeddings.tokens(row)), wanted)


def test_components_without_variation_are_half(tmp_path):
    left = np.where(np.arange(6)[None, :, None] < 3, RED, BLUE) * np.ones((4, 1, 1))
    embeddings = stored(tmp_path, [left])
    assert np.array_equal(denseft.fit_embeddings(embeddings)(embeddings.tokens(0))[..., 1:], np.full((4, 6, 2), 0.5))


def test_basis_is_deterministic(tmp_path):
    forward, again = (
        denseft.fit_embeddings(stored(tmp_path / name, [noisy(i) for i in range(5)]), 60) for name in ("a", "b")
    )
    assert all(np.array_equal(getattr(forward, n), getattr(again, n)) for n in denseft.Basis.__annotations__)


def test_basis_of_a_sample_is_that_of_all_tokens(tmp_path):
    """Every place of a photograph shows something else, and no place is left out."""
    weight = np.linspace(1, 4, 24)[:, None]
    place = normalise(np.random.default_rng(0).normal(size=(24, 3)) @ np.diag([4, 2, 1]) @ np.eye(3, 8))
    fields = [(place * weight + np.random.default_rng(i).normal(0, 0.05, (24, 8))).reshape(4, 6, 8) for i in range(200)]
    embeddings = stored(tmp_path, fields)
    whole, sampled = denseft.fit_embeddings(embeddings), denseft.fit_embeddings(embeddings, 600)
    assert (np.abs((whole.axes * sampled.axes).sum(axis=1)) > 0.99).all()
    assert np.allclose(whole.low, sampled.low, atol=0.1)
    assert np.allclose(whole.high, sampled.high, atol=0.1)


def test_basis_is_that_of_a_plain_singular_value_decomposition(tmp_path):
    embeddings = stored(tmp_path, [noisy(seed) for seed in range(5)])
    basis = denseft.fit_embeddings(embeddings)
    values = np.concatenate([embeddings.tokens(i).descriptors for i in range(5)]).astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    axes = np.linalg.svd(values - values.mean(axis=0))[2][:3]
    assert np.allclose(np.abs((axes * basis.axes).sum(axis=1)), 1)
    assert np.allclose(basis.axes @ basis.axes.T, np.eye(3))


def test_signs_are_fixed(tmp_path):
    axes = denseft.fit_embeddings(stored(tmp_path, [noisy(0)])).axes
    assert (axes[range(3), np.abs(axes).argmax(axis=1)] > 0).all()


def test_norm_counts_in_the_weighting_alone(tmp_path):
    field = noisy(0)
    strong = field * 3
    plain, scaled = (stored(tmp_path / name, [f]) for name, f in (("a", field), ("b", strong)))
    assert np.allclose(denseft.fit_embeddings(plain).axes, denseft.fit_embeddings(scaled).axes, atol=1e-2)
    basis = denseft.fit_embeddings(plain)
    tokens = plain.tokens(0)
    norms = np.linalg.norm(tokens.as_grid().astype(np.float64), axis=2, keepdims=True)
    assert basis.norm == pytest.approx(np.percentile(norms, 99))
    weighted = basis(tokens, weighted=True)
    assert np.allclose(weighted, basis(tokens) * np.minimum(1, norms / basis.norm))
    assert weighted.dtype == np.float32
    assert weighted.sum() < basis(tokens).sum()


def test_outliers_do_not_grey_out_the_rest(tmp_path):
    """One token far off in a thousand: the others still use the whole range."""
    random = np.random.default_rng(0)
    angle = random.uniform(0, 0.3, 1024)
    values = np.zeros((1024, 8))
    values[:, 0], values[:, 1] = np.cos(angle), np.sin(angle)
    values[500] = [-1, 0, 0, 0, 0, 0, 0, 0]
    embeddings = stored(tmp_path, [values.reshape(32, 32, 8)])
    colours = denseft.fit_embeddings(embeddings)(embeddings.tokens(0)).reshape(-1, 3)
    assert 0 <= colours.min() < colours.max() <= 1
    assert colours.std(axis=0).max() > 0.25  # of an even spread: 0.29


def test_sample_is_spread_over_all_photographs(tmp_path):
    """Of 10 photographs only the last differs: a sample of a fifth still sees it."""
    embeddings = stored(tmp_path, [np.broadcast_to(RED, (4, 6, 8))] * 9 + [noisy(0)])
    basis = denseft.fit_embeddings(embeddings, sample=48)
    assert basis.high[0] - basis.low[0] > 0.5


def test_keypoints_are_refused(tmp_path):
    keypoints = stored(tmp_path / "keypoints", [noisy(0)], grid=False)
    with pytest.raises(ImatchError, match=r"000\.png lie on no grid, .* use a backbone with a grid"):
        denseft.fit_embeddings(keypoints)
    basis = denseft.fit_embeddings(stored(tmp_path / "grid", [noisy(0)]))
    with pytest.raises(ImatchError, match="lie on no grid"):
        basis(keypoints.tokens(0))
    with pytest.raises(ImatchError, match="tokens of 5 numbers do not fit a DenseFT basis of 8"):
        basis(stored(tmp_path / "other", [noisy(0, d=5)]).tokens(0))


@pytest.mark.parametrize(("shape", "sample"), [((1, 3, 8), 100), ((4, 6, 2), 100), ((4, 6, 8), 3)])
def test_too_little_is_refused(shape, sample, tmp_path):
    embeddings = stored(tmp_path, [np.random.default_rng(0).normal(size=shape)])
    with pytest.raises(ImatchError, match="need at least 4 tokens of 3 numbers"):
        denseft.fit_embeddings(embeddings, sample)


def test_picture_has_the_photographs_aspect_and_blocks():
    colours = np.zeros((2, 3, 3))
    colours[0, 0] = 1, 0.5, 0
    image = denseft.denseft_picture(colours, (400, 600), long_side=300)
    assert image.size == (300, 200)
    pixels = np.asarray(image)
    assert np.array_equal(np.unique(pixels.reshape(-1, 3), axis=0), [[0, 0, 0], [255, 128, 0]])
    assert (pixels[:100, :100] == (255, 128, 0)).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_figure_pairs_photographs_with_colours(weighted, few_photographs, tmp_path):
    from imatch.data.images import check_header, list_photographs

    rows, tokens = [], []
    for i, id in enumerate(list_photographs(few_photographs)):
        size = check_header(few_photographs / id)
        rows.append({"id": id, "size": size, "sha256": f"{i:064x}", "position": None})
        tokens.append(Tokens(np.ones(8, np.float32), noisy(i).reshape(-1, 8), grid_xy((4, 6), size), (4, 6)))
    Shards(tmp_path).write(0, rows, tokens)
    Shards(tmp_path).merge()
    figure = figures.denseft(Stored(tmp_path), few_photographs, weighted=weighted)
    assert [axis.get_title() for axis in figure.axes if axis.images] == [
        "a",
        "4 x 6 tokens",
        "b",
        "4 x 6 tokens",
        *(["c", "4 x 6 tokens", "d", "4 x 6 tokens"]),
    ]
    figures.show(figure, tmp_path / "denseft.png")


def test_figure_says_that_keypoints_have_no_grid(tmp_path):
    said = figures.denseft(stored(tmp_path / "$price$", [noisy(0)], grid=False), tmp_path)
    assert "lie on no grid" in said
