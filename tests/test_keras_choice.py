"""Importing the package selects Keras 2; each case needs a process of its own."""

import os
import subprocess
import sys

import pytest

PRINT_KERAS = "import tensorflow as tf; print(tf.keras.Model.__module__.partition('.')[0])"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    chosen = ("TF_USE_LEGACY_KERAS", "TF_CPP_MIN_LOG_LEVEL")
    env = {key: value for key, value in os.environ.items() if key not in chosen} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_the_package_and_its_settings_import_nothing_heavy() -> None:
    code = "import sys, tfrs_pipeline; print({'keras', 'numpy', 'pydantic'} & sys.modules.keys());"
    code += "tfrs_pipeline.movielens_config(); print({'tensorflow', 'keras'} & sys.modules.keys())"
    assert run(code).stdout.splitlines() == ["set()", "set()"]


@pytest.mark.slow
def test_tensorflow_makes_no_noise() -> None:
    code = "import tfrs_pipeline as tp; tp.TwoTower\n"
    done = run(code + "import tensorflow as tf; tf.ones([1, 2]) @ [[1.0], [2.0]]")
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
        (f"{STAND_IN}import tfrs_pipeline", {}),
        ("import tfrs_pipeline", {"TF_USE_LEGACY_KERAS": "0"}),
        (STAND_IN + USED.format("tf_keras.src.engine.training"), {}),
    ],
    ids=["an unresolved Keras is not resolved", "a user who asked for Keras 3", "Keras 2 in use"],
)
def test_keras_2_is_asked_for(code: str, environment: dict[str, str]) -> None:
    result = run(f"{code}; import os; print(os.environ['TF_USE_LEGACY_KERAS'])", **environment)
    assert result.stdout.strip() == "1", result.stderr


@pytest.mark.parametrize("code", [
    STAND_IN + USED.format("keras.engine.training"),
    *(pytest.param(f"{code}; import tfrs_pipeline", marks=pytest.mark.nightly) for code in (
        "import tensorflow as tf; tf.keras.layers", "from tensorflow.keras.layers import Dense"
    )),
], ids=["an older Keras", "Keras 3 in use", "a submodule in use"])  # fmt: skip
def test_another_keras_in_use_is_refused(code: str) -> None:
    result = run(code)
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: tfrs_pipeline needs Keras 2")
    assert "Import tfrs_pipeline before tensorflow, or set TF_USE_LEGACY_KERAS=1" in message


@pytest.mark.nightly
@pytest.mark.parametrize(("code", "environment"), [
    ("import tensorflow", {}),
    ("from tensorflow import keras", {}),
    ("import keras", {}),
    ("import tensorflow as tf; tf.keras.Model", {"TF_USE_LEGACY_KERAS": "True"}),
])  # fmt: skip
def test_keras_2_is_selected(code: str, environment: dict[str, str]) -> None:
    result = run(f"{code}; import tfrs_pipeline; {PRINT_KERAS}", **environment)
    assert result.stdout.strip() == "tf_keras", result.stderr
