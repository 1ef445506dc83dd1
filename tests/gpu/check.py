"""Checks a GPU backend of the `outboard` command: right, repeatable, fast. See README.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("correctness", "speed", "training")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("binary", type=Path, help="the built command")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try the check itself [%(default)s]")
    parser.add_argument("--out", type=Path, help="folder for batches and report.json [a temporary one]")
    parser.add_argument("--only", action="append", choices=PARTS, help="run this part; may be repeated [all]")
    parser.add_argument("--small", action="store_true", help="small shapes, for --device cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print the report as JSON; words go to standard error")
    return parser.parse_args()


def main() -> int:
    """Runs the parts in order; zero when all passed."""
    args = arguments()
    try:
        import torch  # noqa: F401  (said here rather than as a traceback)
    except ImportError as error:
        print(f"tests/gpu: torch cannot be imported: {error}", file=sys.stderr)
        return 2
    import correctness
    import environment
    import speed
    import training
    from command import Command, Failed
    from report import Report

    started = time.monotonic()
    report = Report(args.json)
    out = args.out or Path(tempfile.mkdtemp(prefix="outboard-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    command = Command(args.binary.resolve(), args.device, environment.library_folders())
    parts = args.only or list(PARTS)
    try:
        machine = environment.describe(args.device)
        report.facts["environment"] = machine
        report.facts["outboard"] = command.version()
    except (RuntimeError, Failed) as error:
        print(f"tests/gpu: {error}", file=sys.stderr)
        return 2
    for name, value in machine.items():
        report.say(f"{name}: {value}")
    report.say(f"outboard: {report.facts['outboard']}")
    if "correctness" in parts:
        correctness.check(command, out / "batches", report, small=args.small, seed=args.seed)
    if "speed" in parts:
        if args.device == "cpu":
            report.skip("speed is measured on GPUs only")
        else:
            speed.check(command, report)
    if "training" in parts:
        training.check(command, out, report)
    failed = [c for c in report.checks if not c["pass"]]
    report.facts["seconds"] = round(time.monotonic() - started, 1)
    report.say(f"\n{len(report.checks) - len(failed)} passed, {len(failed)} failed, {len(report.skipped)} skipped")
    for check in failed:
        report.say(f"  FAIL  {check['check']}")
    report.say(f"{report.facts['seconds']} s; batches that failed and report.json are in {out}")
    report.write(out / "report.json")
    if args.json:
        report.write(None)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
