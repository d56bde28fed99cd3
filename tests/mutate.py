"""Do the tests bite?  Plants each fault of mutations.txt in a copy of the project and runs the tests there.

    python tests/mutate.py [-j JOBS] [--quick] [WORDS]      only faults whose headline has all the words

Prints one line a fault.  Fails when a fault survives, when its text is not there any more, or when the tests
fail without one.  Takes minutes: for before a release, not for each commit."""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
# Those that notice most in the least time; what they miss, all the others get to see.
FIRST = ["ledger_cases", "payments", "videos", "accounts", "storage", "bad_input", "schema", "database"]
FIRST += ["crashes", "billing", "payments_model", "ledger"]  # models look long for the smallest example
SLOW = 600  # seconds; a fault that makes the tests hang was noticed


class Fault:
    def __init__(self, text):
        headline, *lines = text.splitlines()
        self.file, self.name = headline.split(": ", 1)
        self.swaps, before = [], ""  # (lines that are there, lines that they become)
        for sign, line in ((line[0], line[2:]) for line in lines if line.strip()):
            if sign == "-" != before:
                self.swaps.append(([], []))
            self.swaps[-1][sign == "+"].append(line)
            before = sign

    def plant(self, folder):
        """False when its text is not there, or more than once."""
        path = folder / self.file
        text = path.read_text()
        for lines in self.swaps:
            old, new = map("\n".join, lines)
            if text.count(old) != 1:
                return False
            text = text.replace(old, new)
        path.write_text(text)
        return True


def faults(words):
    text = (HERE / "tests/mutations.txt").read_text()
    found = [Fault(part.strip("\n")) for part in re.split(r"^== ", text, flags=re.M)[1:]]
    return [fault for fault in found if all(word in fault.name for word in words)]


def copy_project(folder):
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=HERE, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (HERE / name).is_file():
            target.write_bytes((HERE / name).read_bytes())


def run_tests(folder, files):
    """The line that tells which test failed, or None when none did."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    environ = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder.parent)}
    try:
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=SLOW)
    except subprocess.TimeoutExpired:
        return "the tests hang"
    told = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return None if done.returncode == 0 else (told or done.stdout.splitlines() or [done.stderr])[-1][:150]


def all_files(folder):
    """Those that notice most, and the others."""
    first = [f"tests/test_{name}.py" for name in FIRST if (folder / f"tests/test_{name}.py").exists()]
    rest = sorted(str(file.relative_to(folder)) for file in folder.glob("tests/test_*.py"))
    return first, [file for file in rest if file not in first]


def judge(fault, quick):
    with tempfile.TemporaryDirectory(prefix="mutate-") as base:
        folder = Path(base) / "project"
        copy_project(folder)
        began = time.monotonic()
        if fault and not fault.plant(folder):
            return "MISSING", "its text is not there once", 0
        first, rest = all_files(folder)
        noticed = run_tests(folder, first) or (not quick and run_tests(folder, rest))
        return "killed" if noticed else "SURVIVED", noticed or "", time.monotonic() - began


def main():
    options = argparse.ArgumentParser()
    options.add_argument("-j", type=int, default=2)
    options.add_argument("--quick", action="store_true", help="only the tests that notice most")
    options.add_argument("words", nargs="*")
    options = options.parse_args()
    chosen, bad = faults(options.words), 0
    outcome, told, seconds = judge(None, options.quick)
    print(f"without a fault: {told or 'all pass'} ({seconds:.0f} s)", flush=True)
    if outcome == "killed":
        sys.exit("The tests have to pass first.")
    with concurrent.futures.ThreadPoolExecutor(options.j) as pool:
        judged = pool.map(judge, chosen, [options.quick] * len(chosen))
        for fault, (outcome, told, seconds) in zip(chosen, judged, strict=True):
            print(f"{outcome:8} {seconds:4.0f} s  {fault.file}: {fault.name}  {told}", flush=True)
            bad += outcome != "killed"
    print(f"{len(chosen) - bad} of {len(chosen)} noticed")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
