"""The towers of a version: LiteRT runs them, or TensorFlow those that LiteRT cannot."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfrs_pipeline.answers.publish import SERVICE_FOLDER
from tfrs_pipeline.libraries import quiet_natives
from tfrs_pipeline.search.queries import INPUT, Arrays, Tower

TOWERS = QUERY_TOWER, CANDIDATE_TOWER = "query", "candidate"
LITERT_SUFFIX = ".tflite"
# The function of a tower that is saved for TensorFlow.
EMBED = "embed"


class LiteRtTower:
    """A tower in a LiteRT file, whose pages all processes share; safe from several threads.

    `names` are those of the inputs, in the order of the file's.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._names = tuple(names)
        # A thread may call first after the version was deleted: an open file can still be mapped.
        self._file = path.open("rb")
        by_number = Path(f"/dev/fd/{self._file.fileno()}")
        self._path = by_number if by_number.exists() else path
        self._threads = threading.local()  # An interpreter serves one thread at a time.
        # If a shape within a tower depends on values, XNNPACK's answers may be wrong from the
        # second call on, without an error: it depends on where memory lies (LiteRT 2.3.0).
        self._takes_xnnpack = False
        # XNNPACK writes a line at the first start in a process.
        with quiet_natives():
            self._takes_xnnpack = not self._has_shapes_of_values()
            self._threads = threading.local()
            self._interpreter()  # A file that cannot be run is refused here.

    def __call__(self, inputs: Arrays, /) -> np.ndarray:
        """Embeds a batch of any size: [B, D] float32."""
        interpreter, entries, output = self._interpreter()
        num = len(inputs[self._names[0]])
        if not num:  # LiteRT takes no empty batch.
            width = interpreter.get_output_details()[0]["shape_signature"][1]
            return np.zeros((0, width), np.float32)
        if num > 1 and not self._takes_xnnpack:
            # Without XNNPACK, a batch gains little, and in one, self-attention over each history
            # takes as long as over the longest.
            rows = ({name: inputs[name][i : i + 1] for name in self._names} for i in range(num))
            return np.concatenate([self(row) for row in rows])
        if num != self._threads.num:
            for index, shape in entries:
                interpreter.resize_tensor_input(index, [num, *shape])
            interpreter.allocate_tensors()
            self._threads.num = num
        for name, (index, _) in zip(self._names, entries, strict=True):
            interpreter.set_tensor(index, np.ascontiguousarray(inputs[name]))
        interpreter.invoke()
        embedded: np.ndarray = interpreter.get_tensor(output)  # A copy.
        return embedded

    def _has_shapes_of_values(self) -> bool:
        """Returns whether a shape within the tower depends on more than the size of the batch."""
        interpreter, entries, _ = self._interpreter()
        for index, shape in entries:
            interpreter.resize_tensor_input(index, [3, *shape])
        interpreter.allocate_tensors()
        for entry in interpreter.get_input_details():
            interpreter.set_tensor(entry["index"], np.zeros(entry["shape"], entry["dtype"]))
        # A shape that is not known before the call has a 1 in its place.
        before = [entry["shape"].tolist() for entry in interpreter.get_tensor_details()]
        interpreter.invoke()
        after = [entry["shape"].tolist() for entry in interpreter.get_tensor_details()]
        return before != after

    def _interpreter(self) -> tuple[Any, list[tuple[int, Sequence[int]]], int]:
        """Returns this thread's interpreter, index and row shape of each input, the output's."""
        if not hasattr(self._threads, "made"):
            from ai_edge_litert.interpreter import Interpreter, OpResolverType

            kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            if self._takes_xnnpack:
                kernels = OpResolverType.AUTO
            interpreter = Interpreter(
                model_path=str(self._path), num_threads=1, experimental_op_resolver_type=kernels
            )
            interpreter.allocate_tensors()
            details = {
                _plain_name(entry["name"]): entry for entry in interpreter.get_input_details()
            }
            inputs = [details[INPUT.format(number)] for number in range(len(self._names))]
            entries = [(entry["index"], entry["shape_signature"][1:]) for entry in inputs]
            output = interpreter.get_output_details()[0]["index"]
            self._threads.made, self._threads.num = (interpreter, entries, output), None
        made: tuple[Any, list[tuple[int, Sequence[int]]], int] = self._threads.made
        return made


def _plain_name(name: str) -> str:
    """Returns the name of an input without what the conversion adds to it."""
    return name.rpartition("serving_default_")[2].partition(":")[0]


class TensorFlowTower:
    """A tower that LiteRT cannot run, as a SavedModel of its own; needs TensorFlow."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        try:
            import tensorflow as tf
        except ImportError as error:
            raise ImportError(
                f"{folder} is a tower that LiteRT cannot run, so this model needs TensorFlow in "
                f"service too: install the extra 'train'. The import said: {error}"
            ) from error
        self._model, self._names = tf.saved_model.load(str(folder)), tuple(names)
        self._constant = tf.constant

    def __call__(self, inputs: Arrays, /) -> np.ndarray:
        """Embeds a batch of any size: [B, D] float32."""
        tensors = (self._constant(inputs[name]) for name in self._names)
        embedded: np.ndarray = getattr(self._model, EMBED)(*tensors).numpy()
        return embedded


def needs_tensorflow(version: Path) -> bool:
    """Returns whether a version has a tower that LiteRT cannot run."""
    return any((version / SERVICE_FOLDER / name).is_dir() for name in TOWERS)


def load_tower(folder: Path, name: str, inputs: Sequence[str]) -> Tower:
    """Loads a tower from the folder of a version's towers, with the names of its inputs."""
    file = folder / f"{name}{LITERT_SUFFIX}"
    return LiteRtTower(file, inputs) if file.exists() else TensorFlowTower(folder / name, inputs)
