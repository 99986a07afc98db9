"""Writes the towers of a version for a service without TensorFlow."""

import logging
import re
from pathlib import Path

import tensorflow as tf

from tfrs_pipeline.answers.towers import CANDIDATE_TOWER, EMBED, LITERT_SUFFIX, QUERY_TOWER
from tfrs_pipeline.libraries import quiet_natives
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.tf_tables import tower_function
from tfrs_pipeline.search.queries import candidate_inputs

logger = logging.getLogger(__name__)


def write_towers(model: Exportable, folder: Path) -> None:
    """Writes the query and the candidate tower, in LiteRT's format where it can run them.

    A tower with an operation that LiteRT lacks is saved for TensorFlow, and a warning says so: a
    service then needs TensorFlow.
    """
    inputs = model.inputs.tower_inputs, candidate_inputs(model.candidate_features)
    functions = map(tower_function, (model.embed_queries, model.embed_candidates), inputs)
    log = logging.getLogger("tensorflow")
    level = log.level
    for name, traced in zip((QUERY_TOWER, CANDIDATE_TOWER), functions, strict=True):
        module = tf.Module(name=name)
        setattr(module, EMBED, traced)
        function = traced.get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function], module)
        try:
            log.setLevel(logging.ERROR)  # It warns of collections that no tower has.
            with quiet_natives():
                converted = converter.convert()
            (folder / f"{name}{LITERT_SUFFIX}").write_bytes(converted)
        except Exception as error:  # The converter raises whatever its parts do.
            reason = re.search("error: (.+)", str(error))  # The first: what follows is its trace.
            logger.warning(
                "LiteRT cannot run the %s tower, so whoever serves this model needs TensorFlow: "
                "%.300s",
                name,
                reason[1] if reason else error,
            )
            module.held = list(model.variables)  # Tracked, so that they are saved.
            tf.saved_model.save(module, str(folder / name))
        finally:
            log.setLevel(level)
