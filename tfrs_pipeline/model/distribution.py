"""Training on several replicas: devices of one machine, or workers that TF_CONFIG names."""

import contextlib
import functools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from tfrs_pipeline.cluster import this_worker

T = TypeVar("T")


class WorkerLost(RuntimeError):
    """Another worker of the training failed or does not answer."""


def training_strategy() -> tf.distribute.Strategy:
    """Returns the strategy in scope, else one for TF_CONFIG's workers, else one for all GPUs."""
    if tf.distribute.has_strategy():
        strategy = tf.distribute.get_strategy()
        if not isinstance(
            strategy, tf.distribute.MirroredStrategy | tf.distribute.MultiWorkerMirroredStrategy
        ):
            raise ValueError(
                "Train under MirroredStrategy or MultiWorkerMirroredStrategy, or under none. "
                f"Received: {type(strategy).__name__}"
            )
        return strategy
    # A worker's own GPUs are part of its cluster's strategy, so workers come first.
    if this_worker().count > 1:
        return _worker_strategy()
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return _gpu_strategy()
    return tf.distribute.get_strategy()  # The default strategy, with one replica.


_gpu_strategy = functools.cache(tf.distribute.MirroredStrategy)


@functools.cache
def _worker_strategy() -> tf.distribute.Strategy:
    """Joins the other workers, once per process and before TensorFlow does anything else."""
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise RuntimeError(
            "TF_CONFIG names several workers, and TensorFlow was used in this process before they "
            "could be joined. Call TwoTower.fit before any other use of TensorFlow; or "
            f"unset TF_CONFIG to train alone. TensorFlow says: {error}"
        ) from error
    # TensorFlow would now treat SIGTERM as a notice and continue; this process must stop.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    return strategy


def check_shared(folder: Path | str | None) -> None:
    """Refuses (`ValueError`) several workers without a shared folder."""
    if folder is None and this_worker().count > 1:
        raise ValueError(
            "Several workers train together, as TF_CONFIG says: give fit a folder, the same for "
            "all and on a file system that all of them see, for samples and checkpoints."
        )


def on_chief(work: Callable[[], Any]) -> Any:
    """Does work on the chief while the other workers wait; all get its result, a JSON value.

    All workers must call this, in the same order. If the work fails, the others raise `WorkerLost`.
    """
    worker = this_worker()
    if worker.count == 1:
        return work()
    training_strategy()  # Workers must be joined before the work uses TensorFlow.
    if not worker.is_chief:
        answer = json.loads(_from_chief(b""))
        if "error" in answer:
            raise WorkerLost(f"The chief, worker 0, has stopped: {answer['error']}")
        return answer["result"]
    try:
        result = work()
    except BaseException as error:
        # The others would wait forever for an answer.
        with contextlib.suppress(WorkerLost):
            _from_chief(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        raise
    _from_chief(json.dumps({"result": result}).encode())
    return result


def chief_first(work: Callable[[], T]) -> T:
    """Does work on the chief, then on the other workers, which find the chief's files."""
    # A local object, such as mapped samples, cannot travel: the others make theirs from the files.
    done: list[T] = []
    on_chief(lambda: done.append(work()))
    return done[0] if done else work()


@contextlib.contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Turns failures caused by the end of another worker into `WorkerLost`."""
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
        worker = this_worker()
        if worker.count == 1:
            raise
        causes = [line for line in str(error).splitlines() if "aborted by" in line]
        reason = causes[0] if causes else str(error)[:300]
        raise WorkerLost(
            f"Another of the {worker.count} workers does not answer (this is worker "
            f"{worker.number}): it was killed, has failed, or the network is down; its own output "
            "tells more. Start all workers again with the same command: training goes on from the "
            f"last epoch that was saved. TensorFlow says: {reason}"
        ) from error


def _from_chief(message: bytes) -> bytes:
    """Sends bytes from the chief to all workers; the others' bytes are ignored."""
    # An all-reduce needs equal shapes, so the length goes first. Only the chief adds anything.
    (length,) = _sum_over_workers(np.array([len(message)]))
    codes = np.zeros(length, np.int64)
    if message:
        codes[:] = np.frombuffer(message, np.uint8)
    return bytes(_sum_over_workers(codes).astype(np.uint8))


def _sum_over_workers(numbers: np.ndarray) -> np.ndarray:
    """Sums [n] int64 over the workers, each counted once."""
    strategy = training_strategy()
    with naming_lost_workers():
        summed = _summing(strategy)(tf.constant(numbers, tf.int64))
        return np.asarray(strategy.experimental_local_results(summed)[0])


@functools.cache
def _summing(strategy: tf.distribute.Strategy) -> Callable[[tf.Tensor], Any]:
    num_devices = strategy.num_replicas_in_sync // this_worker().count

    def sum_on_replica(numbers: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        is_first = tf.equal(context.replica_id_in_sync_group % num_devices, 0)
        counted = tf.where(is_first, numbers, tf.zeros_like(numbers))
        return context.all_reduce(tf.distribute.ReduceOp.SUM, counted)

    return tf.function(
        lambda numbers: strategy.run(sum_on_replica, args=(numbers,)),
        input_signature=[tf.TensorSpec([None], tf.int64)],
    )
