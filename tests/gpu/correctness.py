"""Results against f64, beside torch's own kernels, and bits against bits."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

import cases
import peers
import reference
from cases import Case
from command import Command, Computed, Failed
from report import Report

# A kernel may be this much worse than the best of torch's own.
MOST_OVER_PEER = 2.0
# Largest absolute error of an LSE, plus a share of it: it is summed in f32 everywhere.
LSE_ERROR, LSE_SHARE = 1e-3, 1e-5
# Error that counts as none, relative: far below what 16 bits can hold, above what f32 sums and exp differ by.
NOISE = 1e-5


@dataclass
class Subject:
    """A case with what it is judged by. Inputs are drawn again where needed, so that all cases together stay small."""

    case: Case
    reference: reference.Reference
    best: dict[str, tuple[float, str]] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)


def check(command: Command, out: Path, report: Report, *, small: bool, seed: int) -> None:
    """Every batch of cases."""
    torch_device = command.device
    for name, batch in cases.batches(small, seed).items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        report.say(f"\n{name}: {len(batch)} cases, both directions in one batch")
        subjects, entries = [], []
        for case in batch:
            tensors = cases.draw(case, torch_device)
            subject = Subject(case, reference.compute(case, tensors))
            _measure_peers(subject, tensors)
            given = subject.reference
            entries += cases.write(folder, case, tensors, given.final_lse, given.final_d)
            # Kept until results are judged; those of a GPU would add up.
            _move(subject.reference, "cpu")
            subjects.append(subject)
        cases.write_batch(folder, entries)
        if torch_device != "cpu":
            # The command shares the GPU with this process, which would hold on to all that it ever took.
            torch.cuda.empty_cache()
        try:
            computed = command.compute(folder)
        except Failed as error:
            report.check(f"{name} computes", False, str(error))
            entries = _accepted(command, folder, entries, report)
            cases.write_batch(folder, entries)
            if not entries:
                continue
            try:
                computed = command.compute(folder)
            except Failed as again:
                report.check(f"{name} computes without what is refused", False, str(again))
                continue
        report.say(f"  {computed.device}, {computed.seconds:.3f} s, {sorted(set(computed.numerics_ids.values()))}")
        for subject in subjects:
            _judge(subject, computed, report)
        _check_bits(command, folder, name, computed, report)
        if report.passed(name):
            # Inputs of what passed are of no use, and large.
            shutil.rmtree(folder, ignore_errors=True)


def _move(given: reference.Reference, device: str) -> None:
    for name, value in vars(given).items():
        if isinstance(value, torch.Tensor):
            setattr(given, name, value.to(device))


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the error over that of what was expected; absolute where that is zero."""
    return _relative((actual - expected).norm().item(), expected)


def _relative(error: float, expected: torch.Tensor) -> float:
    if math.isnan(error):
        return math.inf
    size = expected.norm().item()
    return error / size if size > 0.0 else error


def _measure_peers(subject: Subject, tensors: cases.Tensors) -> None:
    given = subject.reference
    for peer in peers.compute(subject.case, tensors, given):
        if peer.output is None:
            subject.refusals.append(f"{peer.name}: {peer.refusal}")
            continue
        for tensor, actual in peer.output.items():
            error = error_of(actual, getattr(given, tensor))
            if math.isfinite(error) and error <= subject.best.get(tensor, (math.inf, ""))[0]:
                subject.best[tensor] = (error, peer.name)


def _judge(subject: Subject, computed: Computed, report: Report) -> None:
    case, given = subject.case, subject.reference
    for direction, names in (("forward", ("o", "lse")), ("backward", ("dq", "dk", "dv"))):
        if f"{case.name}.{direction}" not in computed.numerics_ids:
            # Refused, and said so.
            continue
        for tensor in names:
            expected = getattr(given, tensor)
            file = f"{case.name}.{direction}.{'lse_out' if tensor == 'lse' else tensor}"
            label = f"{case.name} {tensor}"
            data = computed.files.get(file)
            if data is None:
                report.check(label, False, f"{file} was not written")
                continue
            actual = cases.values(data, tuple(expected.shape), "cpu")
            if tensor == "lse":
                _judge_lse(label, actual, expected, report)
                continue
            _judge_empty_rows(label, tensor, actual, given, report)
            ours = error_of(actual, expected)
            # Where terms cancel, as for a row with one key, the size of the result says nothing of its rounding.
            noise = NOISE + _relative(given.floor.get(tensor, 0.0), expected)
            peer, name = subject.best.get(tensor, (math.nan, "none"))
            # Without a peer there is nothing to be judged by, which is a fault of this check.
            passed = ours <= MOST_OVER_PEER * peer + noise
            report.row(label, ours, peer, name, passed)
            if name == "none":
                report.say(f"    no peer: {'; '.join(subject.refusals)}")


def _judge_empty_rows(
    label: str, tensor: str, actual: torch.Tensor, given: reference.Reference, report: Report
) -> None:
    """Rows without keys add nothing to a merge only if they are zero, not nearly so; a norm would not show it."""
    empty = torch.isneginf(given.lse)
    if tensor in ("o", "dq") and empty.any():
        passed = not actual[empty].any().item()
        report.check(f"{label} of rows without keys", passed, "all zero" if passed else "not zero", quiet=True)


def _judge_lse(label: str, actual: torch.Tensor, expected: torch.Tensor, report: Report) -> None:
    empty = torch.isneginf(expected)
    if not torch.equal(empty, torch.isneginf(actual)):
        report.check(label, False, "rows without keys must have an LSE of -inf, and no other rows")
        return
    error = (actual - expected)[~empty].abs()
    allowed = LSE_ERROR + LSE_SHARE * expected[~empty].abs()
    worst = error.max().item() if error.numel() else 0.0
    # Not `any(error > allowed)`, which NaN passes.
    report.check(label, bool((error <= allowed).all()), f"largest error {worst:.2e}", quiet=True)


def _check_bits(command: Command, folder: Path, name: str, computed: Computed, report: Report) -> None:
    for what, flags in (("alone", ["--alone"]), ("again", [])):
        try:
            other = command.compute(folder, *flags)
        except Failed as error:
            report.check(f"{name} {what}", False, str(error))
            continue
        differ: dict[str, list[str]] = {"forward": [], "backward": []}
        for file, data in computed.files.items():
            direction = "forward" if file.endswith((".o", ".lse_out")) else "backward"
            if other.files.get(file) != data:
                differ[direction].append(file)
        for direction, files in differ.items():
            ids = {i for t, i in computed.numerics_ids.items() if t.endswith(direction)}
            # Whoever says nothing of order sums in a fixed one on a CPU; on a GPU it must say so.
            promised = direction == "forward" or any("deterministic" in i or i.startswith("cpu-") for i in ids)
            words = "equal bits" if not files else f"{len(files)} files differ, such as {files[0]}"
            if files and not promised:
                words += f"; not promised by {', '.join(sorted(ids))}"
            report.check(f"{name} {direction}, {what}", not files or not promised, words)


def _accepted(command: Command, folder: Path, entries: list[dict], report: Report) -> list[dict]:
    """Those of a failed batch that are computed alone: a task that is refused should not hide the others."""
    accepted = []
    for entry in entries:
        cases.write_batch(folder, [entry])
        try:
            command.compute(folder)
            accepted.append(entry)
        except Failed as error:
            report.check(f"{entry['name']} alone", False, str(error))
            if "did not end" in str(error):
                # A device that hangs once would take the time of all.
                return []
    if len(accepted) == len(entries):
        report.say("    each of its tasks is computed when it is alone")
        return []
    return accepted
