r"""Kills runs and damages their files, and checks that they end like an undisturbed run.

    python benchmarks/resuming.py --kills 100 --damage 300 --full --json FILE

Kills (SIGKILL): a run on a small log, with selection, refit and export, starts in
a separate process and is killed. Another process resumes it and is killed too, until one reaches
the end. Half of the kills come after a random time. A run seldom writes, so the other half come
when a half-written file appears: a checkpoint (`epoch-3_temp`), a record, a table, a version.

Damage: a file of a run stopped in its refit, or of a finished run and its export, is emptied, cut
in half, or has a bit flipped, and the run is started again. As many cases as asked for are drawn
from all of these at random.

Full disk (needs root, to mount one in memory): a run starts on a disk that is too small, and again
each time that the disk has grown a little.

Every run must end with the weights, metrics and served answers of the undisturbed one, bit for bit,
or refuse the damaged file by its name. A full disk must give one line that names a path on it. To
save time, exports are not checked in a fresh process (`tests/serving` kills them). Needs the extra
dev. Takes some seconds per kill, damage or stop on two cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from record import parser_with_json, write_json

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf

import tfrs_pipeline as tp
from tests.damage import DAMAGES, damage
from tests.small_log import Stopped, Watched, event_table, item_table, small_config, write
from tfrs_pipeline.answers import version
from tfrs_pipeline.run.pipeline import run

HALF_WRITTEN = ("_temp", ".partial", "_work-", ".partial-")
# A run that is neither killed nor done by then counts as hanging.
MAX_SECONDS = 300.0


def config_in(folder: Path) -> tp.RunConfig:
    """Writes the log, and returns the settings of the runs in this folder."""
    data = {
        "source": "files",
        "path": write(event_table("str"), folder / "events.parquet"),
        "items_path": write(item_table("str"), folder / "items.parquet"),
        "item_features": {"genre": "categorical"},
    }
    return small_config(
        folder,
        data,
        split={"kind": "last_share", "test": 0.2, "validation": 0.1},
        training={"max_epochs": 3, "learning_rate": 0.004},
    )


def outcome_of(config: tp.RunConfig, folder: Path) -> list[Any]:
    """Runs to the end; returns what must not differ between runs."""
    result = run(config, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["sha256"], metrics["export_folder"]
    users = [f"user {number}" for number in range(40)]
    assert result.export_folder is not None
    ids, scores, _ = tp.load(result.export_folder, exact=True).retrieve_user(users, 20)
    return [repr(metrics), ids.tolist(), scores.tobytes()]


def last_weights(folder: Path) -> dict[str, bytes]:
    """Reads every variable, the optimizer's too, of the refit's last checkpoint."""
    (record,) = (folder / "checkpoints" / "two_tower" / "refit").glob("epoch-*.json")
    reader = tf.train.load_checkpoint(str(record.with_suffix("")))
    return {
        name: np.asarray(reader.get_tensor(name)).tobytes()
        for name in reader.get_variable_to_shape_map()
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
    }


def in_child(work: Callable[[], None]) -> int:
    """Starts work in a forked process, before TensorFlow is used; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
    os._exit(code)


def files_of(folder: Path) -> Iterator[Path]:
    """Lists files and folders, even if some are removed meanwhile."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in [*folders, *files])


def kill_or_end(
    child: int, place: Path, rng: np.random.Generator, run_seconds: float | None
) -> str:
    """Kills a child at a random point, or lets it end; returns the kind of kill or end."""
    if run_seconds is None:
        return "failed" if os.waitpid(child, 0)[1] else "done"
    start, wait = time.monotonic(), float(rng.uniform(0, run_seconds))
    looks, seen = bool(rng.random() < 0.5), set(files_of(place))
    num_left = int(rng.integers(1, 25))
    while time.monotonic() - start < MAX_SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "done" if status == 0 else "failed"
        if looks:
            new = {p for p in files_of(place) if any(x in p.name for x in HALF_WRITTEN)} - seen
            seen |= new
            num_left -= len(new)
            if new and num_left <= 0:
                break
        elif time.monotonic() - start > wait:
            break
        time.sleep(0 if looks else 0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "half-written file" if looks else "random time"


def stage_of(folder: Path) -> str:
    """Says how far a killed run had come, by what it left."""
    stages = {
        "export": "saved_models/films/.partial-*",
        "refit": "run/checkpoints/two_tower/refit",
        "selection": "run/checkpoints/two_tower/selection",
        "samples": "run/samples",
        "data": "run/data",
    }
    found = (name for name, pattern in stages.items() if list(folder.glob(pattern)))
    return next(found, "before the data")


def kills(folder: Path, num_kills: int) -> dict[str, Any]:
    """Kills runs again and again.

    Returns:
        "num_kills"; counts of kills "by_stage", "by_kind", and by the kinds of half-written files
        "left"; "num_runs", the runs that ended by themselves; "num_failed", those with an error;
        "num_other", those with other weights, metrics or answers.
    """
    config = config_in(folder)
    expected = folder / "expected.npy"

    def save(place: Path) -> None:
        same = outcome_of(config, folder / "run")
        np.save(place, np.array([repr(same)]))

    rng = np.random.default_rng(0)
    start = time.monotonic()
    _, status = os.waitpid(in_child(lambda: save(expected)), 0)
    if status:
        raise RuntimeError("The undisturbed run failed.")
    run_seconds, weights = time.monotonic() - start, last_weights(folder / "run")
    print(f"an undisturbed run takes {run_seconds:.1f} s", flush=True)
    reset(folder)
    by_stage, by_kind, left = Counter[str](), Counter[str](), Counter[str]()
    num_done, num_failed, num_runs, num_other = 0, 0, 0, 0
    got = folder / "got.npy"
    while num_done < num_kills or (folder / "run").exists():
        child = in_child(lambda: save(got))
        ended = kill_or_end(child, folder, rng, run_seconds if num_done < num_kills else None)
        if ended not in ("done", "failed"):
            num_done, stage = num_done + 1, stage_of(folder)
            by_kind[ended] += 1
            by_stage[stage] += 1
            for kind in HALF_WRITTEN:
                left[kind] += any(kind in path.name for path in files_of(folder))
            print(f"kill {num_done}: {ended}, in {stage}", flush=True)
            continue
        same = ended == "done" and np.load(got)[0] == np.load(expected)[0]
        same = same and last_weights(folder / "run") == weights
        num_runs, num_failed = num_runs + 1, num_failed + (ended == "failed")
        num_other += ended == "done" and not same
        print(f"run {num_runs}: {ended}, {'the same' if same else 'NOT THE SAME'}", flush=True)
        reset(folder)
    return {
        "num_kills": num_done,
        "by_stage": dict(by_stage),
        "by_kind": dict(by_kind),
        "left": dict(left),
        "num_runs": num_runs,
        "num_failed": num_failed,
        "num_other": num_other,
        "run_seconds": run_seconds,
    }


def reset(folder: Path) -> None:
    """Removes a run and its export."""
    for name in ("run", "saved_models"):
        shutil.rmtree(folder / name, ignore_errors=True)


def damages(folder: Path, num_damages: int) -> dict[str, Any]:
    """Damages files of a half-done and of a finished run, one at a time.

    Returns:
        "num_damages" of "num_possible"; by state of the run and damage, how many files had which
        outcome: "the same", "refused" by name, "other" weights, metrics or answers, "raw" errors
        that do not name the file; and "wrong", the files of the latter two.
    """
    config = config_in(folder)

    with contextlib.suppress(Stopped):
        run(config, folder / "run", progress=Watched(("two_tower, refit", 2)))
    keep(folder, "half done")
    expected = outcome_of(config, folder / "run")
    keep(folder, "finished")
    possible = [
        (state, path.relative_to(folder / "kept" / state), how)
        for state in ("half done", "finished")
        for path in sorted(files_of(folder / "kept" / state))
        for how in DAMAGES
        if path.is_file() and path.stat().st_size  # A lock is empty.
    ]
    drawn = np.random.default_rng(0).permutation(len(possible))[:num_damages]
    counts: dict[str, Counter[str]] = {}
    wrong = []
    for state, name, how in (possible[i] for i in drawn):
        reset(folder)
        shutil.copytree(folder / "kept" / state, folder, dirs_exist_ok=True)
        damage(folder / name, how)
        outcome = begin_again(config, folder, name, expected)
        counts.setdefault(f"{state}, {how}", Counter())[outcome] += 1
        line = f"{state}: {name} {how}: {outcome}"
        wrong += [line] if outcome in ("other", "raw") else []
        print(line, flush=True)
    return {
        "num_damages": len(drawn),
        "num_possible": len(possible),
        **{name: dict(count) for name, count in counts.items()},
        "wrong": wrong,
    }


def keep(folder: Path, state: str) -> None:
    """Keeps what a run has written so far."""
    for name in ("run", "saved_models"):
        if (folder / name).exists():
            shutil.copytree(folder / name, folder / "kept" / state / name)


def begin_again(config: tp.RunConfig, folder: Path, name: Path, expected: list[Any]) -> str:
    """Runs to the end; says how it ended."""
    try:
        same = outcome_of(config, folder / "run")
    except Exception as error:
        if name.name in str(error) and type(error).__module__.startswith("tfrs_pipeline"):
            return "refused"
        traceback.print_exc()
        return "raw"
    return "the same" if same == expected else "other"


def full_disk(folder: Path) -> dict[str, Any]:
    """Resumes a run on a disk that grows by 30 kB whenever it is full.

    Returns:
        "stops", counted by task; "num_raw", the stops whose message was not one line with a path
        on the disk; and "is_same", whether the run ends like an undisturbed one.
    """
    config = config_in(folder)
    expected = outcome_of(config, folder / "run")
    reset(folder)
    size, stops, num_raw = shutil.disk_usage(folder).used // 1024 + 20, Counter[str](), 0
    while True:
        subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)
        watched = Watched()
        try:
            run(config, folder / "run", progress=watched)
            break
        except Exception as error:
            task = watched.tasks[-1][0] if watched.tasks else "before the data"
            print(f"{size} kB, {task}: {error}", flush=True)
            stops[task] += 1
            num_raw += "\n" in str(error) or not str(error).startswith(str(folder))
        size += 30
    same = outcome_of(config, folder / "run")
    return {"stops": dict(stops), "num_raw": num_raw, "is_same": same == expected}


@contextlib.contextmanager
def disk() -> Iterator[Path]:
    """Mounts a disk in memory."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", folder]
        subprocess.run(mount, check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="How many (none).")
    parser.add_argument("--damage", type=int, default=0, metavar="N", help="Likewise.")
    parser.add_argument("--full", action="store_true", help="Fill disks too; needs root.")
    options = parser.parse_args()
    version.prove = lambda *arguments: None
    figures: dict[str, Any] = {}
    # First: a process that has used TensorFlow cannot be forked.
    if options.kills:
        with tempfile.TemporaryDirectory() as folder:
            figures["kills"] = kills(Path(folder), options.kills)
    if options.damage:
        with tempfile.TemporaryDirectory() as folder:
            figures["damage"] = damages(Path(folder), options.damage)
    if options.full:
        with disk() as folder_in_memory:
            figures["full"] = full_disk(folder_in_memory)
    print(figures)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
