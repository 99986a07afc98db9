"""Types of events, such as view, click and purchase: usual names, and suggested weights."""

import re
from collections.abc import Collection, Iterable

NAMES = (
    *("event", "event_type", "event_name", "action", "action_type", "behavior", "behavior_type"),
    *("behaviour", "behaviour_type", "interaction", "interaction_type", "activity"),
)
"""Usual names of a column of event types."""

# Parts of usual names, and the suggested weight; the first part that fits counts.
_USUAL = {
    **dict.fromkeys(("purchase", "buy", "order", "transaction"), "5"),
    **dict.fromkeys(("remove", "unlike", "dislike"), ""),
    **dict.fromkeys(("cart", "basket", "fav", "wish", "like"), "3"),
    **dict.fromkeys(("click", "play", "open"), "1"),
    **dict.fromkeys(("view", "impression", "show", "expos", "pv"), "exposed"),
}

# Words that name types of events, and hardly anything else.
_WORDS = re.compile(
    r"(?<![a-z])(view|click|impression|purchase|buy|bought|transaction|order|cart|"
    r"add.?to.?cart|wishlist)(s|ed)?(?![a-z])"
)


def are_types(values: Collection[str]) -> bool:
    """Returns whether two values or more, and at least half of them, are named like events."""
    num_named = sum(_WORDS.search(value.lower()) is not None for value in values)
    return num_named >= 2 and 2 * num_named >= len(values)


def suggested(types: Iterable[str]) -> str:
    """Suggests weights for types by their names; a view is an exposure if there are clicks."""
    meanings = {
        name: next((of for part, of in _USUAL.items() if part in name.lower()), "")
        for name in types
    }
    if "1" not in meanings.values():
        meanings = {name: of.replace("exposed", "1") for name, of in meanings.items()}
    strongest_first = filter(None, dict.fromkeys(_USUAL.values()))
    known = [f"{x}={of}" for of in strongest_first for x in meanings if meanings[x] == of]
    return " ".join(known) or "purchase=5 click=1"
