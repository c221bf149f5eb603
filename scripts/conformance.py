"""
Runs Transformers' own test-suite on every model class and prints what came of it as a table.

    python scripts/conformance.py                                            # a few minutes on two cores
    python scripts/conformance.py --output scripts/results/conformance.md    # the record that lies beside this script
    python scripts/conformance.py -k Relative                                # some of it; any pattern that pytest knows
    python scripts/conformance.py --show                                     # that record, a line a suite and class

`bash scripts/test.sh` fetches the suite and runs the fastest part of it.
"""

import os
import re
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated


# What the suite calls slow is left to those who ask, and needs an accelerator anyway; it should say so.
os.environ["RUN_SLOW"] = "1"

import pytest
import torch
import typer


ROOT = Path(__file__).parents[1]
OUTCOMES = ("passed", "skipped", "failed")
SUITES = {
    "ModelTesterMixin": "models",
    "ConfigTests": "configurations",
    "TrainingTesterMixin": "training",
    "TensorParallelTesterMixin": "tensor parallelism",
    "FSDPTesterMixin": "FSDP2",
}
HARDWARE = re.compile(r"accelerator|GPU|MPS|Flash Attention|kernels|deepspeed|torchao|bitsandbytes")


class Record:
    """A pytest plugin that counts outcomes by suite and class."""

    def __init__(self):
        self.rows = {}  # test id -> row of the table
        self.outcomes = {}  # test id -> the worst that happened in it
        self.seconds = Counter()
        self.reasons = defaultdict(set)

    def pytest_collection_modifyitems(self, items):
        for item in items:
            self.rows[item.nodeid] = self.row(item.cls)

    @staticmethod
    def row(tests: type) -> tuple[str, str, str]:
        suite = next(SUITES[base.__name__] for base in tests.__mro__ if base.__name__ in SUITES)
        if suite == "models":
            (subject,) = tests.all_model_classes
        elif suite == "configurations":
            subject = tests.model_tester.config_class
        else:
            subject = tests.model_tester.conditional_generation_class
        recipe = re.search("(Classic|Relative|Context|Feeding)?$", tests.__name__)[0].lower()
        return suite, subject.__name__, recipe or "default"

    def pytest_runtest_logreport(self, report):
        row = self.rows[report.nodeid]
        self.seconds[row] += report.duration
        if report.when == "call" or not report.passed:
            before = self.outcomes.get(report.nodeid, "passed")
            self.outcomes[report.nodeid] = max(before, report.outcome, key=OUTCOMES.index)
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            reason = re.sub(r"<class '[^']*'>|\bDragoman[A-Z]\w+|\bDragoman\b", "the class", reason)
            self.reasons[reason].add(report.nodeid)

    def markdown(self) -> str:
        counts = defaultdict(Counter)
        for test, outcome in self.outcomes.items():
            counts[self.rows[test]][outcome] += 1
        lines = [
            f"transformers {version('transformers')}, torch {torch.__version__}, {os.cpu_count()} cores, "
            f"{'with' if torch.cuda.is_available() else 'without'} a GPU: `python scripts/conformance.py`",
            "",
            "| suite | class | recipe | passed | skipped | failed | seconds |",
            "|---|---|---|---:|---:|---:|---:|",
        ]
        for row, count in counts.items():
            numbers = [str(count[outcome]) for outcome in OUTCOMES]
            lines.append(f"| {' | '.join([*row, *numbers])} | {self.seconds[row]:.1f} |")
        totals = [str(sum(count[outcome] for count in counts.values())) for outcome in OUTCOMES]
        lines += [f"| all | | | {' | '.join(totals)} | {sum(self.seconds.values()):.1f} |", ""]
        lines += ["| tests skipped | why | which |", "|---:|---|---|"]
        hardware = set().union(*(tests for reason, tests in self.reasons.items() if HARDWARE.search(reason)))
        lines.append(f"| {len(hardware)} | hardware, or a library that drives it, is not there | |")
        for reason, tests in sorted(self.reasons.items(), key=lambda item: -len(item[1])):
            if not HARDWARE.search(reason):
                names = sorted({re.sub(r"_\d+_.*|^.*::", "", test) for test in tests})
                lines.append(f"| {len(tests)} | {reason} | {', '.join(names[:2])}{', ...' * (len(names) > 2)} |")
        failed = [f"- failed: {test}" for test, outcome in self.outcomes.items() if outcome == "failed"]
        return "\n".join([*lines, *([""] if failed else []), *failed, ""])


RECORD = ROOT / "scripts" / "results" / "conformance.md"


def summary(record: str) -> str:
    """The recorded table with one line for each suite and class, its recipes added up."""
    table = record.split("\n\n")[1].splitlines()
    counts = defaultdict(Counter)
    for line in table[2:]:
        suite, subject, _, *numbers, _ = (cell.strip() for cell in line.strip("|").split("|"))
        counts[suite, subject].update(dict(zip(OUTCOMES, map(int, numbers), strict=True)))
    lines = ["| suite | class | passed | skipped | failed |", "|---|---|--:|--:|--:|"]
    lines += [
        f"| {' | '.join(row)} | {' | '.join(str(count[outcome]) for outcome in OUTCOMES)} |"
        for row, count in counts.items()
    ]
    return "\n".join(lines)


def main(
    k: Annotated[str, typer.Option("-k", help="Run the tests that match this pattern of pytest.")] = "",
    output: Annotated[Path | None, typer.Option(help="Write the table there, too.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print what was recorded instead, without the reasons.")] = False,
):
    """Run Transformers' own test-suite on every model class."""
    if show:
        print(summary(RECORD.read_text()))
        return
    record = Record()
    os.chdir(ROOT)
    code = pytest.main(["tests/conformance/classes.py", "--tb=short", "-k", k], plugins=[record])
    table = record.markdown()
    print(f"\n{table}")
    if output is not None:
        output.write_text(table)
    sys.exit(code)


if __name__ == "__main__":
    typer.run(main)
