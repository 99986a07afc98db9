"""The settings of the search, and how widely an index is searched; without TensorFlow."""

import importlib.util
import logging
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

logger = logging.getLogger(__name__)

# Below this, exact search is as fast as any index.
SMALLEST_SCANN_CORPUS = 20_000
# Below this, looking up the nearest leaves costs more than it saves.
SMALLEST_PARTITIONED_CORPUS = 10_000


@dataclass(frozen=True)
class Exact:
    """Exact search: scores every candidate, in time proportional to their number."""

    kind: Literal["exact"] = "exact"


@dataclass(frozen=True)
class Scann:
    """A ScaNN index, tuned to find the share `recall` of the exact answer with the least work.

    The target holds for every k and any number of excluded candidates: each query is searched as
    widely as its own request needs, or exactly if that is less work. A `ValueError` if `recall` is
    not in (0, 1].
    """

    recall: float = 0.98
    kind: Literal["scann"] = "scann"

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall must be in (0, 1]. Received: {self.recall}")


@dataclass(frozen=True)
class Auto:
    """Exact search below 20,000 candidates, else `Scann` with this `recall`.

    Each refresh chooses again.
    """

    recall: float = Scann.recall
    kind: Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        Scann(self.recall)  # Checks the target, which a small corpus would never use.

    def choose(self, num_candidates: int) -> Scann | Exact:
        """Chooses by the size of a corpus, and exact search where ScaNN is not installed."""
        if num_candidates < SMALLEST_SCANN_CORPUS:
            return Exact()
        if not has_scann():
            logger.warning(
                "ScaNN is not installed here: %d candidates are searched exactly", num_candidates
            )
            return Exact()
        return Scann(self.recall)


def has_scann() -> bool:
    """Returns whether ScaNN is installed.

    It has packages for Linux alone: on x86_64, and on ARM for Python 3.12 and 3.13.
    """
    return importlib.util.find_spec("scann") is not None


Search: TypeAlias = Exact | Scann | Auto
"""How to search."""


def search_of(kind: str, recall: float = Scann.recall) -> Search:
    """Returns the `Search` of a `kind`; exact search has no recall target."""
    return Exact() if kind == "exact" else {"scann": Scann, "auto": Auto}[kind](recall)


@dataclass(frozen=True)
class Level:
    """How widely to search if k plus the number of excluded candidates is at most `depth`."""

    depth: int
    num_leaves_to_search: int
    num_reordered: int


def num_leaves_of(num_candidates: int) -> int:
    """Returns the number of partitions of an index; 1 means none.

    Example:
        >>> num_leaves_of(1_000_000)
        4000
    """
    if num_candidates < SMALLEST_PARTITIONED_CORPUS:
        return 1
    # Four times what ScaNN advises: in smaller leaves, fewer candidates have to be searched.
    return 4 * round(math.sqrt(num_candidates))
