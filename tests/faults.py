"""Break the code on purpose, one line of faults.txt at a time, and expect its tests to fail.

A fault that no test notices is a claim that no test holds. The working tree itself is never touched: every
worker breaks, tests and mends a copy of its own. Knows nothing of what the product does.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SEPARATOR = ":::"
RUN_LIMIT_S = 300.0
"""Longer than this is a hang that even pytest's own time limit did not end [s]."""

COLLECTION_FAILURE = "collection failure"
"""What pytest's report says of a file that cannot be imported."""

NOTHING_COLLECTED = 5
"""pytest's exit status."""

PASSED = "the tests passed"
FAILED = "a test failed"
UNIMPORTABLE = "the code no longer imports, so no test judged it"
NOT_RUN = "pytest could not run the selection"
SKIPPED = "every test was skipped"
HUNG = f"the tests did not end within {RUN_LIMIT_S:.0f} s"


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of faults.txt."""

    line: int
    path: str
    original: str
    replacement: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"faults.txt:{self.line}  {self.path}: {self.original}  ->  {self.replacement or '(nothing)'}"


def read_faults(text: str) -> list[Fault]:
    """Parse the lines of faults.txt.

    Raises:
        ValueError: a line does not have four parts, or changes nothing; the message names the line.
    """
    faults = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split(SEPARATOR)]
        if len(parts) != 4 or not all((parts[0], parts[1], parts[3])):
            raise ValueError(f"faults.txt:{number}: write FILE ::: ORIGINAL ::: REPLACEMENT ::: TESTS")
        path, original, replacement, tests = parts
        if original == replacement:
            raise ValueError(f"faults.txt:{number}: the replacement is the original; nothing would break")
        faults.append(Fault(number, path, original, replacement, tuple(shlex.split(tests))))
    return faults


def misplaced(fault: Fault, root: Path) -> str | None:
    """Say why the fault cannot be put into the file, or None if it can."""
    try:
        text = (root / fault.path).read_text(encoding="utf-8")
    except OSError as error:
        return f"cannot read {fault.path}: {error.strerror}"
    if text.count(fault.original) != 1:
        return f"the original text occurs {text.count(fault.original)} times in {fault.path}, not once"
    return None


def copy_tree(root: Path, copy: Path) -> None:
    """Copy what git tracks or would track: no environment, data set, cache or run comes along.

    Raises:
        subprocess.CalledProcessError: `root` is not a git work tree.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():  # a tracked file may be deleted in the working tree
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)


def run_tests(copy: Path, tests: Sequence[str]) -> str:
    """Run a selection in the copy and say how it ended: one of the constants above.

    Writes its report beside the copy.

    Exit codes do not suffice: pytest ends with 1 for a failed test and, under -x, also for a file that cannot
    be imported. Its report tells them apart.
    """
    report = copy.with_name("report.xml")
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *tests,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(copy),  # precedes an editable install of the working tree
        "PYTHONDONTWRITEBYTECODE": "1",  # without bytecode files none can be stale
        "PYTEST_DEBUG_TEMPROOT": str(report.parent),  # runs side by side leave each other's files alone
    }
    with subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            code = process.wait(RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            return HUNG
        finally:
            if process.poll() is None:  # too slow, or somebody stops this tool
                os.killpg(process.pid, 9)  # its own session: servers that the tests started end with it
    cases = list(ET.parse(report).getroot().iter("testcase")) if report.exists() else []
    # A file that skips itself ends like a selection that is empty, but with a case in the report.
    if cases and code in {0, NOTHING_COLLECTED} and all(case.find("skipped") is not None for case in cases):
        return SKIPPED
    if code == 0:
        return PASSED
    verdicts = [
        verdict.get("message") for case in cases for verdict in (*case.iter("failure"), *case.iter("error"))
    ]
    if code == 1 and any(verdict != COLLECTION_FAILURE for verdict in verdicts):
        return FAILED
    return UNIMPORTABLE if COLLECTION_FAILURE in verdicts else NOT_RUN


def run_or_rerun_tests(copy: Path, tests: Sequence[str]) -> str:
    """As `run_tests`, and once more where it could not run: the machine may have been the reason."""
    end = run_tests(copy, tests)
    return run_tests(copy, tests) if end in {NOT_RUN, HUNG} else end


def break_and_test(copy: Path, fault: Fault) -> str:
    """Put the fault into the copy, run its tests, mend the copy; say how the tests ended."""
    path = copy / fault.path
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(fault.original, fault.replacement), encoding="utf-8")
    try:
        return run_or_rerun_tests(copy, fault.tests)
    finally:
        path.write_text(whole, encoding="utf-8")


def sample(faults: Sequence[Fault], n: int, root: Path) -> list[Fault]:
    """Choose some, in order: always the same for a commit, others for the next.

    Raises:
        subprocess.CalledProcessError: `root` is not a git work tree with a commit.
    """
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True)
    chosen = random.Random(head.stdout).sample(list(faults), min(n, len(faults)))
    return sorted(chosen, key=lambda fault: fault.line)


def examine(
    root: Path, faults: Sequence[Fault], workers: int, say: Callable[[str], None], n: int | None = None
) -> int:
    """Try every fault, or some, and tell of each that was not noticed.

    Args:
        root: The working tree to copy.
        faults: What to break, in order.
        workers: How many copies are tested at a time.
        say: Takes each line of the report.
        n: How many to try; every one where None. A line that cannot be put into its file is told either way.

    Returns:
        How many faults were tried and not noticed by a failing test, for whatever reason. Where every test is
        skipped, because this machine lacks what it needs, nothing was tried.

    Cost: one pytest run per distinct selection on the unbroken code, and one per fault.
    """
    begun_s = time.monotonic()
    ill = {fault: reason for fault in faults if (reason := misplaced(fault, root))}
    n_misplaced = len(ill)
    sound = [fault for fault in faults if fault not in ill]
    if n is not None:
        sound = sample(sound, n, root)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        mine = threading.local()

        def copy_of_this_worker() -> Path:
            if not hasattr(mine, "copy"):
                mine.copy = Path(tempfile.mkdtemp(dir=folder)) / "tree"
                copy_tree(root, mine.copy)
            return Path(mine.copy)

        with ThreadPoolExecutor(workers) as pool:
            selections = list(dict.fromkeys(fault.tests for fault in sound))
            unbroken = dict(
                zip(
                    selections,
                    pool.map(lambda tests: run_or_rerun_tests(copy_of_this_worker(), tests), selections),
                    strict=True,
                )
            )
            ready = [fault for fault in sound if unbroken[fault.tests] == PASSED]
            untried = [fault for fault in sound if unbroken[fault.tests] == SKIPPED]
            ill |= {
                fault: f"on the unbroken code: {unbroken[fault.tests]}"
                for fault in sound
                if unbroken[fault.tests] not in {PASSED, SKIPPED}
            }
            ends = pool.map(lambda fault: break_and_test(copy_of_this_worker(), fault), ready)
            for fault, end in zip(ready, ends, strict=True):
                say(f"{'noticed ' if end == FAILED else 'SURVIVED'}  {fault}")
                if end != FAILED:
                    ill[fault] = end
    say("")
    for fault in sorted(ill, key=lambda fault: fault.line):
        say(f"{fault}\n    {ill[fault]}; tests: {shlex.join(fault.tests)}")
    for fault in untried:
        say(f"untried (skipped)  {fault}\n    tests: {shlex.join(fault.tests)}")
    n_tried = n_misplaced + len(sound) - len(untried)
    say(
        f"{n_tried - len(ill)} of {n_tried} faults noticed, {len(untried)} untried (skipped), "
        f"in {time.monotonic() - begun_s:.0f} s."
    )
    return len(ill)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run from the command line; the exit status is 0 when every fault that was tried was noticed, else 1."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument(
        "only", nargs="*", help="run only the lines that match one of these regular expressions"
    )
    parser.add_argument(
        "-j", dest="workers", type=int, default=2, help="copies tested at a time (default: 2)"
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="try only N of them, others for each commit, and place them all",
    )
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    root = Path(__file__).resolve().parent.parent
    try:
        faults = read_faults((root / "tests" / "faults.txt").read_text(encoding="utf-8"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    chosen = [
        fault
        for fault in faults
        if not options.only
        or any(re.search(wanted, str(fault) + shlex.join(fault.tests)) for wanted in options.only)
    ]
    if not chosen:
        print("No line of tests/faults.txt matches.", file=sys.stderr)
        return 1
    n_ill = examine(root, chosen, options.workers, lambda line: print(line, flush=True), options.sample)
    return 1 if n_ill else 0


if __name__ == "__main__":
    sys.exit(main())
