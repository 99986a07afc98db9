"""Says why an item is in an answer of a model, or why it is not."""

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from tfrs_pipeline.data.ids import check_length
from tfrs_pipeline.messages import check_integer, counted, plain
from tfrs_pipeline.retrieval import Query, check_ids
from tfrs_pipeline.search.candidates import Standing
from tfrs_pipeline.search.queries import Arrays, History

if TYPE_CHECKING:
    from tfrs_pipeline.answers.retriever import LoadedRetriever

Verdict: TypeAlias = Literal[
    "unknown", "removed", "unlisted", "filtered", "excluded", "outranked", "missed", "found"
]
_RULES = {
    "exclude": "the query asks for that",
    "disliked": "the user disliked it",
    "clicked": "the user clicked it",
    "seen": "the user has seen it",
}
# So many of a history's latest items are left out, one after the other.
MAX_LEFT_OUT = 50


@dataclass(frozen=True)
class Explanation:
    """Why an item is in an answer, or why not. Prints as a few lines.

    Attributes:
        item_id: The item.
        verdict: The first of these that holds: the item is `unknown` to the model; it was `removed`
            in service; it is `unlisted`: the training had it, and the item table did not; the
            filter does not let it through (`filtered`); it is `excluded`; k others score higher
            (`outranked`); the index `missed` it; or it was `found`.
        rule: What excludes it: "exclude", "disliked", "clicked" or "seen"; "" if nothing does.
        k: Number of items in the answer.
        rank: Its rank among the items that the answer may hold, itself included, from 1. This and
            what follows is None or empty for an item that is no candidate.
        score: Its score, with its bonus.
        bonus: What the history adds to its score beside the tower (see `HistoryBonus`).
        gap: Its score minus the k-th best of the others; None if there are fewer than k.
        history: The latest known items of the history, most recent first, and what each adds to the
            score: the score minus that for the history without the item.
    """

    item_id: Any
    verdict: Verdict
    rule: str = ""
    k: int = 0
    rank: int | None = None
    score: float | None = None
    bonus: float = 0.0
    gap: float | None = None
    history: tuple[tuple[Any, float], ...] = ()

    def __str__(self) -> str:
        item, lines = f"item {plain(self.item_id)}", []
        others = f"the {self.k} best of the others"
        reached = "" if self.gap is None else f", {self.gap:+.4f} from the last of {others}"
        lines.append(
            {
                "unknown": f"{item} is unknown to the model: neither its training, nor its items",
                "removed": f"{item} was removed in service",
                "unlisted": f"{item} is read in histories, but the item table lacks it",
                "filtered": f"the filter does not let {item} through",
                "excluded": f"{item} is excluded: {_RULES.get(self.rule)}",
                "outranked": f"{item} is outranked",
                "missed": f"the index missed {item}: an exact search finds it",
                "found": f"{item} is in the answer",
            }[self.verdict]
        )
        if self.rank is not None:
            bonus = f", {self.bonus:+.4f} of it by the history's own items and their neighbours"
            lines.append(f"rank {self.rank}, score {self.score:.4f}{reached}")
            lines[-1] += bonus if self.bonus else ""
        most = sorted(self.history, key=lambda entry: -abs(entry[1]))[:5]
        if most:
            shares = ", ".join(f"{plain(id_)} {change:+.4f}" for id_, change in most)
            lines.append(f"of {counted(len(self.history), 'item')} of the history: {shares}")
        return "\n".join(lines)


def explain(
    model: "LoadedRetriever",
    item_id: Any,
    *,
    user_id: Any = None,
    query: Query | None = None,
    request: Mapping[str, Any] | None = None,
    k: int = 10,
    exclude: Collection[Any] = (),
    allowed: Collection[str] = (),
) -> Explanation:
    """Explains the place of an item in the answer to a user, or to a query with its history.

    Give what the answer was asked with. Scores every candidate once, and embeds the query once more
    for each of the latest 50 items of the history.

    Args:
        model: What `tp.load` returns.
        item_id: The item.
        user_id: A user, answered as by `retrieve_user`.
        query: In place of a user, a query, answered as by `retrieve`; see `Query`.
        request: Request features of the user's request; a query brings its own.
        k: Number of items in the answer.
        exclude: Ids that the answer leaves out besides.
        allowed: Values of the item filter.

    Raises:
        ValueError: If both or none of `user_id` and `query` are given; as `retrieve_user` raises.

    Example:
        >>> print(explain(tp.load("saved_models/films"), 50, user_id=42))  # doctest: +SKIP
        item 50 is excluded: the user clicked it
        rank 3, score 0.8127, +0.0311 from the last of the 10 best of the others
        of 50 items of the history: 181 +0.0124, 172 +0.0101, 100 +0.0049, 7 +0.0042, 1 -0.0021
    """
    if (user_id is None) == (query is None):
        raise ValueError("Give `user_id`, or `query` with a history, and not both.")
    check_integer(1, k=k)
    check_ids([[item_id]], are_text=model.stored.items.are_text)
    check_length(str(item_id))
    asked, filters = [exclude], [list(allowed)] if allowed else None
    if query is None:
        requests = None if request is None else [request]
        found = model.retrieve_user([user_id], k, asked, allowed=filters, requests=requests)[0]
    else:
        found = model.retrieve([query], k, asked, allowed=filters)[0]
    if not model.candidates.has([item_id])[0]:
        return Explanation(item_id, _why_absent(model, item_id))
    arrays = model.inputs.read([query or {"user_id": user_id, "request": request}])
    rules: dict[str, Collection[Any]] = {"exclude": exclude}
    if query is None:
        (user,) = model.users.now([user_id])
        history, known = model.inputs.history(user.history, user.times), model.users.left_out(user)
        # By the rule "seen", some of these were clicked.
        clicked = {*known} & {*user.history}
        rules |= {"disliked": user.disliked, "clicked": clicked, model.manifest["exclude"]: known}
    else:
        (history,) = model.inputs.histories(arrays)
    left_out = [id_ for ids in rules.values() for id_ in ids]
    standing, bonus, changes = _standings(model, arrays, history, item_id, k, left_out, allowed)
    rule = next((name for name, ids in rules.items() if item_id in ids), "")
    verdict: Verdict = "found"
    if not standing.is_allowed:
        verdict = "filtered"
    elif rule:
        verdict = "excluded"
    elif item_id not in found[0].tolist():
        verdict = "missed" if standing.rank <= k else "outranked"
    return Explanation(
        item_id,
        verdict,
        rule,
        k,
        standing.rank,
        standing.score,
        bonus,
        None if standing.last == -np.inf else standing.score - standing.last,
        changes,
    )


def _why_absent(model: "LoadedRetriever", item_id: Any) -> Verdict:
    with contextlib.suppress(ValueError):  # A model without live items.
        if model.live.was_removed(item_id):
            return "removed"
    return "unlisted" if model.stored.has_items([item_id])[0] else "unknown"


def _standings(
    model: "LoadedRetriever",
    arrays: Arrays,
    history: History,
    item_id: Any,
    k: int,
    left_out: Collection[Any],
    allowed: Collection[str],
) -> tuple[Standing, float, tuple[tuple[Any, float], ...]]:
    """Returns the item's standing, its bonus, and what each item of the history adds."""
    latest = list(dict.fromkeys(history.rows.tolist()))[:MAX_LEFT_OUT]
    histories = [history]
    for row in latest:
        is_kept, times = history.rows != row, history.times
        histories.append(History(history.rows[is_kept], None if times is None else times[is_kept]))
    every = {name: np.repeat(array, len(histories), axis=0) for name, array in arrays.items()}
    vectors, bonuses = model.engine.embed_histories(every, histories)
    items = model.stored.items
    (row,) = items.rows([item_id])
    own = np.zeros(len(histories))
    if bonuses is not None and row:
        own = np.array([numbers[: len(rows)][rows == row].sum() for rows, numbers in bonuses])
    with_bonus = None if bonuses is None else (items.take(bonuses[0][0]), bonuses[0][1])
    standing = model.candidates.standing(vectors[0], item_id, k, left_out, allowed, with_bonus)
    scores = vectors @ model.candidates.vectors_of([item_id])[0] + own
    changes = zip(items.take(np.array(latest, int)).tolist(), scores[0] - scores[1:], strict=True)
    return standing, float(own[0]), tuple((id_, float(change)) for id_, change in changes)
