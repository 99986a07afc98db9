"""The one path of a query: raw arrays, the inputs of a tower, vectors, the search."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tfrs_pipeline.answers.parts import Parts
from tfrs_pipeline.answers.signatures import (
    ALSO_TAKEN,
    FILTERED,
    RETRIEVALS,
    SEARCH_INPUTS,
    SIMILAR,
    id_lists,
)
from tfrs_pipeline.answers.users import Users
from tfrs_pipeline.features.encoding import encode_raw, raw_signature
from tfrs_pipeline.retrieval import Excluded
from tfrs_pipeline.search.candidates import Allowed, Candidates, UnknownItem
from tfrs_pipeline.search.item_graph import ItemGraph
from tfrs_pipeline.search.queries import (
    CANDIDATE_FEATURES,
    CANDIDATE_ROWS,
    FEATURE,
    QUERIES_PER_CALL,
    Arrays,
    History,
    id_array,
    padded,
    padded_ids,
)

ITEMS_PER_CALL = 8192


class Engine:
    """Answers raw arrays by the parts of a version, its users until now, and its candidates.

    `manifest` is the version's; `graph` is what people took near each item, by default until the
    end of the training's log.
    """

    def __init__(
        self,
        parts: Parts,
        users: Users,
        candidates: Candidates,
        manifest: Mapping[str, Any],
        graph: ItemGraph | None = None,
    ) -> None:
        self._parts, self._users, self._candidates = parts, users, candidates
        self._has_bias = manifest["has_item_bias"]
        self._graph = graph or parts.stored.graph
        self._bonus = parts.bonus and replace(parts.bonus, graph=self._graph)

    def answer(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, exact: bool = False
    ) -> dict[str, np.ndarray]:
        """Answers a signature of a model, with live items, events and filters.

        With `exact`, every candidate is scored. Raises an `UnknownItem` for `similar` and
        `also_taken`.
        """
        if signature == "embed_candidate":
            specs = raw_signature(self._parts.inputs.features[CANDIDATE_FEATURES])
            raw = {name: inputs[spec.name] for name, spec in specs.items()}
            embeddings, is_known = self.embed_items(inputs["item_id"].tolist(), raw)
            return {"embeddings": embeddings, "is_known_item": is_known}
        name = RETRIEVALS.get(signature.removesuffix(FILTERED))
        if name is None:
            return self._as_arrays(self.embed(signature, inputs))
        exclude = id_lists(inputs["exclude"])
        allowed = id_lists(inputs["allowed"]) if "allowed" in inputs else None
        query = {key: array for key, array in inputs.items() if key not in SEARCH_INPUTS}
        return self.search(self.embed(name, query), int(inputs["k"]), exclude, allowed, exact=exact)

    def _as_arrays(self, embedded: dict[str, Any]) -> dict[str, np.ndarray]:
        """Pads what differs in length by query: ids with empty ones, bonuses with 0."""
        items = self._parts.stored.items
        known = embedded.pop("known_items", None)
        # As in the SavedModel: absent where the version leaves nothing out for anyone.
        if known is not None and (any(known) or self._users.has_left_out):
            embedded["known_items"] = padded_ids(known, items.are_text)
        if (with_bonus := embedded.pop("with_bonus", None)) is not None:
            ids = [items.take(rows).tolist() for rows, _ in with_bonus]
            bonuses = np.concatenate([np.zeros(0, np.float32), *(part[1] for part in with_bonus)])
            embedded["items_with_bonus"] = padded_ids(ids, items.are_text)
            embedded["bonuses"] = padded(bonuses, ids, np.float32(0))
        return embedded

    def item_queries(self, item_ids: Sequence[Any]) -> dict[str, Any]:
        """Makes queries of items, which exclude the item itself."""
        vectors = self._candidates.vectors_of(item_ids)  # A copy.
        if self._has_bias:
            vectors[:, -1] = 1  # As in a query: the item's own bias does not count.
        return {"embeddings": vectors, "known_items": [[id_] for id_ in item_ids]}

    def neighbour_queries(self, item_ids: Sequence[Any]) -> dict[str, Any]:
        """Makes queries of items for what people also took, by the weights of the item graph."""
        rows = self._parts.stored.items.rows(item_ids)
        unknown = [id_ for id_, row in zip(item_ids, rows, strict=True) if not row]
        if unknown and not self._candidates.has(unknown).all():
            raise UnknownItem(f"Item {unknown[0]!r} is unknown to this model.")
        return {
            "known_items": [[id_] for id_ in item_ids],
            "with_bonus": [self._graph.of(row) for row in rows.tolist()],
        }

    def search(
        self,
        embedded: dict[str, Any],
        k: int,
        exclude: Excluded,
        allowed: Allowed,
        *,
        exact: bool = False,
    ) -> dict[str, np.ndarray]:
        """Answers embedded queries: ids, scores, and what the model knew of each query."""
        # Without vectors, only items with a bonus are found.
        vectors, with_bonus = embedded.pop("embeddings", None), embedded.pop("with_bonus", None)
        if (lists := embedded.pop("known_items", None)) is not None:
            more = [()] * len(lists) if exclude is None else exclude
            exclude = [[*known_ids, *ids] for known_ids, ids in zip(lists, more, strict=True)]
        bonuses = None
        if with_bonus is not None:
            items = self._parts.stored.items
            bonuses = [(items.take(rows), numbers) for rows, numbers in with_bonus]
        ids, scores = self._candidates.search(
            vectors, k, exclude, allowed, exact=exact, bonuses=bonuses
        )
        return {"candidate_ids": ids, "scores": scores, **embedded}

    def embed(self, name: str, arrays: Arrays) -> dict[str, Any]:
        """Embeds raw arrays: users by what they did until now, others by the history they bring.

        Returns `embeddings` [B, D], what is known of each query, `known_items`, a list of ids to
        leave out for each, and with a `HistoryBonus` `with_bonus`: rows of items, and their
        bonuses.
        """
        if name == SIMILAR:
            return self.item_queries(arrays["item_id"].tolist())
        if name == ALSO_TAKEN:
            return self.neighbour_queries(arrays["item_id"].tolist())
        known: dict[str, Any] = {}
        if name == "embed_user":
            users = self._users.now(arrays["user_id"].tolist())
            histories = [self._parts.inputs.history(user.history, user.times) for user in users]
            known["known_items"] = list(map(self._users.left_out, users))
            is_known = np.array([user.is_known for user in users], bool)
        else:
            histories = self._parts.inputs.histories(arrays)
            is_known = self._parts.stored.users.rows(arrays["user_id"]) > 0
        embeddings, with_bonus = self.embed_histories(arrays, histories)
        if with_bonus is not None:
            known["with_bonus"] = with_bonus
        return {
            "embeddings": embeddings,
            "is_known_user": is_known,
            "num_known_items": np.array([len(history.rows) for history in histories], np.int32),
            **known,
        }

    def embed_histories(
        self, arrays: Arrays, histories: Sequence[History]
    ) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]] | None]:
        """Embeds the queries of raw arrays with histories: [B, D] float32, and their bonuses.

        With a `HistoryBonus`, these are rows of items, and numbers, for each query; else None.
        """
        blocks = []
        # At least one call: without a query, it still gives the number of dimensions.
        for start in range(0, max(len(histories), 1), QUERIES_PER_CALL):
            block = slice(start, start + QUERIES_PER_CALL)
            part = {name: array[block] for name, array in arrays.items()}
            blocks.append(
                self._parts.query_tower(self._parts.inputs.encode(part, histories[block]))
            )
        with_bonus = None
        if self._bonus is not None:
            with_bonus = [self._bonus.of(history.rows) for history in histories]
        return np.concatenate(blocks) if len(blocks) > 1 else blocks[0], with_bonus

    def embed_items(self, item_ids: Sequence[Any], raw: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Embeds items by the arrays that `raw_columns` makes of their features.

        Returns embeddings [n, D] float32, and is_known_item [n] bool.
        """
        rows = self._parts.stored.items.rows(id_array(item_ids, self._parts.stored.items.are_text))
        encoded = encode_raw(self._parts.inputs.features[CANDIDATE_FEATURES], raw)
        inputs = {CANDIDATE_ROWS: rows}
        inputs |= {FEATURE + name: values for name, values in encoded.items()}
        # At least one call: without an item, it still gives the number of dimensions.
        blocks = [
            self._parts.candidate_tower(
                {n: x[start : start + ITEMS_PER_CALL] for n, x in inputs.items()}
            )
            for start in range(0, max(len(rows), 1), ITEMS_PER_CALL)
        ]
        return np.concatenate(blocks), rows > 0
