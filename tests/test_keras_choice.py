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


def check_refused(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: tfrs_pipeline needs Keras 2")
    assert "Import tfrs_pipeline before tensorflow" in message
    assert "TF_USE_LEGACY_KERAS=1" in message


def test_the_package_imports_neither_tensorflow_nor_pydantic() -> None:
    code = (
        "import sys, tfrs_pipeline; "
        "print({'tensorflow', 'keras', 'numpy', 'pydantic'} & sys.modules.keys())"
    )
    assert run(code).stdout.strip() == "set()"


def test_settings_are_read_without_tensorflow() -> None:
    code = (
        "import sys, tfrs_pipeline; tfrs_pipeline.movielens_config(); "
        "print({'tensorflow', 'keras'} & sys.modules.keys())"
    )
    assert run(code).stdout.strip() == "set()"


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


def test_an_unresolved_keras_is_looked_at_without_resolving_it() -> None:
    result = run(f"{STAND_IN}import os, tfrs_pipeline; print(os.environ['TF_USE_LEGACY_KERAS'])")
    assert result.stdout.strip() == "1", result.stderr


def test_a_user_who_asked_for_keras_3_gets_keras_2() -> None:
    result = run(
        "import os, tfrs_pipeline; print(os.environ['TF_USE_LEGACY_KERAS'])",
        TF_USE_LEGACY_KERAS="0",
    )
    assert result.stdout.strip() == "1", result.stderr


@pytest.mark.parametrize("module", ["keras.src.models.model", "keras.engine.training"])
def test_a_resolved_other_keras_is_refused(module: str) -> None:
    model = f"tensorflow.keras.Model = type('Model', (), {{'__module__': {module!r}}})"
    check_refused(run(f"{STAND_IN}{model}\nimport tfrs_pipeline"))


def test_a_resolved_keras_2_is_accepted() -> None:
    model = (
        "tensorflow.keras.Model = type('Model', (), {'__module__': 'tf_keras.src.engine.training'})"
    )
    result = run(f"{STAND_IN}{model}\nimport tfrs_pipeline")
    assert result.returncode == 0, result.stderr


def test_keras_3_in_use_before_the_package_is_refused() -> None:
    check_refused(run("import tensorflow as tf; tf.keras.layers; import tfrs_pipeline"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        f"import tensorflow; import tfrs_pipeline; {PRINT_KERAS}",
        f"from tensorflow import keras; import tfrs_pipeline; {PRINT_KERAS}",
        f"import keras; import tfrs_pipeline; {PRINT_KERAS}",
    ],
)
def test_keras_2_is_selected(code: str) -> None:
    result = run(code)
    assert result.stdout.strip() == "tf_keras", result.stderr


@pytest.mark.slow
def test_keras_2_selected_by_the_user_before_is_accepted() -> None:
    result = run(
        f"import tensorflow as tf; tf.keras.Model; import tfrs_pipeline; {PRINT_KERAS}",
        TF_USE_LEGACY_KERAS="True",
    )
    assert result.stdout.strip() == "tf_keras", result.stderr


@pytest.mark.slow
def test_submodules_of_tensorflow_keras_count_as_use() -> None:
    check_refused(run("from tensorflow.keras.layers import Dense; import tfrs_pipeline"))
