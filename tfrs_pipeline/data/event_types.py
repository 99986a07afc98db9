"""Types of events, such as view, click and purchase: suggested weights."""

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
