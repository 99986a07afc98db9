"""Which items no answer to a user holds: what the user disliked, always, and what they know.

This is the one place that decides it for service: for the exported graph (`model/encoder.py`), for
events (`serving/user_histories.py`), and for answers by a history that the query brings
(`LoadedRetriever.left_out`, which `recommend` and the command `query` call). `Activity` also takes
disliked items out of histories. Evaluations leave out the same items by `Holdout.excluded`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from tfrs_pipeline.data.schema import Stage

KNOWN_STAGES: Mapping[str, set[Stage]] = {
    "clicked": {Stage.CLICKED},
    "seen": {Stage.CLICKED, Stage.EXPOSED},
    "none": set(),
}
"""The stages by which a user knows an item, by the training's `evaluation.exclude`."""


def left_out(known: Iterable[Any], disliked: Iterable[Any], *, excludes_known: bool) -> list[Any]:
    """Returns what an answer to a user leaves out: ids, or tables that hold them.

    Disliked items are left out whatever `evaluation.exclude` is, and with a repeat bonus too.

    Args:
        known: What the user clicked, or also saw (`KNOWN_STAGES`).
        disliked: What the user disliked, in the training's log or in service.
        excludes_known: Whether the model leaves out known items (`Exportable.leaves_out_known`).

    Example:
        >>> left_out(["v1", "v2"], ["v3"], excludes_known=True)
        ['v1', 'v2', 'v3']
        >>> left_out(["v1", "v2"], ["v3"], excludes_known=False)
        ['v3']
    """
    return [*(known if excludes_known else ()), *disliked]
