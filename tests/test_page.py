"""The pages in a browser, from their files: what the pointer and the keys show."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from imatch.core import files
from imatch.core.types import Geometry, Matches, Tokens
from imatch.data.store import read_ranking
from imatch.steps.chain import open_embeddings
from imatch.steps.match import open_match
from imatch.viz import html, pictures
from tests import rendered
from tests.test_pictures import TURN, on_grid, planted
from tests.test_steps import embedded, matched_scene, referenced, searched

GRID = (8, 10)
QUERY, CANDIDATE = "flight 1/<img src=x onerror=alert(1)></title></script>.png", "해변 \"1\" & '2'.png"


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens a page from its file; at the end nothing must have gone wrong, and nothing been asked of anyone."""
    with chromium.new_context(viewport={"width": 1200, "height": 900}) as context:
        context.set_offline(True)
        sheet = context.new_page()
        wrong, asked = [], []
        sheet.on("console", lambda message: wrong.append(message.text))
        sheet.on("pageerror", lambda error: wrong.append(str(error)))
        sheet.on("request", lambda request: asked.append(request.url))

        def open_file(path):
            sheet.goto(path.as_uri())
            return sheet

        yield open_file
        sheet.screenshot(path=tmp_path / "page.png")
        assert wrong == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert len([url for url in asked if url.startswith("file:")]) == 1


@pytest.fixture
def true(tmp_path):
    """A pair whose descriptors of A lie on B in another order: `order[i]` is the patch of A that B's patch i shows."""
    random = np.random.default_rng(0)
    values = random.normal(size=(80, 16)).astype(np.float32)
    order = random.permutation(80)
    pair = planted(tmp_path, TURN)
    a, b = on_grid(values, GRID, pair.sizes[0]), on_grid(values[order], GRID, pair.sizes[1])
    index_b = np.arange(0, 80, 4)
    matches = Matches(order[index_b], index_b, np.linspace(0.99, 0.61, 20).astype(np.float32))
    row = {**pair.row, "query": QUERY, "candidate": CANDIDATE, "rotation": -36.9, "scale": 1.0}
    found = Geometry(TURN, np.arange(20) < 15, 0.5, True, "15 inliers of 20 <b>correspondences</b>")
    pair = replace(
        pair, row=row, matches=matches, geometry=found, xy_a=a.xy[matches.index_a], xy_b=b.xy[matches.index_b]
    )
    return SimpleNamespace(pair=pair, a=a, b=b, order=order, path=tmp_path / "pair.html")


@pytest.fixture(scope="module")
def depth(tmp_path_factory):
    """A rendered scene of depth, and its pair a.jpg, b.jpg with their tokens."""
    folder = tmp_path_factory.mktemp("depth")
    scene = rendered.scene(rendered.textures(folder / "demo"), 11, 15)
    step = matched_scene(scene, folder)
    (row,) = (row for row in files.read_rows(step.folder / "pairs.jsonl") if row["query"] == "a.jpg")
    found = open_match(step)
    return SimpleNamespace(scene=scene, pair=found.pair(row), tokens=found.tokens(row))


def off_line(sheet, xy):
    """How far the epipolar line that is shown passes from a pixel of B."""
    ends = sheet.evaluate(
        """() => [1, 2].map((end) => {
            const [x, y] = ["x", "y"].map((axis) => Number(part.epipolar.getAttribute(axis + end)));
            return [(x - data.b.left) / data.b.factor - 0.5, y / data.b.factor - 0.5];
        })"""
    )
    (x, y), way = np.asarray(xy) - ends[0], np.subtract(*ends)
    return abs(x * way[1] - y * way[0]) / np.linalg.norm(way)


def place(xy):
    return f"({xy[0]:.1f}, {xy[1]:.1f})"


def hover(sheet, xy, size, right=False):
    """Move the pointer to a pixel of the left, or the right, photograph."""
    box = sheet.locator("image").nth(int(right)).bounding_box()
    (x, y), (h, w) = map(float, xy), size
    sheet.mouse.move(box["x"] + (x + 0.5) * box["width"] / w, box["y"] + (y + 0.5) * box["height"] / h)


def at(sheet, name):
    """Where a mark stands: (x, y) pixels of B, or None."""
    return sheet.evaluate(
        """(name) => {
            const mark = document.getElementById(name);
            if (!mark.classList.contains("on")) return null;
            const [x, y] = mark.getAttribute("transform").match(/[-\\d.]+/g).map(Number);
            return [(x - data.b.left) / data.b.factor - 0.5, y / data.b.factor - 0.5];
        }""",
        name,
    )


def test_pointing_at_a_patch_shows_where_it_went(true, opened):
    sheet = opened(html.pair_page(true.pair, true.a, true.b, true.path))
    assert not sheet.locator("#heat").is_visible()
    cells = sheet.locator("#heat rect")
    assert cells.count() == 80
    for patch in (0, 42, 79):
        hover(sheet, true.a.xy[patch] + 3, true.pair.sizes[0])
        assert sheet.locator("#heat").is_visible()
        assert sheet.locator("#epipolar.on").count() == 0  # of a plane
        best = int(np.flatnonzero(true.order == patch)[0])
        assert at(sheet, "best") == pytest.approx(true.b.xy[best], abs=0.01)
        yellow = "#{:02x}{:02x}{:02x}".format(*pictures.COLOURS[255])
        fills = cells.evaluate_all("(cells) => cells.map((cell) => cell.getAttribute('fill'))")
        assert [i for i, fill in enumerate(fills) if fill == yellow] == [best]
        similarity = pictures.similarities(true.a, true.b, [patch])[0]
        _, rival = pictures.best_two(similarity, true.b)
        assert at(sheet, "rival") == pytest.approx(true.b.xy[rival], abs=0.01)
        said = sheet.locator("#found").inner_text()
        assert place(true.a.xy[patch]) in said
        values = [float(value) for value in re.findall(r"\d\.\d\d(?!\d)", re.sub(r"\(.*?\)", "", said))]
        assert values == pytest.approx([1.0, similarity[rival]], abs=0.01)
    hover(sheet, (100, 80), true.pair.sizes[1], right=True)
    assert not sheet.locator("#heat").is_visible()


def test_pointing_at_a_pixel_draws_its_epipolar_line(depth, opened, tmp_path):
    """Of any pixel, whether a keypoint is there or not."""
    pair, line = depth.pair, "#epipolar.on"
    sheet = opened(html.pair_page(pair, *depth.tokens, tmp_path / "pair.html"))
    assert sheet.locator(line).count() == 0
    off = []
    for i in range(0, len(depth.scene.points[0]), 97):
        hover(sheet, depth.scene.points[0][i], pair.sizes[0])
        assert sheet.locator(line).count() == 1
        off.append(off_line(sheet, depth.scene.points[1][i]))
    assert max(off) < 1
    sheet.mouse.move(2, 2)
    assert sheet.locator(line).count() == 0
    sheet.locator("#pair").focus()
    for _ in range(3):
        sheet.keyboard.press("ArrowRight")
        chosen = int(sheet.locator(".chosen").get_attribute("data-match"))
        assert off_line(sheet, pair.xy_b[chosen]) < 1
    assert sheet.locator(line).count() == 1
    sheet.keyboard.press("Escape")
    assert sheet.locator(line).count() == 0


def test_a_scene_of_depth_is_said_to_be_one(depth, true, opened, tmp_path):
    sheet = opened(html.pair_page(depth.pair, *depth.tokens, tmp_path / "pair.html"))
    text = sheet.locator("body").inner_text()
    assert "A scene with depth, rotated about -6." in text
    assert re.search(r"The camera rotated by 15\.\d degrees and moved to the right and ahead, \(0\.8\d, 0\.1", text)
    assert "The threshold is 3 pixels." in text
    assert sheet.locator("#outline").get_attribute("stroke-dasharray")
    flat = html.pair_page(true.pair, true.a, true.b, true.path).read_text(encoding="utf-8")
    assert "stroke-dasharray=" not in flat


def test_slider_and_box_choose_the_correspondences(true, opened):
    sheet = opened(html.pair_page(true.pair, true.a, true.b, true.path))

    def shown():
        return sheet.locator("#lines g:visible").count()

    assert shown() == 15
    assert sheet.locator("#count").inner_text() == "15 of 20 correspondences"
    sheet.locator("#inliers").uncheck()
    assert shown() == 20
    outliers = sheet.locator("#lines .outlier line")
    dashes = outliers.evaluate_all("(lines) => lines.map((line) => getComputedStyle(line).strokeDasharray)")
    assert dashes == ["6px, 4px"] * 5
    sheet.locator("#threshold").fill("0.9")
    wanted = int((true.pair.matches.similarity >= 0.9).sum())
    assert shown() == wanted < 15
    assert sheet.locator("#count").inner_text() == f"{wanted} of 20 correspondences"
    assert sheet.locator("#level").inner_text() == "0.90"
    sheet.locator("#threshold").press("End")
    assert shown() == 0


def test_a_correspondence_says_what_it_is(true, opened):
    sheet = opened(html.pair_page(true.pair, true.a, true.b, true.path))
    pair, i = true.pair, 4
    hover(sheet, pair.xy_b[i], pair.sizes[1], right=True)
    said = sheet.locator("#said").inner_text()
    wanted = f"Correspondence {i + 1}: similarity {pair.matches.similarity[i]:.3f}, inlier, "
    assert said == wanted + f"A {place(pair.xy_a[i])} to B {place(pair.xy_b[i])}."
    assert sheet.locator(".chosen").get_attribute("data-match") == str(i)
    sheet.mouse.move(2, 2)
    assert sheet.locator(".chosen").count() == 0
    sheet.locator("#pair").focus()
    for key, chosen in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", 14)):
        sheet.keyboard.press(key)
        assert sheet.locator(".chosen").get_attribute("data-match") == str(chosen)
        assert at(sheet, "best") == pytest.approx(pair.xy_b[chosen], abs=0.01)
    sheet.keyboard.press("Escape")
    assert sheet.locator(".chosen").count() == 0


def test_names_are_shown_as_they_are(true, opened):
    """Angle brackets, quotes and Korean are letters of a name, and no markup."""
    sheet = opened(html.pair_page(true.pair, true.a, true.b, true.path))
    assert sheet.title() == sheet.locator("h1").inner_text() == f"{QUERY} \N{RIGHTWARDS ARROW} {CANDIDATE}"
    text = sheet.locator("body").inner_text()
    assert "Verified: 15 inliers of 20 <b>correspondences</b>. Rotated -36.9 degrees, 1.00 times as large" in text
    assert sheet.locator("h1 *, img").count() == 0
    assert sheet.locator("p b").count() == 1
    assert sheet.locator("#outline").get_attribute("stroke") == "#5adc5a"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(true, opened, scheme):
    """Contrast of 4.5 or more (WCAG 2.2, 1.4.3), of the quiet and the coloured words, too."""
    sheet = opened(html.pair_page(true.pair, true.a, true.b, true.path))
    sheet.emulate_media(color_scheme=scheme)

    def light(selector, what):
        colour = sheet.locator(selector).first.evaluate(f"(element) => getComputedStyle(element).{what}")
        channels = np.array([int(c) for c in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    paper = light("body", "backgroundColor")
    assert (paper < 0.1) == (scheme == "dark")
    for selector in ("body", "p.soft", "b.good"):
        dark, bright = sorted((paper, light(selector, "color")))
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, selector


def test_keypoints_answer_for_their_surroundings(true, opened):
    """Of keypoints the nearest one's similarities are shown, as dots."""
    a, b = replace(true.a, grid=None), replace(true.b, grid=None)
    sheet = opened(html.pair_page(true.pair, a, b, true.path))
    assert sheet.locator("#heat circle").count() == 80
    patch = 33
    hover(sheet, a.xy[patch] + np.array([7, -6]), true.pair.sizes[0])
    assert at(sheet, "best") == pytest.approx(b.xy[np.flatnonzero(true.order == patch)[0]], abs=0.01)
    assert "compared with" in sheet.locator("p.soft").inner_text()


def test_large_grids_are_thinned_and_the_page_says_so(true, opened):
    size, grid = true.pair.sizes[0], (40, 50)
    values = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float16)
    large = on_grid(values, grid, size)
    sheet = opened(html.pair_page(true.pair, large, replace(large, grid=None), true.path))
    text = sheet.locator("body").inner_text()
    assert "Of A's 2000 patches 500 answer to the pointer: one row and column of every 2." in text
    assert "Of B's 2000 keypoints 1024 answer to the pointer, matched ones first" in text
    assert sheet.locator("#heat circle").count() == 1024
    few = html._thinned(replace(large, grid=None), np.array([1999, 5]))
    assert np.array_equal(few.xy[-1], large.xy[1999])
    assert html._thinned(on_grid(values[:1024], (32, 32), size), np.array([0])).grid == (32, 32)
    assert len(html._thinned(on_grid(np.ones((4095, 2)), (65, 63), size), np.array([0])).xy) <= html.MOST


def test_a_pair_with_nothing_in_common_opens_too(true, opened):
    nothing = Matches(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32))
    found = Geometry(None, np.zeros(0, bool), np.nan, False, "0 correspondences are too few for homography")
    empty = np.zeros((0, 2), np.float32)
    row = {**true.pair.row, "verified": False, "rotation": None, "scale": None}
    pair = replace(true.pair, matches=nothing, geometry=found, xy_a=empty, xy_b=empty, row=row)
    lone = Tokens(np.ones(1), np.ones((1, 4)), np.array([[99.5, 79.5]]), grid=(1, 1))
    sheet = opened(html.pair_page(pair, lone, lone, true.path))
    assert "Not verified: 0 correspondences are too few" in sheet.locator("body").inner_text()
    hover(sheet, (20, 20), pair.sizes[0])
    assert at(sheet, "best") == pytest.approx([99.5, 79.5])
    assert at(sheet, "rival") is None


def test_a_page_is_the_same_twice_and_needs_no_photographs(true):
    first = html.pair_page(true.pair, true.a, true.b, true.path).read_bytes()
    assert html.pair_page(true.pair, true.a, true.b, true.path).read_bytes() == first
    for path in true.pair.paths:
        path.unlink()
    assert html.pair_page(true.pair, true.a, true.b, true.path).read_bytes() != first


# --- the contact sheet ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(few_photographs, tmp_path_factory):
    """A finished 03_index, its hits at known distances."""
    data = embedded(few_photographs, tmp_path_factory.mktemp("exports"))
    _, references = referenced(data, kind="isometric", angles=(0, 90), crops=(0.8,))
    step, *_ = searched(data, references, "reference-data", k=3)
    ranking = read_ranking(step)
    metres = np.full(ranking.rows.shape, 42.25)
    metres[0, 1] = np.nan
    saved = {name: values for name, values in vars(ranking).items() if values is not None}
    with files.atomic(step.folder / "ranking.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **{**saved, "metres": metres})
    return step


def test_pointing_at_a_hit_shows_it_large_beside_its_query(index, opened, tmp_path):
    sheet = opened(html.sheet_page("few", *open_embeddings(index), read_ranking(index), tmp_path / "sheet.html"))
    query, gallery = open_embeddings(index)
    ranking = read_ranking(index)
    assert sheet.locator("section").count() == len(query) == 8
    assert sheet.locator("section .hit").count() == 24
    for q, rank in ((0, 0), (3, 2), (1, 0)):
        hit = sheet.locator("section").nth(q).locator(".hit").nth(rank)
        hit.hover()
        large, small = sheet.locator("#hit svg"), hit.locator("svg")
        assert large.get_attribute("aria-label") == gallery.ids[ranking.rows[q, rank]]
        assert large.bounding_box()["width"] > 1.5 * small.bounding_box()["width"]
        assert sheet.locator("#query svg").get_attribute("aria-label") == query.ids[q]
        said = sheet.locator("#hit figcaption").inner_text()
        assert said.startswith(f"{rank + 1}: {ranking.scores[q, rank]:.3f}, 42.2 m, ")
    sheet.keyboard.press("Tab")
    assert sheet.locator("#query svg").get_attribute("aria-label") in query.ids


def test_the_sheet_frames_right_and_wrong_and_says_metres(index, opened, tmp_path):
    sheet = opened(html.sheet_page("few", *open_embeddings(index), read_ranking(index), tmp_path / "sheet.html"))
    ranking = read_ranking(index)
    hits = sheet.locator("section .hit")
    classes = hits.evaluate_all("(hits) => hits.map((hit) => hit.classList.contains('right'))")
    assert classes == ranking.right.ravel().tolist()
    assert 0 < sum(classes) < len(classes)
    assert "m," not in hits.nth(1).inner_text()
    assert "turned by 90°" in sheet.locator(".query").nth(1).inner_text()
    sizes = sheet.locator("use").evaluate_all("(uses) => uses.map((use) => use.getBBox().width)")
    assert min(sizes) > 50  # every picture is there


def test_a_sheet_of_some_queries_says_so(index, tmp_path):
    text = html.sheet_page(
        "few", *open_embeddings(index), read_ranking(index), tmp_path / "sheet.html", n=3, k=1
    ).read_text(encoding="utf-8")
    assert "3 of 8 queries and their best hits" in text
    assert text.count('class="hit ') == 3
    assert (
        html.sheet_page(
            "few", *open_embeddings(index), read_ranking(index), tmp_path / "again.html", n=3, k=1
        ).read_text(encoding="utf-8")
        == text
    )
