"""Baselines that fail in every way: by an exception, a signal, an exit, or for want of memory."""

import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfrs_pipeline.evaluation.baselines import FittedPopularity, MostPopular

MORE_THAN_LEFT = 1 << 30  # Bytes.


@dataclass(frozen=True)
class Raises:
    kind: type[Exception]

    def fit(self, train: Any) -> FittedPopularity:
        raise self.kind("three is too many")


@dataclass(frozen=True)
class Killed:
    """Its process is ended by a signal, as native code that crashes ends it; or later, in use."""

    number: int
    is_fitted: bool = False

    def fit(self, train: Any) -> "Killed":
        return Killed(self.number, True) if self.is_fitted else self.retrieve()

    def retrieve(self, *arguments: Any) -> Any:
        print("what a library prints")  # It must not get between the answers.
        os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class Exits:
    def fit(self, train: Any) -> FittedPopularity:
        os._exit(3)


@dataclass(frozen=True)
class Greedy:
    def fit(self, train: Any) -> FittedPopularity:
        np.ones(MORE_THAN_LEFT // 8)
        return MostPopular().fit(train)


@dataclass(frozen=True)
class Light:
    """Popularity; refuses to be fitted beside TensorFlow, which takes seconds and memory."""

    def fit(self, train: Any) -> FittedPopularity:
        assert "tensorflow" not in sys.modules
        print("what a library prints")
        return MostPopular().fit(train)


FAILING: dict[str, Any] = {
    "raises": Raises(RuntimeError),
    "refuses": Raises(ValueError),
    "crashes": Killed(signal.SIGSEGV),
    "crashes_in_use": Killed(signal.SIGSEGV, is_fitted=True),
    "killed": Killed(signal.SIGKILL),
    "exits": Exits(),
    "greedy": Greedy(),
}
