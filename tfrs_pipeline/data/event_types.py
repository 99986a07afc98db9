"""Types of events, such as view, click and purchase: how they look, and suggested weights."""

import re
from collections.abc import Iterable

# Parts of usual names, and the suggested weight; the first part that fits counts.
_USUAL = {
    **dict.fromkeys(("purchase", "buy", "order", "transaction"), "5"),
    **dict.fromkeys(("remove", "unlike"), ""),
    **dict.fromkeys(("dislike", "report", "not_interest", "notinterest"), "disliked"),
    **dict.fromkeys(("cart", "basket", "fav", "wish", "like"), "3"),
    **dict.fromkeys(("click", "play", "open"), "1"),
    **dict.fromkeys(("view", "impression", "show", "expos", "pv"), "exposed"),
}

# Whole values, without what is not a letter. Either alone may be something else, such as a page.
_LOOKS = re.compile(
    r"(product|item|page|detail)?(view|click|impression)(s|ed)?(product|item|page)?"
)
_BUYS = re.compile(
    r"(product|item)?(purchase[ds]?|buy|bought|transactions?|"
    r"(add|remove)(e?d)?(to|from)?(cart|basket))"
)


def are_types(values: Iterable[str]) -> bool:
    """Returns whether some value is a view or a click, and another one a purchase or the like."""
    plain = [re.sub("[^a-z]", "", value.lower()) for value in values]
    return all(any(map(words.fullmatch, plain)) for words in (_LOOKS, _BUYS))


def suggested(types: Iterable[str]) -> str:
    """Suggests weights for types by their names; a view is an exposure if there are clicks.

    Example:
        >>> suggested(["view", "click", "purchase"])
        'purchase=5 click=1 view=exposed'
    """
    meanings = {
        name: next((weight for part, weight in _USUAL.items() if part in name.lower()), "")
        for name in types
    }
    # In a log without clicks, a view is the weakest sign of interest that there is.
    if "1" not in meanings.values():
        meanings = {name: weight.replace("exposed", "1") for name, weight in meanings.items()}
    known = [
        f"{name}={weight}"
        for weight in ("5", "3", "1", "exposed", "disliked")
        for name in meanings
        if meanings[name] == weight
    ]
    return " ".join(known) or "purchase=5 click=1"
