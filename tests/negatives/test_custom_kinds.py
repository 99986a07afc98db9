"""Kinds of negatives defined outside the package, easy and hard, against slow loops."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import tfrs_pipeline as tp
from tests import small_batches as small
from tests.model.conftest import NUM_ITEMS, eagerly, make_log, tiny
from tfrs_pipeline.negatives.samplers import SETTING_KINDS, Pool
from tfrs_pipeline.samples.store import RowLists

F, NUM, STEPS = 0.3, 3, 200


@dataclasses.dataclass(frozen=True, eq=False)
class SameCategory:
    """Other items of the positive's category; those of category 3 have none."""

    categories: np.ndarray
    share: float = F
    num: int = NUM

    def pools(self, samples: tp.Samples) -> Mapping[str, Pool]:
        lists = [np.flatnonzero(self.categories == c) for c in range(3)] + [np.zeros(0, int)]
        lists[0] = lists[0][1:]  # Row 0 is the unknown item.
        return {"category": (lists, self.categories[samples.candidate_rows])}


@dataclasses.dataclass(frozen=True)
class Listed:
    """Hard negatives of each user from a file, here its even and its odd items in two pools."""

    by_user: tuple[tuple[int, ...], ...]
    share: float = F
    num: int = NUM

    def pools(self, samples: tp.Samples) -> Mapping[str, Pool]:
        return {
            name: ([[x for x in rows if x % 2 == odd] for rows in self.by_user], samples.query_rows)
            for odd, name in enumerate(("even", "odd"))
        }


@dataclasses.dataclass(frozen=True)
class Returning:
    """Hard negatives that return what the test says."""

    answer: Any
    share: float = F
    num: int = NUM

    def pools(self, samples: tp.Samples) -> Any:
        return self.answer


@dataclasses.dataclass(frozen=True)
class Newest:
    """An easy kind: the items of the last rows, each with the same chance."""

    num: int

    def draw(self, frame: tp.SamplingFrame, positive_rows: Any, seed: Any) -> tf.Tensor:
        last = frame.num_candidates
        return tf.random.stateless_uniform([self.num], seed, last - 4, last + 1, tf.int32)

    def expected_count(self, frame: tp.SamplingFrame) -> np.ndarray:
        rows = np.arange(frame.num_candidates + 1)
        return np.where(rows > frame.num_candidates - 5, self.num / 5, 0.0)


FILE = Listed(tuple(tuple(range(1 + user % 9, 40, 1 + user % 7)) for user in range(21)))


# What the guide's two kinds read: items without a row or a category, and ids that the log lacks.
USERS, ITEMS = [f"user {n}" for n in range(9)], [f"item {n}" for n in range(24)]
CATEGORY = {item: f"c{n % 3}" for n, item in enumerate(ITEMS) if n > 1} | {"item 99": "c0"}
LISTED = {user: [ITEMS[(5 * n + i) % 24] for i in range(n % 5)] for n, user in enumerate(USERS)}


def kinds_of_the_guide() -> dict[str, Any]:
    """Runs the classes of the page as they stand there."""
    page = (Path(__file__).parents[2] / "docs" / "guides" / "negatives.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (code,) = (block for block in blocks if "class SameCategory" in block)
    names: dict[str, Any] = {}
    exec(code.partition("\nvideos = ")[0], names)
    items = pd.DataFrame({"item_id": [*CATEGORY, "item 1"], "category": [*CATEGORY.values(), None]})
    pairs = [(user, item) for user, items in LISTED.items() for item in items]
    pairs += [("user 0", "item 98"), ("user 77", "item 3")]
    listed = pd.DataFrame(pairs, columns=["user_id", "item_id"])
    return {"category": names["SameCategory"](items), "listed": names["Listed"](listed)}


@pytest.mark.parametrize(("name", "order"), [("category", "sequences"), ("listed", "single")])
def test_the_guides_kinds_are_drawn_masked_and_corrected(
    name: str, order: str, tmp_path: Path
) -> None:
    """By ids, in plain Python: what each positive may draw, how often, and with which log_q."""
    rng = np.random.default_rng(0)
    events = [(user, ITEMS[n], "clicked") for user in USERS for n in rng.permutation(24)[:5]]
    events += [(user, ITEMS[n], "exposed") for user in USERS for n in rng.permutation(24)[:4]]
    table = pd.DataFrame(events, columns=["user_id", "item_id", "stage"])
    data = tp.TrainingSet.build(tp.Log.from_table(table), tmp_path, seed=0)
    later = ITEMS[7]
    is_later = np.isin(["", *data.corpus.candidate_ids.values], [later])
    samples = dataclasses.replace(data.samples, is_later=is_later)
    sizes: dict[str, Any] = {"batch_size": 15, "history_length": 4, "seed": 0}
    kind, examples = kinds_of_the_guide()[name], small.ORDERS[order](samples, **sizes)
    batches = tp.HybridBatches(samples, examples, [tp.Uniform(9)], hard=kind, seed=0)
    seen: dict[str, set[str]] = {user: set() for user in USERS}
    for user, item, _ in events:
        seen[user].add(item)
    items = set.union(*seen.values())  # Others are not in the log.
    assert later in items
    assert len(items) < len(ITEMS)
    drawn = Counter[tuple[str, str, str]]()
    visits = Counter[tuple[str, str]]()
    for batch in small.batch_list(batches, STEPS):
        for i, row in enumerate(batch.candidate_row):
            item = data.corpus.candidate_ids.take(row)
            user = data.corpus.query_ids.take(batch.query_row[i])
            if name == "category":
                pool = {x for x, c in CATEGORY.items() if c == CATEGORY.get(item)}
            else:
                pool = {*LISTED[user]}
            pool = (pool & items) - {*seen[user], later, item}
            visits[user, item] += 1
            assert batch.hard.is_counted[i].tolist() == [bool(pool)] * kind.num
            assert batch.hard.share[i] == pytest.approx(kind.share if pool else 0)
            easy = np.log(9 / len(items) / (1 - (kind.share if pool else 0)))
            np.testing.assert_allclose(batch.log_q[i], easy, rtol=1e-5)
            if pool:
                # One of the items came later: it is not a possible negative.
                log_q = np.log(kind.num / ((len(items) - 1) * kind.share))
                np.testing.assert_allclose(batch.hard.log_q[i], log_q, rtol=1e-5)
                found = data.corpus.candidate_ids.take(batch.hard.candidate_row[i]).tolist()
                assert {*found} <= pool
                drawn.update((user, item, x) for x in found)
                drawn.update({(user, item, x): 0 for x in pool})
    assert len(drawn) > 30
    sizes_of = Counter((user, item) for user, item, _ in drawn)
    for (user, item, _), count in drawn.items():
        rate = kind.num / sizes_of[user, item]
        mean, spread = visits[user, item] * rate, (visits[user, item] * (rate % 1) * (1 - rate % 1))
        assert abs(count - mean) <= 5 * spread**0.5 + 1e-9


def test_exposed_items_are_hard_negatives_only_if_allowed() -> None:
    shown = [small.SAMPLES.exposed[user].tolist() for user in range(21)]

    @dataclasses.dataclass
    class Shown:
        allow_exposed: bool
        share: float = F
        num: int = NUM
        name: str = "exposed"

        def pools(self, samples: tp.Samples) -> Mapping[str, Pool]:
            return {self.name: (shown, samples.query_rows)}

    for kind, is_allowed in (
        (Shown(True), True),
        (Shown(False), False),
        (Shown(True, name="x"), False),
    ):
        batches = small.make_batches(hard=kind)
        counted = [batch.hard.is_counted.any() for batch in small.batch_list(batches, 4)]
        assert counted == [is_allowed] * 4


def test_packed_lists_are_cleaned_like_any_others() -> None:
    is_later = np.arange(small.NUM_CANDIDATES + 1) > 36
    samples = dataclasses.replace(small.SAMPLES, is_later=is_later)
    lists = RowLists.from_lists([np.flatnonzero(is_later)] * len(samples))
    batches = small.make_batches("single", samples, hard=Returning({"new": (lists, None)}))
    assert not any(batch.hard.is_counted.any() for batch in small.batch_list(batches, 4))


def test_a_model_trains_with_own_hard_negatives_and_is_compared(tmp_path: Path) -> None:
    log = make_log()
    split = log.split("last_n", validation=1, test=1)
    genre = np.append(3, np.arange(NUM_ITEMS) % 3)  # By row: the unknown item has none.
    hard = SameCategory(genre)
    training: dict[str, Any] = {"training": {"max_epochs": 1}}
    own_kinds: dict[str, Any] = {"hard": hard, "negatives": [*tiny().negatives, Newest(6)]}
    plans = {"own": tiny(**own_kinds, **training), "mixed": tiny(**training)}
    assert plans["own"].settings == plans["mixed"].settings
    assert plans["own"].losers is None
    with eagerly():
        fitted = plans["own"].fit(split.train, split.validation)
        compared = tp.compare(*split, plans=plans, folder=tmp_path, cutoffs=(5, 20))
    assert "effective mean hard share 0.3000" in fitted.notes
    assert set(compared.trainings) == {"own", "mixed"}
    losses = [compared.trainings[name][0].history["loss"][0] for name in plans]
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match=r"own_hard: 'SameCategory', now None"):
        tp.compare(*split, plans={"own": tiny(**training)}, folder=tmp_path, cutoffs=(5,))


def test_wrong_kinds_are_refused() -> None:
    wrong: tuple[tuple[Any, str], ...] = (
        (SameCategory, "is a class: give an object of it"),
        (tp.Uniform(3), "hard: got Uniform"),
        (object(), "it has no pools. A kind here has pools, share, num"),
    )
    for kind, message in wrong:
        with pytest.raises(tp.ConfigError, match=message):
            tp.TwoTower(hard=kind)
    with pytest.raises(tp.ConfigError, match="hard: got SameCategory"):
        tp.TwoTowerSettings(hard=SameCategory(np.arange(4)))

    def made(**changes: Any) -> None:
        small.make_batches(hard=dataclasses.replace(FILE, **changes))

    with pytest.raises(ValueError, match=r"share of hard negatives is in \(0, 1\). Received: 1"):
        made(share=1)
    with pytest.raises(ValueError, match="num must be a whole number, 1 or more"):
        made(num=0)
    with pytest.raises(ValueError, match=r"'odd' need lists of candidate rows in 1 .. 40"):
        made(by_user=((-1, 2), *FILE.by_user[1:]))
    with pytest.raises(ValueError, match=r"'odd' need lists of candidate rows in 1 .. 40"):
        made(by_user=((41, 2), *FILE.by_user[1:]))
    with pytest.raises(ValueError, match=r"'even' .* the number of one of 9 lists"):
        made(by_user=FILE.by_user[:9])
    rows = small.SAMPLES.query_rows
    for numbers in (rows[:9], -rows):
        with pytest.raises(ValueError, match=r"for each of 150 samples the number of one of 21"):
            small.make_batches(hard=Returning({"x": ([[1]] * 21, numbers)}))
    with pytest.raises(tp.DataError, match="none of 150 positives has a hard negative"):
        made(by_user=((),) * 21)


def test_a_kind_becomes_a_setting_in_one_file() -> None:
    """The unions beside the kinds are all that settings, files and flags know them by."""
    names = {kind().kind for kind in SETTING_KINDS}
    assert names == {"in_batch", "uniform", "popularity", "funnel"}
    root = Path(tp.__file__).parent
    naming = [path for path in root.rglob("*.py") if "InBatch | Uniform" in path.read_text()]
    assert naming == [root / "negatives" / "samplers.py"]
