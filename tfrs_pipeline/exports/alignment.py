"""Turns the space of a new model onto that of the version in service, which changes no score.

Each training from random weights has axes of its own, so a ranker that was fitted on yesterday's
vectors would read noise in today's.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfrs_pipeline.answers import publish
from tfrs_pipeline.answers.stored import read_array
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.durable import Damaged, read_record


class Alignment(NamedTuple):
    """How new vectors are turned, and how near they then are.

    Attributes:
        rotation: [D, D] float32, orthogonal: a new vector times this is the turned one.
        report: What the manifest says: the `version`, `num_items` that both have, and
            `mean_cosine` of the same item's two vectors, without biases.
    """

    rotation: np.ndarray
    report: Mapping[str, Any]


def align(
    model: Path, item_ids: np.ndarray, vectors: np.ndarray, *, has_item_bias: bool
) -> Alignment | None:
    """Finds the rotation of [n, D] vectors that brings them nearest to those of the newest version.

    It is the orthogonal Procrustes solution (Schönemann 1966) over the items that both have: the
    least sum of squared distances. An item's bias, in the last place, stays where it is.

    Returns None if the model's folder has no version that can be read, or none of this size with an
    item of these.
    """
    versions = publish.versions_of(model)
    if not versions:
        return None
    folder, num = model / str(versions[-1]), vectors.shape[1] - has_item_bias
    with contextlib.suppress(Damaged, OSError, KeyError):
        manifest = read_record(folder / publish.MANIFEST_FILE, check_files=False)
        if (manifest["format"], manifest["has_item_bias"]) != (publish.FORMAT, has_item_bias):
            return None
        before = read_array(folder / publish.SERVICE_FOLDER, publish.VECTORS)
        ids_before = Ids(publish.read_table(folder / publish.ITEMS_FILE)["item_id"].to_pylist())
        rows = ids_before.rows(item_ids) if ids_before.are_text == Ids(item_ids).are_text else None
        if rows is None or not rows.any() or before.shape[1] != vectors.shape[1]:
            return None
        ours = vectors[rows > 0, :num].astype(float)
        theirs = before[rows[rows > 0] - 1, :num].astype(float)
        left, _, right = np.linalg.svd(ours.T @ theirs)
        rotation = np.eye(vectors.shape[1])
        rotation[:num, :num] = left @ right
        turned = ours @ rotation[:num, :num]
        lengths = np.linalg.norm(turned, axis=1) * np.linalg.norm(theirs, axis=1)
        cosines = np.vecdot(turned, theirs)[lengths > 0] / lengths[lengths > 0]
        report = {
            "version": versions[-1],
            "num_items": int((rows > 0).sum()),
            "mean_cosine": float(cosines.mean()) if len(cosines) else 1.0,
        }
        return Alignment(rotation.astype(np.float32), report)
    return None
