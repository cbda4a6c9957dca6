"""The rendered scenes are what they say: their true points agree with their cameras, and planes do not explain them."""

import cv2
import numpy as np
import pytest

from tests import rendered


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    return rendered.textures(tmp_path_factory.mktemp("demo"))


def test_true_points_agree_with_the_cameras(textures):
    scene = rendered.scene(textures, 1, 15)
    (a, b), (r, t) = scene.points, scene.relative
    inverse = np.linalg.inv(scene.cameras[0].matrix)
    rays_a, rays_b = (np.column_stack([xy, np.ones(len(xy))]) @ inverse.T for xy in (a, b))
    across = np.cross(t, rays_a @ r.T)
    assert np.abs((rays_b * across).sum(axis=1)).max() < 1e-9
    assert len(a) > 1000


def test_no_plane_explains_a_scene_and_one_explains_a_rotation(textures):
    for scene, planar in ((rendered.scene(textures, 2, 20), False), (rendered.turned_only(textures, 2, 12), True)):
        a, b = scene.points
        _, mask = cv2.findHomography(a, b, cv2.RANSAC, 2.0)
        assert (mask.mean() > 0.99) == planar


def test_what_is_seen_is_what_the_points_say(textures):
    """Patches around true points look alike, those beside them do not."""
    scene = rendered.scene(textures, 3, 5)
    a, b = (cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY).astype(np.float32) for photograph in scene.photographs)

    def alike(shift):
        found = []
        for (x, y), (u, v) in zip(*(np.round(xy).astype(int)[::20] for xy in scene.points), strict=True):
            one, other = a[y - 7 : y + 8, x - 7 : x + 8], b[v - 7 : v + 8, u - 7 + shift : u + 8 + shift]
            if one.shape == other.shape == (15, 15) and min(one.std(), other.std()) > 10:
                found.append(np.corrcoef(one.ravel(), other.ravel())[0, 1])
        return np.median(found)

    assert alike(0) > 0.8
    assert alike(25) < 0.5
