"""The requirements resolve on the platforms of docs/start/install.md; a test asks an index."""

import configparser
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Platforms as uv names them; glibc 2.28 is that of pyarrow's packages.
PLATFORMS = {
    "Linux, x86_64": "x86_64-manylinux_2_28",
    "Linux, ARM": "aarch64-manylinux_2_28",
    "macOS, Apple silicon": "aarch64-apple-darwin",
    "Windows, x86_64": "x86_64-pc-windows-msvc",
}
PYTHONS = ("3.11", "3.12", "3.13")
# ScaNN 1.4.2 has packages for these alone.
WITH_SCANN = {("Linux, x86_64", python) for python in PYTHONS}
WITH_SCANN |= {("Linux, ARM", "3.12"), ("Linux, ARM", "3.13")}


def requirements(extra: str) -> str:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]["install_requires"] + setup["options.extras_require"][extra]


def resolve(requirements: str, platform: str, python: str) -> set[str]:
    """Returns the names of all packages to install on another platform, from wheels alone.

    uv, unlike pip, evaluates markers for that platform, also those of what a requirement requires.
    """
    uv = pytest.importorskip("uv").find_uv_bin()
    command = [uv, "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate"]
    command += ["--constraints", str(ROOT / "constraints.txt")]
    command += ["--python-platform", PLATFORMS[platform], "--python-version", python]
    # promise, which tensorflow-datasets needs, is Python alone and has no wheel anywhere.
    command += ["--only-binary", ":all:", "--no-binary", "promise"]
    # promise is built by the Python that is asked for, which must not see libraries of this one.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options: Any = {"capture_output": True, "text": True, "env": env}
    done = subprocess.run(command, input=requirements, **options)
    if "Failed to fetch" in done.stderr:
        pytest.skip("no package index can be reached")
    assert not done.returncode, done.stderr
    return {line.partition("==")[0].strip() for line in done.stdout.splitlines() if "==" in line}


@pytest.mark.nightly
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_has_packages_of_what_serves_and_what_trains(
    platform: str, python: str
) -> None:
    serving = resolve(requirements("serve"), platform, python)
    assert {"ai-edge-litert", "pyarrow", "starlette"} <= serving
    assert not {"tensorflow", "pandas", "duckdb", "scipy"} & serving
    assert ("scann" in serving) == ((platform, python) in WITH_SCANN)
    assert ("uvloop" in serving) == (platform != "Windows, x86_64")
    training = resolve(requirements("train"), platform, python)
    assert {"tensorflow", "tf-keras", "ibis-framework", "implicit"} <= training
    assert ("tensorflow-recommenders" in training) == (platform != "macOS, Apple silicon")
    assert "tensorflow-macos" not in training


def test_the_tested_versions_of_python_are_those_that_are_allowed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options"]["python_requires"] == ">=3.11,<3.14"
    classifiers = setup["metadata"]["classifiers"]
    for python in PYTHONS:
        assert f"Programming Language :: Python :: {python}" in classifiers
