"""The numbers that the README promises, on real photographs."""

from pathlib import Path

import numpy as np
import pytest

import imatch
from imatch.cli import demo
from imatch.data import images, references
from imatch.features.sift import VOCABULARY, Sift
from imatch.matching import geometry, matchers
from imatch.matching.two_view import Estimator
from imatch.viz import figures
from tests import cells
from tools.vocabulary import dead_leaves, learn

ROOT = Path(__file__).parents[1]
ANGLES = [float(angle) for angle in range(0, 360, 30)]
SOME = [0.0, 30.0, 90.0, 210.0]


@pytest.fixture(scope="module")
def metrics(demo_photographs, tmp_path_factory):
    """The demo's own run of `sift`, which is what the notebooks' parameters are, but at a third of the angles and
    without pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "show", lambda *_: None)
        patch.setenv("EXPORT_ROOT", str(tmp_path_factory.mktemp("exports")))
        cells.execute("01_embed", dataset=str(demo_photographs))
        cells.execute("02_references", angles=SOME)
        cells.execute("03_index")
        found = cells.execute("04_match", candidates=1, outputs=["npy"])
    return found["metrics"]


def test_demo_has_18_photographs_and_writes_them_once(demo_photographs):
    assert len(images.list_photographs(demo_photographs)) == 18
    assert demo.write(demo_photographs) == 0


def test_hit_at_1_of_legacy_references(metrics):
    by_crop = {part["crop"]: part["hit_at_1"] for part in metrics["by_crop"]}
    assert by_crop[0.75] >= 0.95
    assert by_crop[0.5] >= 0.9
    assert [view["angle"] for view in metrics["by_view"] if view["crop"] == 0.5] == SOME


def test_verified_matches_are_exact(metrics):
    assert metrics["corner_error_median"] < 1.5
    assert metrics["true_within_8px"] >= 0.9
    assert metrics["verified_right"] == 1.0


def corner_errors(path, backbone, resize, crops):
    """Corner errors in pixels of one photograph's isometric references against it: {(crop, angle): error}."""
    photograph = images.decode(path).pixels

    def tokens(pixels):
        from dataclasses import replace

        h, w = resize.target(pixels.shape[:2], backbone.patch)
        small = pixels if (h, w) == pixels.shape[:2] else np.asarray(images.Image.fromarray(pixels).resize((w, h)))
        (found,) = backbone(small[None])
        factor = np.array([pixels.shape[1] / w, pixels.shape[0] / h])
        return replace(found, xy=((found.xy + 0.5) * factor - 0.5).astype(np.float32))

    source = tokens(photograph)
    errors = {}
    for crop in crops:
        for angle in ANGLES:
            view = references.isometric(photograph, angle, crop)
            found = tokens(view.pixels)
            matches = matchers.create_matcher("mutual")(found, source)
            size = view.mask.shape
            estimate = Estimator("homography", min_share=0.1)(
                found.xy[matches.index_a], source.xy[matches.index_b], size, photograph.shape[:2]
            )
            truth = np.linalg.inv(view.matrix)
            known = estimate.matrix is not None
            errors[crop, angle] = geometry.corner_error(estimate.matrix, truth, size) if known else np.inf
    return errors


def test_geometry_on_drone_photographs_does_not_drift_with_the_angle(brighton_beach):
    """Two of the 18 frames here; all of them by params/folder.yaml."""
    frames = [brighton_beach / id for id in images.list_photographs(brighton_beach)][::9]
    errors = [corner_errors(frame, Sift(), imatch.Resize("scale", scale=0.5), (1.0, 0.75)) for frame in frames]
    every = np.array([list(one.values()) for one in errors])
    assert np.median(every) <= 1.5
    assert (every <= 8).mean() >= 0.9
    by_angle = [np.median([one[1.0, angle] for one in errors]) for angle in ANGLES]
    assert max(by_angle) < 0.3, "a slip of half a pixel in any room would show at 90 degrees"


def test_vocabulary_is_what_its_command_makes():
    """A small run of the same command agrees with the shipped words as far as chance allows."""
    words = np.load(VOCABULARY)
    assert words.shape == (64, 128)
    assert words.dtype == np.float16
    assert 16_000 <= VOCABULARY.stat().st_size <= 33_000
    small = learn(images=8)
    assert learn(images=2).tobytes() == learn(images=2).tobytes()

    def error(vocabulary):
        (tokens,) = Sift()(dead_leaves(np.random.default_rng(99))[None])
        away = np.linalg.norm(tokens.descriptors[:, None] - vocabulary[None].astype(np.float32), axis=2)
        return away.min(axis=1).mean()

    assert error(words) == pytest.approx(error(small), rel=0.02)
    assert error(words) < 0.97 * error(np.random.default_rng(0).permutation(words.ravel()).reshape(words.shape))
