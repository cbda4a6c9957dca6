"""Pages that open without a kernel: one pair, and the contact sheet of a 03_index. Each is one HTML file that holds all
it shows and fetches nothing; a little JavaScript answers to the pointer and the arrow keys."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from imatch.core import files
from imatch.core.rows import Json
from imatch.core.types import ImatchError, Pair, Ranking, Tokens
from imatch.data import images
from imatch.data.embeddings import Embeddings
from imatch.viz import figures, pictures

MOST = 1024
"""Descriptors of a photograph on a page at most: their similarities are a byte a pair."""
SIDE, SMALL, GAP = 640, 320, 12
"""Longer sides of a photograph on the page of a pair and on a contact sheet, and what is between those of a pair."""


def pair_page(pair: Pair, a: Tokens, b: Tokens, path: Path) -> Path:
    """Write a pair as one HTML file.

    Pointing at A shows how similar that patch (of keypoints, the nearest one) is to all of B, with the best and its
    rival (`pictures.best_two`), and in a scene with depth the epipolar line of the pixel. Photographs of more than
    `MOST` descriptors are thinned, and the page says so.

    Args:
        pair: what to show.
        a, b: the tokens that it was matched by.
        path: of the file.

    Returns:
        The path.

    >>> import tempfile
    >>> from imatch.core.types import Geometry, Matches
    >>> tokens, nothing = Tokens(np.ones(1), np.eye(4), np.eye(4, 2)), np.zeros(0)
    >>> found = Geometry(None, nothing > 0, np.nan, False, "0 correspondences are too few for homography")
    >>> files, xy = (Path("a.jpg"), Path("b.jpg")), np.zeros((0, 2))
    >>> row = {"query": "a.jpg", "candidate": "b.jpg"}
    >>> pair = Pair(row, files, ((20, 30), (40, 60)), xy, xy, Matches(nothing, nothing, nothing), found)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pair_page(pair, tokens, tokens, Path(folder) / "pair.html").read_text()[:15]
    '<!doctype html>'
    """
    side_a = _side(pair.row["query"], pair.paths[0], pair.sizes[0], left=0)
    side_b = _side(pair.row["candidate"], pair.paths[1], pair.sizes[1], left=side_a["width"] + GAP)
    few_a, few_b = _thinned(a, pair.matches.index_a), _thinned(b, pair.matches.index_b)
    outline, similarity = pictures.outline(pair.geometry, pair.sizes[0]), pair.matches.similarity
    corners = [] if outline is None else (outline + 0.5) * side_b["factor"]
    known = ("size", "factor", "left")
    return _write(
        path,
        "pair",
        title=f"{side_a['name']} \N{RIGHTWARDS ARROW} {side_b['name']}",
        a=side_a,
        b=side_b,
        width=side_b["left"] + side_b["width"],
        height=max(side_a["height"], side_b["height"]),
        outline=" ".join(f"{side_b['left'] + x:.1f},{y:.1f}" for x, y in corners),
        approximate=pair.geometry.kind == "general",
        verified=pair.geometry.verified,
        reason=pair.geometry.reason,
        facts=_facts(pair),
        any_inlier=bool(pair.geometry.inliers.any()),
        least=f"{np.floor(100 * similarity.min(initial=1)) / 100:.2f}",
        lowest=f"{similarity.min(initial=1):.2f}",
        highest=f"{similarity.max(initial=-1):.2f}" if len(similarity) else "1.00",
        what="keypoint" if a.grid is None else "patch",
        notes=[_thinning(*of) for of in (("A", a, few_a), ("B", b, few_b)) if of[1] is not of[2]],
        data={
            "a": {**{key: side_a[key] for key in known}, "xy": _rounded(few_a.xy)},
            "b": {**{key: side_b[key] for key in known}, "xy": _rounded(few_b.xy)},
            "cell": _cell(few_b, pair.sizes[1]),
            "fundamental": pair.geometry.record()["fundamental"],
            **_correspondences(pair),
            **_heat(few_a, few_b),
        },
    )


def sheet_page(
    name: str, query: Embeddings, gallery: Embeddings, ranking: Ranking, path: Path, n: int = 50, k: int = 5
) -> Path:
    """Write the contact sheet of a 03_index as one HTML file, in which pointing at a hit shows it large.

    Args:
        name: of the 03_index, for the title.
        query, gallery, ranking: its two sides, and what it found.
        path: of the file.
        n: queries at most, evenly spread.
        k: hits of each at most.

    Returns:
        The path.
    """
    queries = figures.hits_shown(query, gallery, ranking, n, k)
    shown: dict[Path, tuple[int, int]] = {row["path"]: row["size"] for row in queries}
    shown |= {hit["path"]: hit["size"] for row in queries for hit in row["hits"]}
    number = {file: i for i, file in enumerate(shown)}
    many = f"{len(query)} queries" if len(queries) == len(query) else f"{len(queries)} of {len(query)} queries"
    return _write(
        path,
        "sheet",
        title=f"{name}: queries and their best hits",
        said=f"{many} and their best hits, by the cosine of global vectors.",
        most=max((len(row["hits"]) for row in queries), default=1) or 1,
        photographs=[_photograph(file, size) for file, size in shown.items()],
        queries=queries,
        number=number,
    )


def render(template: str, shown: Mapping[str, object]) -> str:
    """Fill in one of the templates beside this file, by name; what is shown is escaped.

    >>> "&lt;b&gt;" in render("report", {"title": "<b>", "columns": {}, "rows": [], "pictures": [], "steps": []})
    True
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("imatch.viz", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(printable=files.printable, metres=pictures.metres_said)
    templates.globals.update(good=pictures.GOOD, bad=pictures.BAD, chosen=pictures.CHOSEN)
    return templates.get_template(f"{template}.html.jinja").render(shown)


def _write(path: Path, template: str, **shown: object) -> Path:
    files.write_bytes(path, render(template, shown).encode())
    return path


def _side(id: str, path: Path, size: tuple[int, int], left: float) -> dict[str, Json]:
    """One photograph of a pair, `SIDE` units of the drawing long, and where it begins in it."""
    factor = SIDE / max(size)
    return {
        "name": files.printable(id),
        "uri": _uri(images.thumbnail(path, size, min(SIDE, max(size)))),
        "size": size,
        "factor": factor,
        "left": left,
        "width": size[1] * factor,
        "height": size[0] * factor,
    }


def _uri(picture: np.ndarray) -> str:
    data = BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _rounded(xy: np.ndarray) -> list[list[float]]:
    return np.round(xy.astype(np.float64), 2).tolist()


def _correspondences(pair: Pair) -> dict[str, Json]:
    return {
        "xy_a": _rounded(pair.xy_a),
        "xy_b": _rounded(pair.xy_b),
        "similarity": np.round(pair.matches.similarity.astype(np.float64), 4).tolist(),
        "inlier": pair.geometry.inliers.tolist(),
        "colours": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in pictures.COLOURS.tolist()],
    }


def _heat(a: Tokens, b: Tokens) -> dict[str, Json]:
    """The similarities of all of A to all of B, a byte each from `low` to `high`, and the best two of each of A."""
    if not len(a.xy) or not len(b.xy):
        raise ImatchError("a photograph has no descriptors, so there is nothing to point at: choose another pair")
    similarity = pictures.similarities(a, b, slice(None))
    low, high = float(similarity.min()), float(similarity.max())
    levels = np.round((similarity - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    found = [pictures.best_two(row, b) for row in similarity]
    return {
        "heat": base64.b64encode(levels.tobytes()).decode(),
        "low": low,
        "high": high,
        "best": [best for best, _ in found],
        "rival": [-1 if rival is None else rival for _, rival in found],
    }


def _thinned(tokens: Tokens, matched: np.ndarray) -> Tokens:
    """At most `MOST` of the descriptors: of a grid every s-th row and column, of keypoints those that were matched and
    then the strongest, which come first."""
    if len(tokens.xy) <= MOST:
        return tokens
    if tokens.grid is not None:
        h, w = tokens.grid
        return tokens.thinned(next(s for s in itertools.count(2) if -(-h // s) * -(-w // s) <= MOST))
    kept = sorted(list(dict.fromkeys([*matched.tolist(), *range(len(tokens.xy))]))[:MOST])
    return Tokens(tokens.vector, tokens.descriptors[kept], tokens.xy[kept])


def _thinning(side: str, whole: Tokens, few: Tokens) -> str:
    if whole.grid is None or few.grid is None:
        return f"Of {side}'s {len(whole.xy)} keypoints {len(few.xy)} answer to the pointer, matched ones first"
    stride = -(-whole.grid[0] // few.grid[0])
    return (
        f"Of {side}'s {len(whole.xy)} patches {len(few.xy)} answer to the pointer: one row and column of every {stride}"
    )


def _cell(tokens: Tokens, size: tuple[int, int]) -> tuple[float, float] | None:
    """(x, y) pixels of a cell; None of keypoints."""
    if tokens.grid is None:
        return None
    x, y = tokens.spacing
    return x or size[1], y or size[0]


def _facts(pair: Pair) -> list[str]:
    """What else was found, where it was."""
    row = pair.row
    said = [words[0].upper() + words[1:] for words in pictures.told(pair.geometry, pair.sizes[0])]
    if row.get("reprojection_error") is not None:
        said.append(f"Inliers are {row['reprojection_error']:.2f} pixels off on average")
    if row.get("threshold") is not None:
        said.append(f"The threshold is {row['threshold']:.3g} pixels")
    if row.get("corner_error") is not None:
        said.append(f"A's corners are {row['corner_error']:.2f} pixels from the truth")
    if row.get("score") is not None:
        said.append(f"Cosine of the global vectors {row['score']:.3f}")
    return said


def _photograph(file: Path, size: tuple[int, int]) -> dict[str, str | int]:
    picture = images.thumbnail(file, size, min(SMALL, max(size)))
    return {"uri": _uri(picture), "width": picture.shape[1], "height": picture.shape[0]}
