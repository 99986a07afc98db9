"""A small untrained model behind the serving modules, whose answers can be computed by hand."""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pytest

from tests.service.running_server import Running
from tfrs_pipeline import Exportable, LoadedRetriever, TwoTower, TwoTowerNetwork, load
from tfrs_pipeline.answers import signatures, version
from tfrs_pipeline.answers.publish import versions_of
from tfrs_pipeline.answers.signatures import RETRIEVALS
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.durable import locked
from tfrs_pipeline.exports import export, saved_model
from tfrs_pipeline.exports.encoder import Encoder
from tfrs_pipeline.exports.graph_index import ExactIndex, ScannIndex
from tfrs_pipeline.exports.saved_model import RetrievalModule
from tfrs_pipeline.features.categorical import Categorical, MultiCategorical
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.fitted_model import query_encoder
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search.searcher import Searcher
from tfrs_pipeline.search.settings import Exact, Level, Scann
from tfrs_pipeline.search.topk import ExactRetriever

NUM_QUERIES, NUM_CANDIDATES = 6, 60
EVIL = "<script>alert(1)</script> & \"quoted\" 'é'"
# The index to test with each type of ids; testing every pair would show no more.
KIND_OF = {"int": "scann", "str": "exact"}
# Takes the type of ids, "int" or "str", and the kind of index, "exact" or "scann".
Exported: TypeAlias = Callable[[str, str], Path]


@dataclass(frozen=True)
class Served:
    """A model, its ids, and what is known of each user."""

    model: TwoTowerNetwork
    query_ids: np.ndarray
    candidate_ids: np.ndarray
    clicks: list[np.ndarray]
    query_features: tuple[Feature, ...]
    candidate_features: tuple[Feature, ...]
    genders: list[str]
    genres: list[list[str]]
    titles: list[str]
    request_features: tuple[Feature, ...] = ()
    history_times: np.ndarray | None = None
    corpus: Corpus | None = None

    @property
    def ids(self) -> str:
        return "int" if self.candidate_ids.dtype == np.int64 else "str"

    def exportable(self) -> Exportable:
        assert self.corpus is not None
        genres = pa.array(self.genres, pa.list_(pa.string()))
        ids = self.candidate_ids.tolist()
        return Exportable(
            embed_queries=self.model.embed_queries,
            embed_candidates=self.model.embed_candidates,
            variables=self.model.variables,
            items=pa.table({"item_id": ids, "title": self.titles, "genres": genres}),
            query_ids=self.query_ids,
            history_length=self.model.history_length,
            histories=RowLists.from_lists(self.clicks),
            known_positives=RowLists.from_lists([np.unique(rows) for rows in self.clicks]),
            history_times=self.history_times,
            query_features=self.query_features,
            query_columns=self.corpus.query_columns,
            request_features=self.request_features,
            candidate_features=self.candidate_features,
        )

    @functools.cached_property
    def in_memory(self) -> ExactRetriever:
        assert self.corpus is not None
        encoder = query_encoder(self.model, self.corpus)
        return ExactRetriever(self.candidate_ids, self.model.embed_corpus(), encoder)

    def known(self, row: int) -> list[Any]:
        """Returns the ids of a user's known positives, oldest first."""
        return self.candidate_ids[self.clicks[row][::-1] - 1].tolist()

    def module(self, kind: str, num_leaves_to_search: int = 8) -> RetrievalModule:
        index: ExactIndex | ScannIndex = ExactIndex(self.model.embed_corpus())
        if kind == "scann":
            with tempfile.TemporaryDirectory() as folder:
                Searcher.build(self.model.embed_corpus(), 8).save(Path(folder))
                index = ScannIndex(index, Path(folder), [Level(60, num_leaves_to_search, 60)])
        return RetrievalModule(Encoder(self.exportable()), index, self.candidate_ids)

    def queries(self) -> list[dict[str, Any]]:
        """Makes a query for each user, with the stored history."""
        return [
            {"user_id": user, "history": self.known(row)}
            for row, user in enumerate(self.query_ids.tolist(), 1)
        ]


@pytest.fixture(scope="session", params=["int", "str"])
def served(request: pytest.FixtureRequest) -> Served:
    return make_served(request.param)


@functools.cache
def make_served(
    ids: str,
    *,
    use_user_id: bool = True,
    request_features: tuple[Feature, ...] = (),
    reads_times: bool = False,
    reads_history: bool = True,
) -> Served:
    """Makes a model, once for given arguments; `ids` is "int" or "str"; attention reads times."""
    rng = np.random.default_rng(0)
    gender = Categorical.fit("gender", ["M", "F"])
    genres = MultiCategorical.fit("genres", [["a", "b"], ["c"]])
    all_genders = rng.choice(["M", "F"], NUM_QUERIES).tolist()
    all_genres = [rng.choice(list("abc"), n).tolist() for n in rng.integers(0, 3, NUM_CANDIDATES)]
    all_genres[7] = ["", "b"]
    all_genres[8] = [""]
    query_ids, candidate_ids = _ids_of(ids)
    changes: dict[str, Any] = {"dim": 8, "feature_dim": 4, "history_length": 5}
    if reads_times or not reads_history:
        changes["history_pooling"] = ("attention",) if reads_times else ()
    plan = TwoTower(use_user_id=use_user_id, share_item_embedding=False, **changes)
    corpus = Corpus(
        candidate_ids=Ids(candidate_ids),
        query_ids=Ids(query_ids),
        candidate_features=(genres,),
        query_features=(gender,),
        candidate_columns={"genres": genres.encode_column(all_genres)},
        query_columns={"gender": gender.encode_column(all_genders)},
        request_features=request_features,
        has_times=reads_times,
    )
    model = plan.build(corpus)
    # Untrained Keras embeddings are nearly zero: spread the answers out. The other inputs of a
    # query must not hide the self-attention over its history, which starts small.
    small = 0.05 if reads_times else 1.0
    for weight in model.weights:
        if weight.dtype.is_floating:
            scale = 1.0 if "attention" in weight.name else small
            weight.assign(scale * rng.normal(size=weight.shape))
    histories = [np.zeros(0, np.int32)] + [
        rng.permutation(np.arange(1, NUM_CANDIDATES + 1))[: 2 * i].astype(np.int32)
        for i in range(NUM_QUERIES)
    ]
    return Served(
        model,
        query_ids=query_ids,
        candidate_ids=candidate_ids,
        clicks=histories,
        query_features=(gender,),
        candidate_features=(genres,),
        genders=all_genders,
        genres=all_genres,
        titles=[EVIL if i == 5 else f"The {i}th Film" for i in range(NUM_CANDIDATES)],
        request_features=request_features,
        history_times=_times(histories) if reads_times else None,
        corpus=corpus,
    )


def _ids_of(kind: str) -> tuple[np.ndarray, np.ndarray]:
    if kind == "int":
        return np.arange(NUM_QUERIES) + 100, np.arange(NUM_CANDIDATES) * 7 + 3
    users = np.array([f"Zoë {i}" for i in range(NUM_QUERIES)], object)
    return users, np.array([f"film-é-{i}" for i in range(NUM_CANDIDATES)], object)


def _times(histories: list[np.ndarray]) -> np.ndarray:
    """Makes falling seconds, because the most recent item comes first."""
    rng = np.random.default_rng(3)
    gaps = [10 ** rng.integers(0, 7, len(rows)) for rows in histories]
    return np.concatenate([1_714_000_000 - np.cumsum(of_user) for of_user in gaps])


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exports a model with a filter, once for all tests; its folder may be read or copied."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # All workers share it: an export takes seconds.

    @functools.cache
    def once(ids: str, kind: str) -> Path:
        served, model = make_served(ids), root / "exported" / ids / kind / "films"
        model.parent.mkdir(parents=True, exist_ok=True)
        queries = served.queries()
        with locked(model.with_name("lock"), wait=True), pytest.MonkeyPatch.context() as patch:
            patch.setattr(version, "prove", lambda *arguments: None)
            for module in (saved_model, signatures):
                patch.setattr(module, "RETRIEVALS", RETRIEVALS)
            if not versions_of(model):
                export.export(
                    served.exportable(),
                    model,
                    index=Exact() if kind == "exact" else Scann(recall=0.9),
                    filter_by="genres",
                    queries=[*queries[3:], *queries[:3]],
                )
        return model

    return once


@pytest.fixture(scope="module")
def kind(served: Served) -> str:
    return KIND_OF[served.ids]


@pytest.fixture(scope="module")
def folder(served: Served, kind: str, exported: Exported) -> Path:
    return exported(served.ids, kind)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    with Running(folder) as running:
        yield running


@pytest.fixture
def writable(exported: Exported, tmp_path: Path) -> Iterator[Running]:
    """A server that takes writes, of a model with integer ids and a ScaNN index."""
    model = Path(shutil.copytree(exported("int", "scann"), tmp_path / "films"))
    with Running(model, takes_writes=True) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedRetriever:
    return load(folder)


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model."""
    return Path(shutil.copytree(folder, tmp_path / "films"))


@pytest.fixture(scope="module")
def int_folder(exported: Exported) -> Path:
    """A model with integer ids and an exact index, for tests that depend on neither."""
    return exported("int", "exact")


@pytest.fixture
def films(int_folder: Path, tmp_path: Path) -> Path:
    """A copy of that model."""
    return Path(shutil.copytree(int_folder, tmp_path / "films"))


@pytest.fixture(scope="module")
def small(int_folder: Path) -> Iterator[Running]:
    limits: dict[str, Any] = {"max_k": 100, "max_queries": 10, "max_exclude": 50, "max_history": 40}
    limits |= {"max_results": 800, "max_body_bytes": 1_000_000}
    with Running(int_folder, **limits, body_timeout_seconds=1.5) as running:
        yield running
