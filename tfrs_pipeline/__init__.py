"""Retrieval models from the logs of a recommendation funnel.

Importing this package selects Keras 2 (TensorFlow Recommenders needs it) and imports no TensorFlow.
Public names are resolved on first use, so `import tfrs_pipeline` stays fast.
"""

import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0"

# Module -> the public names that it defines.
_NAMES = {
    "batches.batch": ("Batch", "Examples"),
    "batches.hybrid": ("HybridBatches",),
    "batches.examples": ("SinglePositives", "UserSets", "WholeSequences"),
    "config": ("RunConfig", "dump_config", "load_config", "movielens_config", "with_settings"),
    "data.held_out_queries": ("Holdout",),
    "data.ids": ("Ids",),
    "data.log": ("Log", "Split"),
    "data.settings": ("Reading",),
    "data.schema": ("DataError",),
    "drawing": ("plot_curves", "plot_intervals", "plot_popularity"),
    "evaluation.bootstrap": ("Interval", "Outcome"),
    "evaluation.baselines": (
        "Baseline",
        "Ease",
        "Ials",
        "ItemKnn",
        "MostPopular",
        "Repeats",
        "Transitions",
    ),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.metrics": ("Metric", "Rankings", "metric_of", "popularity_slices"),
    "search.topk": ("ScoreRetriever",),
    "evaluation.results": ("Evaluation", "EvaluationResult", "SliceResult"),
    "model.corpus": ("TrainingSet",),
    "model.ensemble": ("FittedSum",),
    "model.exportable": ("Exportable",),
    "model.false_negatives": ("FalseNegatives",),
    "model.fitted_model": ("FittedTwoTower",),
    "model.loss": ("HybridRetrieval",),
    "model.network": ("TwoTowerNetwork",),
    "model.settings": ("TrainingSettings", "TwoTowerSettings"),
    "model.two_tower": ("TwoTower",),
    "negatives.samplers": (
        "FunnelLosers",
        "HardNegatives",
        "InBatch",
        "Negatives",
        "Popularity",
        "SamplingFrame",
        "Uniform",
    ),
    "negatives.log_q": ("Mixture",),
    "presets": ("Recipe",),
    "report.facts": ("write_report",),
    "retrieval": ("Query", "Retriever"),
    "run.compare": ("compare",),
    "run.comparison": ("Comparison", "OverSeeds"),
    "run.race": ("Race", "race"),
    "run.refresh": ("Refreshed", "refresh_index"),
    "run.training": ("trained_in",),
    "samples.store": ("Samples",),
    "answers.audience": ("audience",),
    "answers.explain": ("Explanation", "explain"),
    "answers.log_of_service": ("write_log",),
    "answers.outcomes": ("VersionOutcome", "outcomes"),
    "exports.export": ("export",),
    "search.settings": ("Auto", "Exact", "Scann"),
    "answers.recommend": ("recommend",),
    "answers.retriever": ("LoadedRetriever", "load"),
    "answers.vectors": ("write_vectors",),
    "settings": ("ConfigError",),
}
# Other modules that users may import from: sources of logs, base classes and lists of custom
# features, baselines and metrics, checks of custom negatives, and the command line, for a program
# that adds such.
PUBLIC_MODULES = ["cli", "features.kinds", "features.numeric", "testing"]
PUBLIC_MODULES += ["evaluation.baselines", "evaluation.metrics"]
PUBLIC_MODULES += ["sources.movielens", "sources.simulated"]
PUBLIC = dict(sorted((name, module) for module, names in _NAMES.items() for name in names))

__all__ = ["__version__", *PUBLIC]


def _select_keras_2() -> None:
    """Selects Keras 2 for `tf.keras`; raises an `ImportError` if it is already Keras 3.

    TensorFlow chooses the Keras behind `tf.keras` when it is first used, so the variable may be set
    after TensorFlow was imported, but not after `tf.keras` was used.
    """
    # vars() inspects TensorFlow's lazy loader without triggering the choice.
    tensorflow = sys.modules.get("tensorflow")  # None also where its import is forbidden.
    keras = vars(tensorflow).get("keras") if tensorflow is not None else None
    model = vars(keras).get("Model") if keras is not None else None
    if model is not None and not model.__module__.startswith("tf_keras."):
        raise ImportError(
            "tfrs_pipeline needs Keras 2, and tf.keras is already Keras 3 in this process "
            f"(tf.keras.Model comes from {model.__module__}). Import tfrs_pipeline before "
            "tensorflow, or set TF_USE_LEGACY_KERAS=1 in the environment, and start a new process."
        )
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    # Failures in TensorFlow's C++ log also come as Python errors; the rest of it is noise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{PUBLIC[name]}")
    except ModuleNotFoundError as error:
        from tfrs_pipeline.libraries import raise_missing

        raise_missing(error, f"tfrs_pipeline.{name}")
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if sys.platform == "win32":
    raise ImportError(
        "tfrs_pipeline locks and flushes files as Linux and macOS do, so it does not run on "
        "Windows: use WSL 2, the Windows Subsystem for Linux."
    )
_select_keras_2()
