"""Compares the Containerfile with the package."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tfrs_pipeline.cli.commands import COMMAND_LINE
from tfrs_pipeline.service.settings import ServeSettings

ROOT = Path(__file__).parents[1]
PORT = ServeSettings.model_fields["port"].default


@pytest.fixture(scope="module")
def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    lines = (ROOT / "Containerfile").read_text().splitlines()
    joined = re.sub(r"\\\n\s*", " ", "\n".join(x for x in lines if not x.startswith("#")))
    for instruction, _, text in (line.partition(" ") for line in joined.splitlines() if line):
        if instruction == "FROM":
            found[text.split(" AS ")[1]] = here = []
        here.append((instruction, text))
    return found


def test_the_server_of_the_image_is_one_that_the_package_starts(stages: Any) -> None:
    image = dict(stages["serve"])
    shell, flag, command = json.loads(image["CMD"])
    assert (shell, flag) == ("sh", "-c")
    program, *words = command.removeprefix("exec ").replace("'", "").replace('"', "").split()
    assert program == "tfrs-pipeline"
    name, given = COMMAND_LINE.read(words)
    assert (name, str(given["model"])) == ("serve", "/models/$MODEL_NAME")
    settings = ServeSettings(**{key: given[key] for key in ("host", "allowed_hosts", "page")})
    assert (settings.host, settings.allowed_hosts, settings.page) == ("0.0.0.0", ("*",), False)
    assert f"127.0.0.1:{PORT}/healthz" in image["HEALTHCHECK"]
    assert image["EXPOSE"] == str(PORT)


def test_no_image_runs_as_root_and_what_is_copied_reaches_the_engine(stages: Any) -> None:
    for name in ("serve", "train"):
        # A number, because Kubernetes cannot tell from a name whether it is root.
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", dict(stages[name])["USER"])
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    lines = [*stages["build"], *stages["app"]]
    copied = (text.split()[:-1] for kind, text in lines if kind == "COPY")
    for source in itertools.chain.from_iterable(copied):
        assert (ROOT / source).exists()
        assert f"!{source.split('/')[0]}" in sent


def test_the_image_that_serves_installs_no_more_than_that(stages: Any) -> None:
    for image, built, extra in (("serve", "serving", "serve"), ("train", "training", "train")):
        texts = [text for kind, text in stages[image] if kind == "COPY"]
        assert texts == [f"--from={built} /opt/venv /opt/venv", "--from=app /opt/app /opt/app"]
        installed = re.findall(r"pip install .*?'(.*?)'", dict(stages[built])["RUN"])
        assert installed == [f".[{extra}]"]


def test_the_deployment_of_the_guide_fits_the_image(stages: Any) -> None:
    page = (ROOT / "docs/guides/serving.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    pod = yaml.safe_load(text)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["ports"] == [{"containerPort": PORT}]
    probes = [container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "liveness")]
    assert probes == [PORT, PORT]
    assert container["env"][0]["name"] in dict(stages["serve"])["ENV"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounts["models"] == {"name": "models", "mountPath": "/models", "readOnly": True}
    assert mounts["tmp"]["mountPath"] == "/tmp"
