"""What is printed, what is written as JSON, and whether everything passed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path


class Report:
    """Collects checks in order. Words go to standard output, or to standard error where that is for JSON."""

    def __init__(self, json_to_stdout: bool) -> None:
        self._words = sys.stderr if json_to_stdout else sys.stdout
        self.facts: dict[str, object] = {}
        self.checks: list[dict[str, object]] = []
        self.skipped: list[str] = []

    def say(self, text: str) -> None:
        """Prints a line at once: a run that is cut off should have said how far it came."""
        print(text, file=self._words, flush=True)

    def check(self, name: str, passed: bool, detail: str, *, quiet: bool = False) -> None:
        """Something that passes or fails. Quiet ones are printed when they fail."""
        self.checks.append({"check": name, "pass": passed, "detail": detail})
        if not (quiet and passed):
            self.say(f"  {'pass' if passed else 'FAIL'}  {name}: {detail}")

    def row(self, name: str, ours: float, peer: float, peer_name: str, passed: bool) -> None:
        """An error beside that of the best peer."""
        ratio = ours / peer if peer > 0.0 else (1.0 if ours == peer else math.inf)
        numbers = {"ours": _finite(ours), "peer": _finite(peer), "peer_name": peer_name, "ratio": _finite(ratio)}
        self.checks.append({"check": name, "pass": passed, **numbers})
        verdict = "pass" if passed else "FAIL"
        self.say(f"  {verdict}  {name:36} error {ours:.2e}, best of torch {peer:.2e} ({peer_name}), {ratio:.2f} times")

    def skip(self, what: str) -> None:
        """Something that was not checked, and why."""
        self.skipped.append(what)
        self.say(f"  skipped: {what}")

    def passed(self, start: str = "") -> bool:
        """Whether all checks passed whose names start so."""
        return all(c["pass"] for c in self.checks if str(c["check"]).startswith(start))

    def write(self, path: Path | None) -> None:
        """Writes everything as one JSON object, to a file or to standard output."""
        whole = {"pass": self.passed(), **self.facts, "checks": self.checks, "skipped": self.skipped}
        text = json.dumps(whole, indent=1) + "\n"
        if path is None:
            sys.stdout.write(text)
        else:
            path.write_text(text)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
