"""Photographs to embeddings in memory, and references of them with exact truth. Nothing is written."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from tqdm import tqdm

from imatch.core import compute, files, settings
from imatch.core.rows import About, Options, Parameters, ReferenceRow
from imatch.core.types import ImatchError, ImatchWarning, PhotographError, Tokens
from imatch.data import images
from imatch.data import references as kinds
from imatch.data.embeddings import COMPARED, Embeddings, vector_digest
from imatch.data.exif import told
from imatch.data.images import Decoded, Resize
from imatch.features.base import Backbone, backbone_identity, backbone_of, create_backbone, decoded_for, free_for
from imatch.features.pipeline import Made, passed

if TYPE_CHECKING:
    from PIL import Image

    Photograph = str | Path | np.ndarray | Image.Image

Sources = Mapping[str, Path | np.ndarray]
"""Photographs by id: files, or pixels (h, w, 3) uint8 RGB."""
ENOUGH = 64
"""Photographs that tell how large the others will be."""
EMBEDDINGS = "use imatch.steps (or imatch run notebooks/01_embed.ipynb), which keep them on disk"
REFERENCES = "use imatch.steps (or imatch run notebooks/02_references.ipynb), which keep them on disk"


def embed(
    photographs: str | Path | Sequence[Photograph],
    weight: str = "sift",
    *,
    backbone_options: Options | None = None,
    resize: Resize = Resize(),
    batch_size: int = 8,
    device: str = "auto",
    data_key: str = settings.DATA_KEY,
) -> Embeddings:
    """Embed photographs in memory. One that cannot be read, or shows nothing, is left out and named in `skipped`.

    Args:
        photographs: a folder, or paths, arrays (h, w, 3) uint8 RGB and Pillow images. Row i is of the i-th that could
            be used; the id of a path is the path, of others their place, such as "00002".
        weight: backbone: sift, dsift, xfeat, or weights of the registry.
        backbone_options: fields of that backbone.
        resize: how large it sees the photographs; without a limit of its own it gets the backbone's.
        batch_size: photographs a forward pass.
        device: where a network runs; "auto" is the GPU, if there is one.
        data_key: the registry that names the weights.

    Raises:
        ImatchError: an unknown weight or option, no photographs, one given twice, none that could be used, or more than
            fit into memory.

    >>> photographs = np.random.default_rng(0).integers(0, 255, (2, 90, 120, 3), np.uint8)
    >>> embeddings = embed(list(photographs), "dsift")
    >>> embeddings.vectors.shape, embeddings.tokens(1).grid, embeddings.ids
    ((2, 128), (6, 8), ['00000', '00001'])
    """
    weight_set, _, weight = weight.rpartition("/")
    backbone = create_backbone(weight, backbone_options, weight_set=weight_set, device=device, data_key=data_key)
    resize.check(backbone.patch)
    return embed_sources(sources_of(photographs), backbone, seen_by(weight, backbone, resize), batch_size)


def references(
    photographs: Embeddings,
    angles: Sequence[float] = tuple(range(0, 360, 30)),
    crops: Sequence[float] = (0.75, 0.5),
    *,
    kind: str = "isometric",
    batch_size: int = 8,
    device: str = "auto",
) -> Embeddings:
    """Rotate and crop photographs into references whose exact matrix is known, and embed them likewise, in memory.

    Args:
        photographs: of `embed`, or of a step.
        angles: degrees counter-clockwise.
        crops: ratios of the side that is kept, in (0, 1].
        kind: a name of `data.references.REFERENCES`.
        batch_size, device: as of `embed`.

    Returns:
        Embeddings whose `views` hold a row a reference: source, angle, crop, and matrix (3 x 3, photograph -> view).

    Raises:
        ImatchError: an unknown kind, a number out of its range, a photograph that has changed, or more than fit into
            memory.

    >>> photograph = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    >>> found = references(embed([photograph], "dsift"), angles=[0, 90], crops=[0.5])
    >>> found.ids, found.views[found.ids[1]]["angle"]
    (['00000_rot000_crop50', '00000_rot090_crop50'], 90)
    """
    kinds.check(kind, angles, crops)
    if photographs.views:
        raise ImatchError("these are references already: give the photographs that they were made from")
    backbone = backbone_of(photographs.parameters, device)
    parameters = cast("Parameters", {name: photographs.parameters.get(name) for name in COMPARED})
    made: dict[str, np.ndarray] = {}
    views: dict[str, ReferenceRow] = {}
    held = 0
    for row, about in enumerate(photographs.rows):
        pixels = _unchanged(photographs, row)
        for crop in crops:
            for angle in angles:
                id = kinds.name(about["id"], angle, crop)
                view = kinds.REFERENCES[kind](pixels, angle, crop)
                made[id] = view.pixels
                views[id] = kinds.record(view, id, about, kind, angle, crop)
                held += view.pixels.nbytes
        check_memory(held, row + 1, len(photographs), REFERENCES)
    found = make_tokens(made, backbone, parameters, batch_size, views, beside=held, instead=REFERENCES)
    return replace(_embeddings(found, made, parameters, views), _sources=photographs)


def _unchanged(photographs: Embeddings, row: int) -> np.ndarray:
    """The pixels of a photograph that is what it was when it was embedded."""
    id = files.printable(photographs.ids[row])
    try:
        decoded = images.decode(photographs.photograph(row))
    except PhotographError as error:
        raise PhotographError(f"{id}: {error}") from error
    if decoded.sha256 != photographs.rows[row]["sha256"]:
        raise ImatchError(f"{id} has changed since it was embedded: embed again")
    return decoded.pixels


def embed_sources(sources: Sources, backbone: Backbone, parameters: Parameters, batch_size: int = 8) -> Embeddings:
    """Embed photographs by a backbone that is there; else as `embed`.

    Args:
        sources: the photographs, in the order of the rows.
        backbone, parameters: of `create_backbone`, and of `seen_by` with that.
    """
    return _embeddings(make_tokens(sources, backbone, parameters, batch_size), sources, parameters, {})


def make_tokens(
    sources: Sources,
    backbone: Backbone,
    parameters: Parameters,
    batch_size: int = 8,
    views: Mapping[str, ReferenceRow] | None = None,
    *,
    beside: int = 0,
    copies: int = 1,
    instead: str = EMBEDDINGS,
) -> Made:
    """Pass photographs through a backbone, with a progress bar on a terminal, on standard error.

    Args:
        sources, backbone, parameters, batch_size: as of `embed_sources`.
        views: of references, their rows.
        beside, instead: as of `check_memory`.
        copies: how many times as many tokens will be held, such as those of other rotations.

    Raises:
        ImatchError: more than fit into memory, or batch_size is below 1.
    """
    if batch_size < 1:
        raise ImatchError(f"batch_size is {batch_size}: give at least 1")
    made, held, done, total = Made(), 0, 0, len(sources)
    backbone.load()
    free = free_for(backbone)
    read = partial(_read, backbone, Resize(**parameters["resize"]), views or {}, free)
    workers = settings.cores()
    decoded = compute.ahead(read, sources.items(), workers, batch_size + 2 * workers)
    coming = made.photographs(tqdm(decoded, "embed", total, disable=None, delay=1))
    with closing(decoded), closing(passed(backbone, coming, batch_size, free[backbone.device])) as batches:
        for batch, tokens, *_ in batches:
            made.take(batch, tokens)
            held += copies * sum(_bytes(one) for one in tokens if isinstance(one, Tokens))
            done += len(batch)
            check_memory(held, done, total, instead, beside)
            del batch, tokens  # not to be held while the next one is put together
    for note in told(made.rows, "note"):
        warnings.warn(note, ImatchWarning, stacklevel=2)
    return made


def _embeddings(made: Made, sources: Sources, parameters: Parameters, views: Mapping[str, ReferenceRow]) -> Embeddings:
    rows = [row for id, row in made.rows.items() if id in made.tokens]
    if not rows:
        id, first = next(iter(made.rows.items()))
        why = f"{files.printable(id)}: {first['skipped']}"
        raise ImatchError(f"none of {len(sources)} photographs could be used, the first: {why}")
    tokens = [made.tokens[row["id"]] for row in rows]
    for row, one in zip(rows, tokens, strict=True):
        row.update({"grid": one.grid, "n": len(one.descriptors), "vector": vector_digest(one.vector)})
    skipped = [row for id, row in made.rows.items() if id not in made.tokens]
    vectors = np.stack([one.vector for one in tokens]).astype(np.float32)
    return Embeddings(rows, vectors, parameters, skipped, views, tokens, sources)


def _read(
    backbone: Backbone,
    resize: Resize,
    views: Mapping[str, ReferenceRow],
    free: Mapping[str, int],
    photograph: tuple[str, Path | np.ndarray],
) -> tuple[str, About, Decoded | PhotographError]:
    (id, source), about = photograph, About()
    if view := views.get(id):  # a part of a photograph is seen at the scale of all of it
        resize = resize.like(view["source_size"]) if resize.limit else resize
        about = {"source": view["source"], "source_sha256": view["source_sha256"]}
    return id, about, decoded_for(source, resize, backbone, 0, free)


def sources_of(photographs: str | Path | Sequence[Photograph]) -> Sources:
    """Say where photographs are, by id: those of a folder, or those given; what a folder holds besides is printed on
    standard error.

    Raises:
        ImatchError: none, one that is no photograph, or one given twice.

    >>> list(sources_of(["a.jpg", np.zeros((2, 3, 3), np.uint8)]))
    ['a.jpg', '00001']
    """
    if isinstance(photographs, str | Path):
        root = settings.from_workspace(photographs)
        if not root.is_dir():
            raise ImatchError(f"no folder {root}: give a folder, or a list of photographs")
        ids = images.list_photographs(root)
        found: dict[str, Path | np.ndarray] = {id: root / id for id in ids}
        if ids.left_out:
            print(f"{len(ids)} photographs in {root}{ids.left_out}", file=sys.stderr)
    elif not isinstance(photographs, Sequence):
        kind = type(photographs).__name__
        raise ImatchError(f"photographs is a {kind}: give a folder, or a list of photographs")
    else:
        found = {}
        for i, photograph in enumerate(photographs):
            id = Path(photograph).as_posix() if isinstance(photograph, str | Path) else f"{i:05d}"
            if id in found:
                raise ImatchError(f"{files.printable(id)} was given twice")
            found[id] = source_of(photograph, f"photograph {i}")
    if not found:
        raise ImatchError("no photographs were given, or the folder holds none")
    return found


def source_of(photograph: Photograph, name: str) -> Path | np.ndarray:
    """Say where a photograph lies, or give its upright pixels; `name` is what messages call one without a file.

    Raises:
        ImatchError: it is no path, no array (h, w, 3) uint8 RGB, and no Pillow image.
    """
    if isinstance(photograph, str | Path):
        return settings.from_workspace(photograph)
    if isinstance(photograph, np.ndarray):
        rgb = photograph.ndim == 3 and photograph.shape[2] == 3
        if photograph.dtype != np.uint8 or not rgb or not photograph.size:
            raise ImatchError(
                f"{name} is an array {photograph.shape} of {photograph.dtype}: give (h, w, 3) uint8 RGB, 0 to 255"
            )
        return photograph
    if not hasattr(photograph, "convert"):
        raise ImatchError(f"{name} is a {type(photograph).__name__}: give a path, an array or a Pillow image")
    try:
        return images.decode(photograph).pixels
    except PhotographError as error:
        raise PhotographError(f"{name}: {error}") from error


def seen_by(weight: str, backbone: Backbone, resize: Resize) -> Parameters:
    """Say how photographs go through a backbone: parameters from which it can be made again.

    >>> seen_by("sift", create_backbone("sift"), Resize())["resize"]
    {'mode': 'scale', 'scale': 1.0, 'limit': 3072}
    """
    limit = resize.limit or backbone.side
    scaled = {"scale": resize.scale, **({"limit": limit} if limit else {})}
    chosen = scaled if resize.mode == "scale" else {"long_side": resize.long_side}
    return {
        "weight": weight,
        "backbone": backbone_identity(backbone),
        "weights_digest": backbone.digest,
        "resize": {"mode": resize.mode, **chosen},
        "pixels": images.RESAMPLING[backbone.resampling],
    }


def check_memory(held: int, done: int, total: int, instead: str, beside: int = 0) -> None:
    """Refuse what does not fit into half of the memory, or will not once a good part of it is there.

    Args:
        held: bytes of what is done.
        done, total: how many photographs.
        instead: what a message says to do.
        beside: bytes that are held in any case.

    Raises:
        ImatchError: it will not fit.
    """
    wanted = beside + (held * total // done if done >= min(total, ENOUGH) else held)
    if wanted > (held + compute.free_memory()) // 2:
        size = f"{wanted / 2**30:.0f} GB"
        raise ImatchError(f"{total} photographs take about {size} of memory here: {instead}")


def _bytes(tokens: Tokens) -> int:
    return tokens.vector.nbytes + tokens.descriptors.nbytes + tokens.xy.nbytes
