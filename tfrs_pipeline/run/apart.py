"""Measures the baselines of a run in another process, so that no failure of one ends the run.

Linear algebra over all pairs of items runs in native code: where that crashes, or memory runs out,
no `except` helps. The other process fits and measures one baseline after another, and sends each
result as soon as it has it. If it dies, the baseline at work is left out, and a new process goes on
with the rest. If it cannot even begin, none is measured, and the next call of the run tries again.
"""

import contextlib
import dataclasses
import multiprocessing
import re
import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from tfrs_pipeline.cluster import BASELINES_PROCESS
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.durable import read_whole, write_record
from tfrs_pipeline.evaluation.baselines import BASELINES, Baseline
from tfrs_pipeline.evaluation.metrics import BUILT_IN, METRICS
from tfrs_pipeline.evaluation.results import Evaluation
from tfrs_pipeline.messages import printable
from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.run.data import RunData
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.measure import MeasuredBaselines, baselines_of, evaluate_all, fit_best
from tfrs_pipeline.run.steps import Runner

Answer: TypeAlias = tuple[Evaluation, list[str]] | str
"""The evaluation of a baseline, with notes; or, as a text, why there is none."""
Choices: TypeAlias = Mapping[str, Sequence[Baseline]]


class Failure(str):
    """Why a baseline was not measured, unless it refused the data, such as too many items."""


class NotBegun(Failure):
    """Why the process of the baselines did not begin, which says nothing about any of them."""


def measure_baselines(
    config: RunConfig, folder: RunFolder, runner: Runner, data: RunData
) -> MeasuredBaselines:
    """Measures the baselines of a config in another process; notes each that is left out and why.

    A baseline that failed is recorded in the folder, so that a resumed run does not fail again.
    """
    record: dict[str, Any] = read_whole(folder.left_out_file) or {"baselines": {}}
    failed = record.setdefault("failed", {})
    again = f"(it is not tried again; to do so, delete {folder.left_out_file})"
    left_out = {name: f"{why} {again}" for name, why in record["baselines"].items()}
    choices = {
        name: forms for name, forms in baselines_of(config, data).items() if name not in left_out
    }
    evaluations, answers = [], answers_from_process(config, folder.path, data, choices)
    for number, name in enumerate(choices):
        runner.progress.task(f"baseline {name}", number, len(choices))
        answer = next(answers)
        if isinstance(answer, str):
            left_out[name] = answer
            if isinstance(answer, Failure):
                failed[name] = answer
            if not isinstance(answer, NotBegun):
                record["baselines"][name] = answer
                write_record(folder.left_out_file, record)
        else:
            evaluations.append(answer[0])
            runner.note(*answer[1])
    runner.note(*(f"{name} is left out: {why}" for name, why in left_out.items()))
    named, by = config.evaluation.baselines, "evaluation.baselines"
    for name, preset in PRESETS.items():
        if preset.settings.get("evaluation.baselines") == named:
            by = f"the preset {name}"
    runner.note(*(f"{name}: left out by {by}" for name in BASELINES if name not in named))
    return MeasuredBaselines(evaluations, left_out, failed)


def answers_from_process(
    config: RunConfig, folder: Path, data: RunData, choices: Choices
) -> Iterator[Answer]:
    """Yields what `answers` does, from a process that is begun anew if it dies."""
    # The log stays on disk, and the samples of the training are not needed.
    unused = dict.fromkeys(("split", "selection", "final"))
    data = dataclasses.replace(data, **unused)  # type: ignore[arg-type]
    custom_metrics = {name: metric for name, metric in METRICS.items() if name not in BUILT_IN}
    # Spawned: a fork copies the locks that TensorFlow's threads hold, but not the threads.
    pending, spawn = dict(choices), multiprocessing.get_context("spawn")
    while pending:
        ours, theirs = spawn.Pipe()
        # A daemon does not outlive the run.
        process = spawn.Process(
            target=_send_answers, args=(theirs,), name=BASELINES_PROCESS, daemon=True
        )
        process.start()
        theirs.close()  # The process then holds the only copy, so `recv` ends when it does.
        has_begun = False
        try:
            has_begun = ours.recv()
            # Not an argument: `start` would wait forever for a process that dies before it reads.
            ours.send((custom_metrics, memory_left(), config, folder, data, pending))
            while pending:
                answer = ours.recv()
                del pending[next(iter(pending))]
                if not pending:
                    process.join(timeout=10)  # It ends by itself, and gives back what it holds.
                yield answer
        except (EOFError, OSError):
            process.join()
            code = process.exitcode or 0
            if not has_begun and code >= 0:  # Not for want of memory, so it would fail each time.
                yield from [NotBegun(_why_not_begun(code, folder))] * len(pending)
                return
            # Answers come in order, so the process died at the first one that is pending.
            del pending[next(iter(pending))]
            yield Failure(_cause_of_death(code))
        finally:  # Native code does not listen to Ctrl-C.
            process.kill()


def _send_answers(to: Connection) -> None:
    to.send(True)  # The program has been imported again.
    metrics, num_bytes, *task = to.recv()
    METRICS.update(metrics)  # Those that users have added.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The run ends this process.
    _limit_memory(num_bytes)
    for answer in answers(*task):
        to.send(answer)


def answers(config: RunConfig, folder: Path, data: RunData, choices: Choices) -> Iterator[Answer]:
    """Fits and measures baselines in order, on the log in a run's folder."""
    run = RunFolder(folder)
    # The run itself has checked these files.
    log = Log.read(run.data, connect(config.data.memory_limit), check_files=False)
    split = Split.read(log, run.split)
    data = dataclasses.replace(data, split=split)

    def answer(name: str) -> Answer:
        try:
            fitted, notes = fit_best(name, choices[name], config, data)
            return evaluate_all(config, {name: fitted}, data), notes
        except ValueError as error:  # A refusal, such as of too many items.
            return str(error)
        except Exception as error:  # Whatever it is, it concerns this baseline alone.
            return Failure(f"{type(error).__name__}: {error}")

    yield from map(answer, choices)  # Each is freed before the next one is fitted.


def memory_left(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns how many bytes processes may still take, of the machine's or the container's."""
    left = 1024 * _number("MemAvailable: *", proc / "meminfo")
    with contextlib.suppress(OSError, IndexError):  # No container, or one without a limit.
        cached = _number("^inactive_file ", group / "memory.stat")  # Given back when needed.
        used = _number("", group / "memory.current") - cached
        left = min(left, _number("^", group / "memory.max") - used)
    return left


def _limit_memory(num_bytes: int) -> None:
    """Lets allocations fail beyond what is left, and the system end this process first."""
    # A lower limit may be set already, or a sandbox may refuse both.
    with contextlib.suppress(OSError, ValueError, IndexError):
        Path("/proc/self/oom_score_adj").write_text("1000")
        most = num_bytes + 1024 * _number(r"VmData:\s*", Path("/proc/self/status"))
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _number(before: str, path: Path) -> int:
    """Finds the number after a pattern in a file of the system; an `IndexError` without one."""
    return int(re.findall(rf"{before}(\d+)", path.read_text(), re.MULTILINE)[0])


def _cause_of_death(code: int) -> str:
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    why = " (where memory runs out, the system sends it)" if code == -signal.SIGKILL else ""
    return f"its process ended with {how}{why}"


def _why_not_begun(code: int, folder: Path) -> str:
    """Explains the end of a process that first imports the program that was started."""
    errors = folder / "native.log"  # The command line lets the process write there.
    lines = errors.read_text(errors="replace").splitlines() if errors.exists() else []
    last = f". The last line of {errors}: {printable(lines[-1], 200)}" if lines else ""
    return (
        f"{_cause_of_death(code)} while importing the program again: what that does belongs below "
        f'`if __name__ == "__main__":`. Then go on with --run-dir {folder}, which tries the '
        f"baselines again{last}"
    )
