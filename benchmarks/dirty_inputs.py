"""Loads random dirty inputs whose right answer is known, and counts the outcomes.

The inputs are those of `tests/dirty_inputs.py`: click, rating, impression and funnel logs with item
tables, as CSV, zipped CSV, Parquet and pandas, each with up to three kinds of dirt. An input ends
as one of

    right     the rows kept, their values and the count of dropped rows are correct
    refused   by a message of one line that names file and column
    unnamed   refused by another message
    silent    wrong data was taken
    raw       another exception

    python benchmarks/dirty_inputs.py --inputs 10000 --json dirty_inputs.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from record import write_json

ROOT = Path(__file__).parents[1]


def load_one(seed: int) -> tuple[int, list[str], bool, str, str]:
    """Loads an input.

    Returns:
        Its seed, its dirt, whether it has a right answer, the outcome, and details of that.
    """
    sys.path[0] = str(ROOT)
    from tests.dirty_inputs import judge, make_case

    case = make_case(seed)
    folder = Path(tempfile.mkdtemp(prefix="dirty-"))
    outcome = judge(case, folder / "input")
    shutil.rmtree(folder)
    detail = f"{case.form}, {case.dirt}: {outcome.detail}"
    return seed, case.dirt or ["none"], not case.must_refuse, outcome.word, detail


def main() -> None:
    """Loads the inputs and prints the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="how many")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seconds", type=float, default=7200, help="after which none is begun")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    words: Counter[str] = Counter()
    answerable: Counter[str] = Counter()
    by_dirt: dict[str, Counter[str]] = {}
    wrong = []
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        loaded = pool.imap(load_one, range(options.inputs), chunksize=50)
        for seed, dirt, has_answer, word, detail in loaded:
            words[word] += 1
            answerable[word] += has_answer
            for name in dirt:
                by_dirt.setdefault(name, Counter())[word] += 1
            if word not in ("right", "refused"):
                wrong.append({"seed": seed, "dirt": dirt, "outcome": word})
                print(f"seed {seed}: {word}: {detail}", flush=True)
            if (seed + 1) % 500 == 0:
                print(f"{seed + 1}: {time.monotonic() - start:.0f} s, {dict(words)}", flush=True)
            if time.monotonic() - start > options.seconds:
                break
    seconds = time.monotonic() - start
    right = answerable["right"] / max(answerable.total(), 1)
    print(f"of {answerable.total()} that have a right answer, {right:.1%} got it")
    if options.json:
        figures = {
            "num_inputs": words.total(),
            "seconds": seconds,
            "outcomes": dict(words),
            "outcomes_where_there_is_a_right_answer": dict(+answerable),
            "outcomes_by_dirt": {name: dict(by_dirt[name]) for name in sorted(by_dirt)},
            "wrong": wrong,
        }
        write_json(options.json, figures, seed=0)


if __name__ == "__main__":
    main()
