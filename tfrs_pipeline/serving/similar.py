"""Similar items: the search by a candidate's own vector in place of a query's."""

from collections.abc import Collection, Sequence
from typing import Any

from tfrs_pipeline.retrieval import Excluded, Retrieved
from tfrs_pipeline.serving.candidates import Candidates


class UnknownItem(ValueError):
    """The item of a request for similar ones is not among a model's candidates."""


def find_similar(
    candidates: Candidates,
    item_ids: Sequence[Any],
    k: int,
    exclude: Excluded,
    allowed: Sequence[Collection[str]] | None,
    *,
    has_bias: bool,
    exact: bool = False,
) -> Retrieved:
    """Searches by the vectors of items; see `LoadedRetriever.similar`.

    Where vectors end with an item bias, a query ends with 1, and so does an item that is asked
    about: its own bias does not count, that of a found item does.
    """
    try:
        vectors = candidates.vectors_of(item_ids)  # A copy.
    except KeyError as error:
        raise UnknownItem(
            f"Item {error.args[0]!r} is not among the {len(candidates):,} items that the model "
            "retrieves. A new one comes in by `upsert` or `tfrs-pipeline refresh-index`."
        ) from None
    if has_bias:
        vectors[:, -1] = 1
    others: Sequence[Collection[Any]] = [()] * len(item_ids) if exclude is None else exclude
    excluded = [[id_, *ids] for id_, ids in zip(item_ids, others, strict=True)]
    return candidates.search(vectors, k, excluded, allowed, exact=exact)
