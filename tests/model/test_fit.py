"""Training that stops and resumes, keeps its best epoch, and says when something is wrong."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.damage import DAMAGES, damage
from tests.model.conftest import assert_same, tiny, weights_of
from tests.small_log import Stopped
from tests.tracing import tracing_once
from tfrs_pipeline.model import fit
from tfrs_pipeline.model.checkpoints import TrainingResult
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.fit import describe_epoch, train
from tfrs_pipeline.model.network import TwoTowerNetwork

# 120 positives in batches of 32: 4 steps an epoch.
NUM_EPOCHS, STEPS = 5, 4
# With every kind of dropout, which a resumed run must repeat.
MODEL = {"use_user_id": True, "feature_dropout": 0.2}
SCHEDULE = {"learning_rate": 0.02, "warmup_steps": 7, "decay": "cosine", "max_epochs": NUM_EPOCHS}
RISING = [0.1, 0.2, 0.3, 0.4, 0.5]


class StopAt(tf.keras.callbacks.Callback):
    """Stops in the middle of an epoch, after this many batches of this part of the run."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self._left = batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._left -= 1
        if not self._left:
            raise Stopped


Run = Callable[..., tuple[TwoTowerNetwork, TrainingResult]]


@pytest.fixture(scope="module")
def run(data: TrainingSet) -> Iterator[Run]:
    """Returns a function that trains one network from its start; repeating it gives the same."""

    def run_(
        metrics: Any = None, *, training: Any = MappingProxyType({}), start: Any = None,
        stop_after: int | None = None, **options: Any,
    ) -> tuple[TwoTowerNetwork, TrainingResult]:  # fmt: skip
        model = tiny(**MODEL, training={**SCHEDULE, **training})
        network = model.build(data.corpus)
        if start is not None:
            network.set_weights(start)
        done = list(options.pop("done", ()))
        if metrics is not None:
            options["validate"] = lambda: {"ndcg@5": metrics[len(done)], "recall@5": 0.5}
        on_epoch = options.pop("on_epoch", lambda so_far: None)

        def count(so_far: TrainingResult) -> None:
            done.append(so_far.num_epochs)
            on_epoch(so_far)
            if so_far.num_epochs == stop_after:
                raise Stopped

        batches = model.batches(data.samples)
        result = train(network, batches, model.training, on_epoch=count, **options)
        return network, result

    with tracing_once():
        yield run_


def state_of(network: TwoTowerNetwork) -> list[np.ndarray]:
    """Returns the weights and the optimizer's state: another training may start from both."""
    return [*weights_of(network), *(x.numpy() for x in network.optimizer.variables)]


@dataclass(frozen=True)
class Whole:
    result: TrainingResult
    states: list[list[np.ndarray]]


@pytest.fixture(scope="module")
def whole(run: Run) -> Whole:
    states: list[list[np.ndarray]] = []
    each: Any = tf.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: states.append(state_of(each.model))
    )
    _, result = run(RISING, callbacks=[each])
    return Whole(result, states)


def test_a_run_stopped_anywhere_goes_on_bit_for_bit(run: Run, whole: Whole, tmp_path: Path) -> None:
    """The run stops within epoch 2, then after epoch 3 with a half-written checkpoint."""
    with pytest.raises(Stopped):
        run(RISING, callbacks=[StopAt(STEPS + 2)], folder=tmp_path)
    assert [path.name for path in tmp_path.glob("*.json")] == ["epoch-1.json"]
    with pytest.raises(Stopped):
        run(RISING, done=[1], stop_after=3, folder=tmp_path)
    # What TensorFlow leaves if it is killed while writing a checkpoint: of epoch 4, and of epoch 2.
    for number in (2, 4):
        (tmp_path / f"epoch-{number}_temp").mkdir()
        (tmp_path / f"epoch-{number}_temp" / "part-00000-of-00001.data").write_text("half")
    told: list[str] = []

    def tell(so_far: TrainingResult) -> None:
        told.append(describe_epoch(so_far, "ndcg@5", len(RISING)))

    resumed, result = run(RISING, done=[1, 2, 3], on_epoch=tell, folder=tmp_path)
    assert result.resumed_after == 3
    loss = result.history["loss"][3]
    assert told[0].startswith(f"loss {loss:.3f}, validation ndcg@5 0.4000, best 0.4000 (epoch 4)")
    assert [line.endswith("resumed after epoch 3") for line in told] == [True, False]
    assert_same(state_of(resumed), whole.states[-1])
    assert set(whole.result.history) == {"loss", "val_ndcg@5", "val_recall@5"}
    for name, values in whole.result.history.items():
        assert result.history[name] == values
    assert result.best_epoch == NUM_EPOCHS
    assert {path.name.split(".")[0] for path in tmp_path.glob("epoch-?.*")} == {"epoch-5"}
    # A finished run does not train again.
    again, kept = run(RISING, folder=tmp_path)
    assert_same(state_of(again), whole.states[-1])
    assert kept.history == result.history
    assert 0 < kept.seconds <= result.seconds


def test_a_second_training_goes_the_way_of_the_first(run: Run, whole: Whole) -> None:
    """Decay spans the epochs of the settings, so three epochs equal the first three of five."""
    network, result = run(max_epochs=3)
    assert_same(state_of(network), whole.states[2])
    assert (result.best_epoch, result.history["loss"]) == (3, whole.result.history["loss"][:3])


def test_the_best_epoch_is_kept_and_patience_ends_it(
    run: Run, whole: Whole, tmp_path: Path
) -> None:
    metrics, options = [0.1, 0.5, 0.3, 0.5, 0.9], {"training": {"patience": 2}, "folder": tmp_path}
    seen: list[float] = []
    for _ in range(2):
        network, result = run(
            metrics, on_epoch=lambda x: seen.append(x.history["val_ndcg@5"][-1]), **options
        )
        # The fourth is not better than the second.
        assert result.history["val_ndcg@5"] == seen == metrics[:4]
        assert result.best_epoch == 2
        assert_same(state_of(network), whole.states[1])


def test_a_damaged_epoch_is_trained_again(run: Run, whole: Whole, tmp_path: Path) -> None:
    """Training resumes from the epoch before, if that is undamaged, or restarts: same result."""
    metrics, kept = [0.3, 0.1, 0.5], tmp_path / "kept"
    with pytest.raises(Stopped):
        run(metrics, folder=kept, stop_after=2)
    # The last epoch, and the best one.
    assert {path.name.split(".")[0] for path in kept.iterdir()} == {"epoch-1", "epoch-2"}
    names = sorted(path.name for path in kept.iterdir())
    assert len(names) == 6
    for name, how in zip(names, 2 * DAMAGES, strict=True):
        folder = tmp_path / f"{name} {how}"
        shutil.copytree(kept, folder)
        damage(folder / name, how)
        first = 2 if name.startswith("epoch-2") else 1
        # `done` numbers the epochs, so that each one left to train takes its own metric.
        resumed, result = run(metrics, folder=folder, done=range(1, first), max_epochs=3)
        assert_same(state_of(resumed), whole.states[2])
        assert result.history["val_ndcg@5"] == metrics


def test_the_time_before_the_first_step_is_over_does_not_count(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed training starts and traces again, and that time does not count either."""
    now = [1]
    monkeypatch.setattr(fit, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def wait(seconds: int) -> None:
        now[0] += seconds

    def slow_start(slow_epoch: int) -> tf.keras.callbacks.Callback:
        """Returns a callback that takes a second a step, and a hundred before one epoch."""
        return tf.keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: wait(100 * (epoch == slow_epoch)),
            on_train_batch_end=lambda batch, logs: wait(1),
        )

    with pytest.raises(Stopped):
        run(folder=tmp_path, stop_after=1, callbacks=[slow_start(0)])
    _, result = run(folder=tmp_path, max_epochs=2, callbacks=[slow_start(1)])
    assert result.seconds == 2 * (STEPS - 1)
    # Later time does count: here, before an epoch that is not the first of this part.
    _, result = run(folder=tmp_path, max_epochs=4, callbacks=[slow_start(3)])
    assert result.seconds == 2 * (STEPS - 1) + (2 * STEPS - 1) + 100


def test_keras_does_not_fetch_each_steps_loss(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback does not read the loss, and fetching it would wait for the step."""
    given: list[tf.keras.callbacks.Callback] = []

    def of_training(*data: Any, callbacks: list[Any], **options: Any) -> None:
        given.extend(callbacks)
        raise Stopped

    monkeypatch.setattr(TwoTowerNetwork, "fit", of_training)
    with pytest.raises(Stopped):
        run(tell=lambda done, line: None)
    assert len(given) == 1
    assert tf.keras.callbacks.CallbackList(given)._batch_hooks_support_tf_logs


def test_what_goes_wrong_is_said(run: Run, tmp_path: Path) -> None:
    network, _ = run(max_epochs=0)
    broken = [np.full_like(w, np.nan) if w.dtype == np.float32 else w for w in weights_of(network)]
    with pytest.raises(ValueError, match=r"loss is nan after epoch 1.*training.learning_rate"):
        run(start=broken, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"Cannot monitor 'ndcg@9'.*evaluation.cutoffs"):
        run(RISING, training={"monitor": "ndcg@9"})
    with pytest.raises(ValueError, match="warm-up of 20 steps leaves nothing of 20 steps"):
        run(training={"warmup_steps": 20})
