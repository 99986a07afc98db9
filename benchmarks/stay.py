"""What a ranker loses that reads yesterday's vectors, on today's, which are turned onto them.

    tfrs-pipeline run ... --seed 0 --run-dir YESTERDAY
    tfrs-pipeline run ... --seed 1 --run-dir TODAY --export.if_beaten
    python benchmarks/stay.py TODAY saved_models/NAME/1 saved_models/NAME/2 [--json FILE]

The ranker is a logistic regression on the products of the numbers of a user's vector and an
item's. It orders the 100 best items of a query, and learns on the validation of the run TODAY; its
NDCG@10 is that of the test's queries by user. Three rankers order today's items:

    today      fitted on today's vectors
    yesterday  fitted on yesterday's vectors, reads today's
    strange    the same, but today's space is turned at random, as a training leaves it
"""

from pathlib import Path

import numpy as np
from record import parser_with_json, write_json
from sklearn.linear_model import LogisticRegression

import tfrs_pipeline as tp
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.training import split_in

K, TOP = 100, 10


class Asked:
    """A version's answers to a holdout: products [n, K, D], and which items are relevant [n, K]."""

    def __init__(self, version: Path, holdout: tp.Holdout, turn: np.ndarray | None = None) -> None:
        model = tp.load(version, exact=True)
        queries = holdout.as_queries()
        ids, self.scores = model.retrieve(queries, K, [query["history"] for query in queries])
        users = model.embed_queries(queries)
        items = model.candidates.vectors_of(ids.ravel().tolist())
        if turn is not None:
            users, items = users @ turn, items @ turn
        self.products = users[:, None] * items.reshape(*ids.shape, -1)
        self.is_relevant = np.array(
            [np.isin(row, relevant) for row, relevant in zip(ids, holdout.relevant, strict=True)]
        )

    def ranker(self) -> LogisticRegression:
        """Fits a ranker."""
        features = self.products.reshape(-1, self.products.shape[-1])
        return LogisticRegression(C=1.0, max_iter=1000).fit(features, self.is_relevant.ravel())

    def ndcg(self, scores: np.ndarray) -> float:
        """Returns the mean NDCG@10 of the queries with a relevant item among the K."""
        order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
        discounts = 1 / np.log2(np.arange(2, TOP + 2))
        gains = np.take_along_axis(self.is_relevant, order, axis=1) @ discounts
        num = self.is_relevant.sum(axis=1)
        best = np.concatenate([[0.0], discounts.cumsum()])[np.minimum(num, TOP)]
        return float((gains[num > 0] / best[num > 0]).mean())

    def ranked(self, ranker: LogisticRegression) -> float:
        """Returns the NDCG@10 of a ranker's order."""
        scores = ranker.decision_function(self.products.reshape(-1, self.products.shape[-1]))
        return self.ndcg(scores.reshape(self.is_relevant.shape))


def main() -> None:
    """Measures the three rankers, and the retrieval's own order."""
    parser = parser_with_json(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("yesterday", type=Path)
    parser.add_argument("today", type=Path)
    options = parser.parse_args()
    split = split_in(RunFolder(options.run))
    validation, test = (split.holdout(part, by="users") for part in ("validation", "test"))
    learned = {x: Asked(getattr(options, x), validation).ranker() for x in ("yesterday", "today")}
    today = Asked(options.today, test)
    dim = today.products.shape[-1]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))[0]
    figures = {
        "aligned": tp.load(options.today).manifest["aligned"],
        "ndcg@10": {
            "as retrieved": today.ndcg(today.scores),
            "today": today.ranked(learned["today"]),
            "yesterday": today.ranked(learned["yesterday"]),
            "strange": Asked(options.today, test, turn).ranked(learned["yesterday"]),
        },
    }
    for name, value in figures["ndcg@10"].items():
        print(f"{name:<14}{value:.4f}")
    print(figures["aligned"])
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
