"""This process's place among the workers of a training, read from TF_CONFIG."""

import json
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Worker:
    """One of the `count` processes that train a model together.

    Number 0 is the chief: it alone writes, validates and exports.
    """

    number: int = 0
    count: int = 1

    @property
    def is_chief(self) -> bool:
        """Whether this is the worker that writes."""
        return self.number == 0


def this_worker() -> Worker:
    """Reads TF_CONFIG; without one, or with a cluster of one, the process works alone."""
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return Worker()
    try:
        config = json.loads(text)
        cluster = config.get("cluster", {})
        addresses = [
            (kind, i) for kind in ("chief", "worker") for i in range(len(cluster.get(kind, ())))
        ]
        if not cluster:
            return Worker()
        task = config["task"]["type"], int(config["task"]["index"])
        if cluster.keys() - {"chief", "worker"} or task not in addresses:
            raise KeyError(task)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            "TF_CONFIG must name the workers of the training and which of them this process is, as "
            '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", '
            f'"index": 0}}}}. Received: {text[:500]}. Correct it, or unset it to train alone.'
        ) from error
    return Worker(addresses.index(task), len(addresses))
