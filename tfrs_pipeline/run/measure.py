"""Fits baselines, and measures the models of a run beside them and the version in service.

TensorFlow is imported for the version in service alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tfrs_pipeline.answers.publish import publishing
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.held_out_queries import Holdout
from tfrs_pipeline.data.schema import ASKED
from tfrs_pipeline.durable import read_whole, write_record
from tfrs_pipeline.evaluation.baselines import BASELINES, Baseline
from tfrs_pipeline.evaluation.evaluate import evaluate
from tfrs_pipeline.evaluation.metrics import metric_of
from tfrs_pipeline.evaluation.results import Evaluation, joined
from tfrs_pipeline.messages import SILENT, Progress, as_interrupts, counted
from tfrs_pipeline.retrieval import Retriever
from tfrs_pipeline.run.data import RunData, final_part
from tfrs_pipeline.run.steps import RunContext

if TYPE_CHECKING:
    from tfrs_pipeline.model.ensemble import Model

NUM_EXAMPLES = 4
EXAMPLE_LENGTH = 10
# Once, somebody else may have ended the run.
MOST_ENDS = 2


def baselines_of(config: RunConfig, data: RunData) -> dict[str, Sequence[Baseline]]:
    """Returns the baselines of a config by name, each in the forms to choose from on validation."""
    by_time, exclude = data.split.kind == "time", config.evaluation.exclude
    forms = {
        name: BASELINES[name].forms(seed=config.seed, by_time=by_time, exclude=exclude)
        for name in config.evaluation.baselines
        if name in BASELINES  # "uncorrected" is a model that the run trains.
    }
    return {name: choices for name, choices in forms.items() if choices}


class MeasuredBaselines(NamedTuple):
    """The evaluations of baselines, one each, and why others were not measured, by name.

    Of these, `failed` has those with an error that is not a refusal of the data.
    """

    evaluations: Sequence[Evaluation]
    not_measured: Mapping[str, str]
    failed: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """The names of the measured baselines."""
        return [name for evaluation in self.evaluations for name in evaluation.results]


def measure_baselines(run: RunContext, samples: RunData) -> MeasuredBaselines:
    """Measures the baselines of a run; notes each that is left out and why.

    One that fails costs its row alone. It is recorded in the folder, and so is the one at work: a
    crash of native code, or a lack of memory, ends the run itself. A run that has ended twice in
    the same baseline leaves it out.
    """
    config, path = run.config, run.folder.left_out_file
    record: dict[str, Any] = {"baselines": {}, "failed": {}, "at_work": {}}
    record |= read_whole(path) or {}
    known, failed, at_work = record["baselines"], record["failed"], record["at_work"]
    again = f"(it is not tried again; to do so, delete {path})"
    not_measured = {name: f"{why} {again}" for name, why in known.items()}
    choices = {
        name: forms for name, forms in baselines_of(config, samples).items() if name not in known
    }
    evaluations = []
    for number, (name, forms) in enumerate(choices.items()):
        run.progress.task(f"baseline {name}", number, len(choices))
        at_work[name] = at_work.get(name, 0) + 1
        write_record(path, record)
        try:
            if at_work[name] > MOST_ENDS:
                raise RuntimeError(f"the run has ended {MOST_ENDS} times while it was measured")
            with as_interrupts():
                evaluation, notes = _fit_and_evaluate(name, forms, config, samples)
            evaluations.append(evaluation)
            run.note(*notes)
        except ValueError as error:  # A refusal, such as of too many items.
            not_measured[name] = known[name] = str(error)
        except Exception as error:  # Whatever it is, it concerns this baseline alone.
            why = f"{type(error).__name__}: {error}"
            not_measured[name] = known[name] = failed[name] = why
        finally:  # After Ctrl-C too.
            del at_work[name]
            write_record(path, record)
    run.note(*(f"{name} is left out: {why}" for name, why in not_measured.items()))
    unnamed = [name for name in BASELINES if name not in config.evaluation.baselines]
    run.note(*(f"{name}: left out by evaluation.baselines" for name in unnamed))
    return MeasuredBaselines(evaluations, not_measured, failed)


def _fit_and_evaluate(
    name: str, forms: Sequence[Baseline], config: RunConfig, data: RunData
) -> tuple[Evaluation, list[str]]:
    # A function of its own, so that a baseline is freed before the next one needs memory.
    fitted, notes = fit_best(name, forms, config, data)
    return evaluate_all(config, {name: fitted}, data), notes


def fit_best(
    name: str, forms: Sequence[Baseline], config: RunConfig, data: RunData
) -> tuple[Retriever, list[str]]:
    """Fits the form of a baseline that is best on validation; notes which, if there are several."""

    def score(baseline: Baseline) -> float:
        # The same queries and metric as for the model's epoch.
        validation = data.validation.sample(config.training.validation_users, config.seed)
        monitor, exclude = metric_of(config.training.monitor), config.evaluation.exclude
        fitted = baseline.fit(data.split.train)
        options: dict[str, Any] = {"metrics": [monitor], "exclude": exclude, "num_bootstrap": 0}
        measured = evaluate(fitted, validation, **options).first
        return measured.overall.intervals[str(monitor)].mean

    best, notes = forms[0], []  # A single form needs no validation.
    if len(forms) > 1:
        best = max(forms, key=score)
        notes.append(f"{name}: {best!r}, best of {len(forms)} on validation")
    # Fitted again, since the choice was made with models that had not seen validation.
    return best.fit(final_part(config, data.split)), notes


def measure(
    run: RunContext, samples: RunData, baselines: MeasuredBaselines, **models: "Model"
) -> Evaluation:
    """Evaluates a run's models and the version in service beside the measured baselines.

    The version is compared if the gate is on, or was before.
    """
    from tfrs_pipeline.model.ensemble import FittedSum
    from tfrs_pipeline.run.gate import BEST_MEMBER, IN_SERVICE, version_in_service

    config, progress = run.config, run.progress
    trained: dict[str, Retriever] = {**models}
    for model in models.values():
        if isinstance(model, FittedSum):
            trained[BEST_MEMBER] = model.first
    metrics = run.folder.metrics()
    is_compared = config.export.gate or (metrics is not None and IN_SERVICE in metrics["models"])
    if is_compared:
        # The version that the model is compared with must stay in service until the export.
        run.hold(publishing(config.model_folder))
    measured = [evaluate_all(config, trained, samples, progress), *baselines.evaluations]
    if is_compared:
        in_service = version_in_service(
            config.model_folder,
            samples.test.candidate_ids,
            samples.split,
            # Never the run's own export, which a resumed run finds in service.
            without=run.folder.own_version(config),
        )
        if in_service is not None:
            measured.append(evaluate_all(config, {IN_SERVICE: in_service}, samples, progress))
    evaluation = joined(measured)
    lines = []
    for question in (evaluation, evaluation.other):
        if isinstance(question, Evaluation):
            first = question.first
            num_queries, num_relevant = len(first.user_ids), first.overall.num_relevant
            queries = f"{ASKED[question.asked_by]}: {counted(num_queries, 'query')}"
            lines += [f"{queries}, {num_relevant:,} items to find", *first.describe()]
            lines += about_counting(question)
    run.note(*dict.fromkeys(lines))  # Both questions may have the same remarks.
    return evaluation


def about_counting(evaluation: Evaluation) -> Iterator[str]:
    """Says how far counting alone gets: a log that it solves needs no model."""
    recall = f"recall@{evaluation.cutoffs[0]}"
    counted_only = evaluation.results.get("transitions")
    if counted_only is not None and recall in counted_only.overall.intervals:
        alone, model = (
            result.overall.intervals[recall].mean for result in (counted_only, evaluation.first)
        )
        yield (
            f"{ASKED[evaluation.asked_by]}: counting what came next, without training, finds "
            f"{alone:.1%} of a query's items among its first {evaluation.cutoffs[0]}, the model "
            f"{model:.1%}"
        )


def evaluate_all(
    config: RunConfig,
    retrievers: Mapping[str, Retriever],
    data: RunData,
    progress: Progress = SILENT,
) -> Evaluation:
    """Evaluates retrievers on a run's test, by the question that decides and by the other."""
    decisive, *others = (
        evaluate(
            retrievers,
            holdout,
            exclude=config.evaluation.exclude,
            cutoffs=config.evaluation.cutoffs,
            seed=config.seed,
            on_progress=progress.task,
        )
        for holdout in (data.test, data.other_test)
        if isinstance(holdout, Holdout)
    )
    return dataclasses.replace(decisive, other=others[0] if others else str(data.other_test))


def examples_of(retriever: Retriever, holdout: Holdout, config: RunConfig) -> list[dict[str, Any]]:
    """Gathers the answers to a few test queries, with short to long histories."""
    # Spread over the lengths of histories, not chosen by what was found. The shortest and the
    # longest history are odd cases, so the ends are left out.
    order = np.argsort([len(history) for history in holdout.histories], kind="stable")
    positions = np.linspace(0, len(order) - 1, NUM_EXAMPLES + 2)[1:-1].round().astype(int)
    numbers = list(dict.fromkeys(order[positions].tolist()))
    queries = holdout.as_queries()
    excluded = holdout.excluded(config.evaluation.exclude)
    ids, scores = retriever.retrieve(
        [queries[i] for i in numbers],
        min(EXAMPLE_LENGTH, len(holdout.candidate_ids)),
        None if excluded is None else [excluded[i] for i in numbers],
    )
    lists = zip(ids, scores, strict=True)
    # Slots without an item have the score -inf.
    shown = [row_ids[row_scores > -np.inf].tolist() for row_ids, row_scores in lists]
    relevant = [set(holdout.relevant[i].tolist()) for i in numbers]
    return [
        {
            "user_id": holdout.user_ids[i : i + 1].tolist()[0],
            "num_history": len(holdout.histories[i]),
            # The latest first, as a person remembers them.
            "history": holdout.histories[i][::-1][:EXAMPLE_LENGTH].tolist(),
            "recommended": recommended,
            "num_relevant": len(wanted),
            "found": [id_ for id_ in recommended if id_ in wanted],
        }
        for i, recommended, wanted in zip(numbers, shown, relevant, strict=True)
    ]
