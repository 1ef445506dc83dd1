"""The `outboard` command as this check uses it: files in, files and JSON lines out."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


class Failed(Exception):
    """The command ended with an error, did not end, or printed what it should not."""


@dataclass(frozen=True)
class Command:
    """The binary, and what it must know of this machine."""

    binary: Path
    device: str
    library_folders: list[str] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """This process's, with the folders of the libraries that torch bundles, behind those that a user names."""
        folders = [f for f in os.environ.get("OUTBOARD_CUDA_LIBRARIES", "").split(":") if f]
        folders += [f for f in self.library_folders if f not in folders]
        environment = dict(os.environ)
        if folders:
            environment["OUTBOARD_CUDA_LIBRARIES"] = ":".join(folders)
        return environment

    def run(self, *arguments: str, timeout: float) -> str:
        """Standard output of a run that succeeds; an error has the last of what it said."""
        words = [str(self.binary), *arguments]
        shown = " ".join(words)
        try:
            done = subprocess.run(
                words,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(f"`{shown}` did not end within {timeout:.0f} s") from error
        except OSError as error:
            raise Failed(f"`{shown}` cannot be started: {error}") from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()[-2000:]
            raise Failed(f"`{shown}` ended with {done.returncode}: {said}")
        return done.stdout.decode(errors="replace")

    def version(self) -> str:
        """What the binary calls itself, which also shows that it runs on this machine at all."""
        return self.run("--version", timeout=30).strip()

    def compute(self, folder: Path, *more: str) -> Computed:
        """Computes the batch in `folder`, whose results are there afterwards."""
        # Results of a run before must not pass for those of this one.
        for suffix in RESULTS:
            for stale in folder.glob(f"*.{suffix}"):
                stale.unlink()
        arguments = ["compute", str(folder), "--device", self.device, "--json", *more]
        lines = json_lines(self.run(*arguments, timeout=300))
        total = next((line for line in lines if line.get("kind") == "total"), None)
        if total is None:
            raise Failed(f"`outboard compute {folder}` printed no line of kind total")
        ids = {line["name"]: line["numerics_id"] for line in lines if line.get("kind") == "task"}
        written = {path.name: path.read_bytes() for suffix in RESULTS for path in sorted(folder.glob(f"*.{suffix}"))}
        return Computed(ids, float(total["seconds"]), str(total["device"]), written)


RESULTS = ("o", "lse_out", "dq", "dk", "dv")


@dataclass
class Computed:
    """What a run of `outboard compute` gave: numerics ids by task, and every result file by name."""

    numerics_ids: dict[str, str]
    seconds: float
    device: str
    files: dict[str, bytes]


def json_lines(text: str) -> list[dict]:
    """The JSON objects that a command printed: one a line, or a single one over many lines."""
    try:
        whole = json.loads(text)
        return [whole] if isinstance(whole, dict) else [o for o in whole if isinstance(o, dict)]
    except ValueError:
        pass
    lines = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise Failed(f"a line is no JSON ({error}): {line[:200]}") from error
    return lines
