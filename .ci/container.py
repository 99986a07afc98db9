#!/usr/bin/env python3
"""Runs the steps of Containerfile without a container engine, and tries both images.

    sudo python3 .ci/container.py

Each stage is an overlay over the stage before it, and the first base image is made by debootstrap.
Then the image `train` trains a small model, and the image `serve` serves it. Each runs as its user,
with a read-only root; the served model is read-only too. Needs root on Debian or Ubuntu with
debootstrap, about 6 GB below --folder, and the package sources of this machine's apt and pip.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PORT = 8501


@dataclass
class Image:
    """A stage: its folders, the lowest first, and the settings from its instructions."""

    layers: list[Path]
    env: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin"}
    )
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Reads (instruction, arguments) pairs; comments go and continued lines are joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line]


def words_of(text: str) -> list[str]:
    """Reads a command: a JSON list, or a line for the shell."""
    return list(json.loads(text)) if text.startswith("[") else ["/bin/sh", "-c", text]


def call(*command: str | Path, **options: object) -> str:
    """Runs a program of this machine and returns what it printed."""
    options = {"check": True, "text": True, "stdout": subprocess.PIPE, **options}
    return subprocess.run([str(word) for word in command], **options).stdout  # type: ignore


def mirror_of(suite: str) -> str:
    """Returns the mirror that this machine's apt uses for a suite."""
    listed = call("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)").splitlines()
    found = (line.split()[0] for line in listed if line.split()[1:] == [suite])
    return next(found, "") or sys.exit(f"apt knows no mirror of {suite}; apt-get update first")


def pip_settings(root: Path) -> dict[str, str]:
    """Returns this machine's pip settings as variables; copies their files below the root."""
    (root / "run" / "host").mkdir()
    env = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    pip = shutil.which("pip") or shutil.which("pip3")
    for line in call(pip, "config", "list").splitlines() if pip else ():
        name, _, value = line.partition("=")
        value, key = value.strip("'"), name.rpartition(".")[2]
        if value.startswith("/") and os.path.exists(value):
            place = root / "run" / "host" / key
            call("cp", "-rT", "--", value, place)
            value = f"/run/host/{key}"
        env[f"PIP_{key.replace('-', '_').upper()}"] = value
    return env


class Mounted:
    """An image's root, with /proc and a /dev; read-only unless there is a folder to write to.

    `volumes` are folders of this machine by their place; True means read-only.
    """

    def __init__(
        self,
        image: Image,
        at: Path,
        upper: Path | None = None,
        volumes: dict[str, tuple[Path, bool]] | None = None,
    ) -> None:
        self.image, self.at, volumes = image, at, volumes or {}
        at.mkdir(parents=True)
        places = at.with_name(f"{at.name}.places")  # Engines make them too.
        for place in ("/run", *volumes):
            (places / place.lstrip("/")).mkdir(parents=True)
        layers = [*reversed(image.layers), places] if upper else [places, *reversed(image.layers)]
        options = "lowerdir=" + ":".join(map(str, layers))
        if upper is not None:
            work = at.with_name(f"{at.name}.work")
            upper.mkdir(parents=True)
            work.mkdir()
            options += f",upperdir={upper},workdir={work}"
        call("mount", "-t", "overlay", "overlay", "-o", options, at)
        call("mount", "-t", "proc", "proc", at / "proc")
        for place in ("dev", "run"):
            call("mount", "-t", "tmpfs", "tmpfs", at / place)
        for device, minor in {"null": 3, "zero": 5, "random": 8, "urandom": 9}.items():
            call("mknod", "-m", "666", at / "dev" / device, "c", "1", str(minor))
        (at / "dev" / "shm").mkdir(mode=0o1777)
        if upper is None:
            call("mount", "-t", "tmpfs", "tmpfs", at / "tmp")
        for place, (folder, is_read_only) in volumes.items():
            call("mount", "--bind", folder, at / place.lstrip("/"))
            if is_read_only:
                call("mount", "-o", "remount,bind,ro", at / place.lstrip("/"))

    def command(self, words: list[str], **more: str) -> list[str]:
        """Returns the command that runs another in this root, as the image's user."""
        env = [f"{name}={value}" for name, value in {**self.image.env, **more}.items()]
        start = ["chroot", f"--userspec={self.image.user}", "--groups=", str(self.at)]
        return [*start, "env", "-i", "-C", self.image.workdir, *env, *words]

    def close(self) -> None:
        """Unmounts all of it."""
        call("umount", "--recursive", "--lazy", self.at)


def build(folder: Path) -> dict[str, Image]:
    """Runs the steps of all stages."""
    images: dict[str, Image] = {}
    name, mounted = "", None
    for instruction, text in instructions(ROOT / "Containerfile"):
        began = time.monotonic()
        if instruction == "FROM":
            if mounted is not None:
                mounted.close()
            base, name = text.split(" AS ")
            image = replace(images[base]) if base in images else debian(base, folder)
            image.env = dict(image.env)
            upper = folder / name / "layer"
            mounted = Mounted(image, folder / name / "root", upper)
            image.layers = [*image.layers, upper]
            images[name] = image
            host = pip_settings(mounted.at)
        elif instruction == "RUN":
            assert mounted is not None
            subprocess.run(mounted.command(words_of(text), **host), check=True)
        elif instruction == "COPY":
            assert mounted is not None
            copy(text, mounted, images, folder)
        else:
            configure(image, mounted, instruction, text)
        print(f"{time.monotonic() - began:6.1f} s  {name}: {instruction} {text[:80]}", flush=True)
    if mounted is not None:
        mounted.close()
    return images


def debian(image: str, folder: Path) -> Image:
    """Makes a base image with the contents of one such as debian:trixie-slim."""
    suite = re.fullmatch(r"debian:(\w+)-slim", image)
    assert suite is not None, f"no rule for the base image {image}"
    made = folder / "debian"
    call("debootstrap", "--variant=minbase", suite[1], made, mirror_of(suite[1]))
    return Image([made])


def copy(text: str, into: Mounted, images: dict[str, Image], folder: Path) -> None:
    """Copies files of the repository, or of another stage; a folder's content, as engines do."""
    stage = re.match(r"--from=(\w+) ", text)
    *sources, target = text[stage.end() :].split() if stage else text.split()
    place = into.at / os.path.join(into.image.workdir, target).lstrip("/")
    for source in sources:
        path = folder / stage[1] / "layer" / source.lstrip("/") if stage else ROOT / source
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            keep = None if stage else ignored
            shutil.copytree(path, place, symlinks=True, dirs_exist_ok=True, ignore=keep)
        elif target.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        else:
            shutil.copy(path, place)


def configure(image: Image, mounted: Mounted | None, instruction: str, text: str) -> None:
    """Follows an instruction that changes no file."""
    if instruction == "ENV":
        for pair in shlex.split(text):
            name, value = pair.split("=", 1)
            image.env[name] = re.sub(r"\$(\w+)", lambda found: image.env[found[1]], value)
    elif instruction == "WORKDIR":
        assert mounted is not None
        image.workdir = text
        (mounted.at / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif instruction == "USER":
        image.user = text
    elif instruction == "ENTRYPOINT":
        image.entrypoint = words_of(text)
    elif instruction == "CMD":
        image.cmd = words_of(text)
    elif instruction == "HEALTHCHECK":
        image.healthcheck = words_of(text.split("CMD ", 1)[1])
    else:
        assert instruction == "EXPOSE", f"no rule for {instruction}"


def train(image: Image, folder: Path) -> Path:
    """Trains a small model in an image; returns the folder of models."""
    data, work = folder / "data", folder / "work"
    data.mkdir()
    work.mkdir()
    os.chown(work, *map(int, image.user.split(":")))
    draw = random.Random(0).randrange
    rows = (f"{draw(50)},v{draw(100)},{1_700_000_000 + 60 * n}\n" for n in range(3000))
    (data / "clicks.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
    volumes = {"/data": (data, True), "/work": (work, False)}
    mounted = Mounted(image, folder / "train.run", volumes=volumes)
    flags = "run --data.path /data/clicks.csv --recipes none --training.max_epochs 1"
    flags += " --evaluation.baselines popularity --export.if_beaten --export.name videos"
    subprocess.run(mounted.command([*image.entrypoint, *flags.split()]), check=True)
    mounted.close()
    return work / "saved_models"


def serve(image: Image, models: Path, folder: Path) -> None:
    """Serves a model in an image, as its CMD says, and asks it."""
    mounted = Mounted(image, folder / "serve.run", volumes={"/models": (models, True)})
    began = time.monotonic()
    start = mounted.command([*image.entrypoint, *image.cmd], MODEL_NAME="videos")
    up = "ip link set lo up && exec " + shlex.join(start)
    server = subprocess.Popen(["unshare", "--net", "sh", "-c", up])
    network = ["nsenter", f"--net=/proc/{server.pid}/ns/net"]
    try:
        time.sleep(0.5)
        check = [*network, *mounted.command(image.healthcheck)]
        while subprocess.run(check, stderr=subprocess.DEVNULL).returncode:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() - began < 120, "the health check fails for two minutes"
            time.sleep(0.5)
        print(f"healthy after {time.monotonic() - began:.1f} s")
        ask = (
            "import urllib.request as r\n"
            f"url = 'http://127.0.0.1:{PORT}/v1/models/videos:predict'\n"
            """body = b'{"signature_name": "retrieve_user", "inputs": """
            """{"user_id": [7], "exclude": [[]], "k": 3}}'\n"""
            "asked = r.Request(url, body, {'Content-Type': 'application/json'})\n"
            "print(r.urlopen(asked).read().decode())"
        )
        answer = json.loads(call(*network, sys.executable, "-c", ask))
        print(answer)
        assert answer["outputs"]["is_known_user"] == [True]
        assert len(set(answer["outputs"]["candidate_ids"][0])) == 3
        write = ["sh", "-c", "touch /tmp/x && ! touch /models/x && ! touch /opt/x && id -u"]
        print("user", call(*mounted.command(write), stderr=subprocess.DEVNULL).strip())
    finally:
        server.terminate()
        assert server.wait(20) == 0, "SIGTERM did not end the server with code 0"
        mounted.close()


def main() -> None:
    """Builds the images and tries them, in a folder that is removed at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to build")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        images = build(given.inside)
        for name, image in images.items():
            sizes = call("sh", "-c", "du -sh opt/* . 2>/dev/null || true", cwd=image.layers[-1])
            print(f"{name}, user {image.user}: {' '.join(sizes.split())}")
        serve(images["serve"], train(images["train"], given.inside), given.inside)
        return
    with tempfile.TemporaryDirectory(prefix="images-", dir=given.folder) as folder:
        os.chmod(folder, 0o755)
        # Mounts exist only in a separate namespace, so removing the folder does not reach them.
        inside = ["unshare", "--mount", sys.executable, __file__, "--inside", folder]
        sys.exit(subprocess.run(inside).returncode)


if __name__ == "__main__":
    main()
