"""The wheel works without the clone, as the README says of installing."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = ["user_id,item_id"] + [f"{user},{(user + n) % 40}" for user in range(80) for n in range(16)]


@pytest.mark.slow
def test_a_wheel_trains_and_reports_in_an_empty_environment(tmp_path: Path) -> None:
    """The libraries are those of the tests; package, data and command are the wheel's."""
    source, env = tmp_path / "source", tmp_path / "env"
    source.mkdir()
    shutil.copytree(ROOT / "tfrs_pipeline", source / "tfrs_pipeline")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: Path | str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    no_network = ("--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "wheel", *no_network, "--wheel-dir", "dist", source)
    (wheel,) = (tmp_path / "dist").iterdir()
    run(sys.executable, "-m", "venv", "--without-pip", env)
    run(*pip, "--python", env / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    # Adds the libraries but no editable installation, whose own path file is then not read.
    (site,) = env.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))

    place = "import tfrs_pipeline; print(tfrs_pipeline.__file__)"
    assert run(env / "bin" / "python", "-c", place).startswith(str(site))
    (tmp_path / "clicks.csv").write_text("\n".join(ROWS))
    command = env / "bin" / "tfrs-pipeline"
    flags = ["--preset", "quick", "--training.max_epochs", "1", "--training.batch_size", "64"]
    flags += ["--data.path", "clicks.csv", "--run-dir", "run", "--export.index", "none"]
    flags += ["--training.examples", "single", "--evaluation.baselines", "popularity"]
    printed = run(command, "run", *flags)
    assert "two_tower" in printed
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    assert list(site.glob("tfrs_pipeline/service/page.html"))
    assert list(site.glob("tfrs_pipeline/py.typed"))
