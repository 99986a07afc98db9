"""Importing the package selects Keras 2; each case needs a process of its own."""

import os
import subprocess
import sys

import pytest

PRINT_KERAS = "import tensorflow as tf; print(tf.keras.Model.__module__.partition('.')[0])"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "TF_USE_LEGACY_KERAS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("", "tensorflow keras numpy pydantic"),
        ("tfrs_pipeline.movielens_config()", "tensorflow keras"),
    ],
    ids=["the package", "settings"],
)
def test_what_is_light_imports_nothing_heavy(code: str, absent: str) -> None:
    shown = f"print(set({absent.split()}) & sys.modules.keys())"
    result = run(f"import sys, tfrs_pipeline; {code}\n{shown}")
    assert result.stdout.strip() == "set()"


def test_tensorflow_makes_no_noise() -> None:
    code = (
        "import tfrs_pipeline as tp; tp.TwoTower\n"
        "import tensorflow as tf; tf.ones([1, 2]) @ [[1.0], [2.0]]"
    )
    environment = {name: x for name, x in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# A stand-in for TensorFlow: a lazy loader that fails when touched, or a resolved Keras.
STAND_IN = """
import sys, types
class Loader(types.ModuleType):
    def __getattr__(self, name):
        raise AssertionError(f"resolved by {name}")
tensorflow = types.ModuleType("tensorflow")
tensorflow.keras = Loader("keras")
sys.modules["tensorflow"] = tensorflow
"""


USED = "tensorflow.keras.Model = type('Model', (), {{'__module__': '{}'}})\nimport tfrs_pipeline"


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        (f"{STAND_IN}import os, tfrs_pipeline", {}),
        ("import os, tfrs_pipeline", {"TF_USE_LEGACY_KERAS": "0"}),
    ],
    ids=["an unresolved Keras is not resolved", "a user who asked for Keras 3"],
)
def test_keras_2_is_asked_for(code: str, environment: dict[str, str]) -> None:
    result = run(f"{code}; print(os.environ['TF_USE_LEGACY_KERAS'])", **environment)
    assert result.stdout.strip() == "1", result.stderr


@pytest.mark.parametrize(
    "code",
    [
        STAND_IN + USED.format("keras.src.models.model"),
        STAND_IN + USED.format("keras.engine.training"),
        "import tensorflow as tf; tf.keras.layers; import tfrs_pipeline",
        pytest.param(
            "from tensorflow.keras.layers import Dense; import tfrs_pipeline",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["Keras 3", "an older Keras", "Keras 3 in use", "a submodule in use"],
)
def test_another_keras_in_use_is_refused(code: str) -> None:
    result = run(code)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: tfrs_pipeline needs Keras 2")
    assert "Import tfrs_pipeline before tensorflow" in message
    assert "TF_USE_LEGACY_KERAS=1" in message


def test_a_resolved_keras_2_is_accepted() -> None:
    result = run(STAND_IN + USED.format("tf_keras.src.engine.training"))
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "environment"),
    [
        ("import tensorflow", {}),
        ("from tensorflow import keras", {}),
        ("import keras", {}),
        ("import tensorflow as tf; tf.keras.Model", {"TF_USE_LEGACY_KERAS": "True"}),
    ],
)
def test_keras_2_is_selected(code: str, environment: dict[str, str]) -> None:
    result = run(f"{code}; import tfrs_pipeline; {PRINT_KERAS}", **environment)
    assert result.stdout.strip() == "tf_keras", result.stderr
