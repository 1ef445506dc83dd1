"""A short training with attention by the device, beside the same training with local attention."""

from __future__ import annotations

import re
import shutil
import sysconfig
from pathlib import Path

from command import Command, Failed, json_lines
from report import Report

MOST_LOSS_DIFFERENCE = 1e-2
FILES = 120


def check(command: Command, out: Path, report: Report) -> None:
    """Losses must agree to what bf16 can give. Skipped where the subcommand has no such flags yet."""
    report.say("\ntraining: 2 steps in bf16")
    data = _corpus(out / "corpus")
    words = ["train", "--device", command.device, "--dtype", "bf16", "--steps", "2", "--data", str(data)]
    words += ["--loss-tolerance", str(MOST_LOSS_DIFFERENCE), "--json", "-"]
    try:
        lines = json_lines(command.run(*words, timeout=180))
    except Failed as error:
        if unknown := re.search(r"unexpected argument '([^']+)'", str(error)):
            report.skip(f"`outboard train` has no {unknown[1]} in this version")
        else:
            report.check("training runs", False, str(error))
        return
    summary = next((line for line in lines if line.get("kind") == "summary"), {})
    difference = summary.get("max_relative_loss_difference")
    if difference is None:
        report.check("training losses", False, "the summary has no max_relative_loss_difference")
        return
    detail = f"largest relative difference {difference:.2e}, at most {MOST_LOSS_DIFFERENCE:g}"
    report.check("training losses", difference <= MOST_LOSS_DIFFERENCE, detail)


def _corpus(folder: Path) -> Path:
    """Text that is on any machine with Python: its own library. What the command trains on by default may not be."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:FILES]:
        shutil.copyfile(source, folder / f"{source.stem}.txt")
    return folder
