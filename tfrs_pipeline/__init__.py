"""Retrieval models from the logs of a recommendation funnel.

Importing this package selects Keras 2 (TensorFlow Recommenders needs it) and imports no TensorFlow.
Public names are resolved on first use, so `import tfrs_pipeline` stays fast.
"""

import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
PUBLIC = {
    "Auto": "serving.index",
    "Batch": "batches.batch",
    "ConfigError": "settings",
    "DataError": "data.schema",
    "Ease": "evaluation.baselines",
    "Exact": "serving.index",
    "Examples": "batches.examples",
    "Exportable": "model.exportable",
    "FittedTwoTower": "model.fitted",
    "FunnelLosers": "negatives.hard",
    "Holdout": "data.holdout",
    "HybridBatches": "batches.hybrid",
    "HybridRetrieval": "model.loss",
    "Ials": "evaluation.baselines",
    "InBatch": "negatives.kinds",
    "LoadedRetriever": "serving.retriever",
    "Log": "data.log",
    "Mined": "negatives.hard",
    "Mixture": "negatives.mixture",
    "MostPopular": "evaluation.baselines",
    "Negatives": "negatives.protocol",
    "Popularity": "negatives.kinds",
    "Query": "retrieval",
    "Race": "run.race",
    "Reading": "data.reading",
    "Repeats": "evaluation.baselines",
    "Retriever": "retrieval",
    "RunConfig": "config",
    "Samples": "samples.store",
    "SamplingFrame": "negatives.protocol",
    "Scann": "serving.index",
    "SinglePositives": "batches.single",
    "TrainingSet": "model.corpus",
    "TrainingSettings": "model.settings",
    "Transitions": "evaluation.baselines",
    "TwoTower": "model.two_tower",
    "TwoTowerNetwork": "model.network",
    "TwoTowerSettings": "model.settings",
    "Uniform": "negatives.kinds",
    "UserSets": "batches.user_sets",
    "WholeSequences": "batches.sequences",
    "dump_config": "config",
    "evaluate": "evaluation.evaluate",
    "export": "serving.export",
    "load": "serving.retriever",
    "load_config": "config",
    "movielens_config": "config",
    "plot_curves": "report.figures",
    "plot_intervals": "report.figures",
    "plot_popularity": "report.figures",
    "race": "run.race",
    "signals": "evaluation.signals",
    "trained_in": "run.training",
    "with_settings": "config",
    "write_vectors": "serving.vectors",
}

__all__ = ["__version__", *sorted(PUBLIC)]


def _select_keras_2() -> None:
    """Selects Keras 2 for `tf.keras`; raises an `ImportError` if it is already Keras 3.

    TensorFlow chooses the Keras behind `tf.keras` when it is first used, so the variable may be set
    after TensorFlow was imported, but not after `tf.keras` was used.
    """
    # vars() inspects TensorFlow's lazy loader without triggering the choice.
    keras = vars(sys.modules["tensorflow"]).get("keras") if "tensorflow" in sys.modules else None
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
    value = getattr(importlib.import_module(f"{__name__}.{PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_select_keras_2()
