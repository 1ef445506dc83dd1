"""Speed beside torch's kernels on the same device, taken in turn, and the rows of the command's own suite."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from command import Command, Failed, json_lines
from report import Report

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
# The largest first: pinned memory, which takes long to get, is then gotten once.
TOKENS = (65536, 32768, 16384)
DIRECTIONS = ("forward", "backward")
# TFLOP/s that are enough whatever torch reaches, and the share of the best of torch's that is.
TARGET = {"forward": 600.0, "backward": 500.0}
SHARE = 0.95
# A batch of mixed shards beside its work as one sequence; kernels busy at 32k tokens; microseconds of the host for a call.
MIXED, BUSY, HOST = 0.9, 0.9, 50.0
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
REPEATS = 5
ROUNDS = 3
SETS = 2

Key = tuple[int, str]


def flops(tokens: int, direction: str) -> float:
    """Useful work: cells that count, two products forward and five backward."""
    forward = 4.0 * DIM * Q_HEADS * tokens * (tokens + 1) / 2
    return forward if direction == "forward" else 2.5 * forward


def check(command: Command, report: Report) -> None:
    """Measures ours and torch's in turn, and compares medians."""
    device = command.device
    ceiling = _matmul(device)
    report.facts["matmul_tflops"] = round(ceiling, 1)
    report.say(
        f"\nspeed: bf16, d {DIM}, {Q_HEADS}/{KV_HEADS} heads, causal; matmul 8192^3 reaches {ceiling:.0f} TFLOP/s"
    )
    ours: dict[Key, list[float]] = defaultdict(list)
    torches: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    refusals: set[str] = set()
    for _ in range(ROUNDS):
        # The command shares the GPU with this process, which would hold on to all that it ever took.
        torch.cuda.empty_cache()
        try:
            for key, tflops in _ours(command).items():
                ours[key].append(tflops)
        except Failed as error:
            report.check("bench kernel", False, str(error))
            return
        for tokens in TOKENS:
            for name, backend in BACKENDS.items():
                try:
                    for direction, tflops in _torch(backend, tokens, device).items():
                        torches[tokens, direction][name].append(tflops)
                except RuntimeError as error:
                    refusals.add(f"{name} at {tokens}: {str(error).strip().splitlines()[0][:120]}")
    for refusal in sorted(refusals):
        report.say(f"  torch has no {refusal}")
    report.say(f"  {'tokens':>6}  {'direction':9}  {'ours':>5}  {'torch':>5}  {'ratio':>5}  of matmul")
    table = []
    for tokens in TOKENS:
        for direction in DIRECTIONS:
            table.append(_compare(tokens, direction, ours, torches, ceiling, report))
    report.facts["speed"] = table
    torch.cuda.empty_cache()
    _suite(command, report)


def _suite(command: Command, report: Report) -> None:
    """What the command measures of itself: mixed shards, how busy the kernels are, what a call costs the host."""
    try:
        printed = command.run("bench", "kernel", "--device", command.device, "--suite", "--json", "-", timeout=180)
    except Failed as error:
        report.check("bench kernel --suite", False, str(error))
        return
    lines = json_lines(printed)
    report.facts["suite"] = lines
    rows = {(line["case"], line["direction"]): line for line in lines if line.get("kind") == "measurement"}
    cases = ("mixed shards", "their work as one", "32k causal", "one small task")
    for direction in DIRECTIONS:
        if missing := [case for case in cases if (case, direction) not in rows]:
            report.check(f"suite {direction}", False, f"no row of {', '.join(missing)}")
            continue
        mixed, one = (rows[case, direction]["tflops"] for case in ("mixed shards", "their work as one"))
        words = f"{mixed:.0f} TFLOP/s, {mixed / one:.2f} of one sequence of as much work; enough is {MIXED}"
        report.check(f"mixed shards {direction}", mixed >= MIXED * one, words)
        busy = rows["32k causal", direction]["busy"]
        report.check(f"kernels busy {direction}", busy >= BUSY, f"{busy:.3f} of the time; enough is {BUSY}")
        small = rows["one small task", direction]
        host = small["prepare_us"] + small["enqueue_us"]
        parts = f"{small['prepare_us']:.0f} us to prepare a call and {small['enqueue_us']:.0f} to enqueue it"
        report.check(f"host {direction}", host <= HOST, f"{parts}; enough is {HOST:.0f}")


def _compare(
    tokens: int,
    direction: str,
    ours: dict[Key, list[float]],
    torches: dict[Key, dict[str, list[float]]],
    ceiling: float,
    report: Report,
) -> dict[str, object]:
    measured = ours.get((tokens, direction), [])
    peers = {name: statistics.median(values) for name, values in torches[tokens, direction].items()}
    name, best = max(peers.items(), key=lambda item: item[1], default=("none", 0.0))
    reached = statistics.median(measured) if measured else 0.0
    ratio = reached / best if best else 0.0
    passed = reached >= TARGET[direction] or (best > 0.0 and ratio >= SHARE)
    report.say(
        f"  {tokens:6}  {direction:9}  {reached:5.0f}  {best:5.0f}  {ratio:5.2f}  {reached / ceiling:5.2f}  "
        f"({', '.join(f'{n} {v:.0f}' for n, v in peers.items())})"
    )
    words = f"{reached:.0f} TFLOP/s, {name} {best:.0f}; enough is {TARGET[direction]:.0f} or {SHARE} of torch's best"
    report.check(f"speed {tokens} {direction}", passed, words, quiet=True)
    return {
        "tokens": tokens,
        "direction": direction,
        "ours_tflops": reached,
        "torch_tflops": peers,
        "ratio": ratio,
        "pass": passed,
    }


def _ours(command: Command) -> dict[Key, float]:
    """TFLOP/s by tokens and direction."""
    words = ["bench", "kernel", "--device", command.device, "--tokens", ",".join(map(str, TOKENS))]
    words += ["--heads", str(Q_HEADS), "--kv-heads", str(KV_HEADS), "--head-dim", str(DIM)]
    words += ["--dtype", "bf16", "--mask", "causal", "--repeats", str(REPEATS), "--json", "-"]
    lines = json_lines(command.run(*words, timeout=120))
    return {(line["n_kv"], line["direction"]): line["tflops"] for line in lines if line.get("kind") == "measurement"}


def _median_seconds(call: Callable[[int], object], repeats: int) -> float:
    """Device seconds of a call, by events. Each repeat has inputs of its own turn, so that no cache holds them."""
    call(0)
    torch.cuda.synchronize()
    taken = []
    for n in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(n)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def _torch(backend: SDPBackend, tokens: int, device: str) -> dict[str, float]:
    def normal(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, DIM, dtype=torch.bfloat16, device=device, requires_grad=True)

    sets = [(normal(Q_HEADS), normal(KV_HEADS), normal(KV_HEADS)) for _ in range(SETS)]
    d_o = torch.randn(1, Q_HEADS, tokens, DIM, dtype=torch.bfloat16, device=device)

    def forward(n: int) -> torch.Tensor:
        q, k, v = sets[n % SETS]
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with sdpa_kernel(backend):
        with torch.no_grad():
            fore = _median_seconds(forward, REPEATS)
        outputs = [forward(n) for n in range(SETS)]

        def backward(n: int) -> object:
            return torch.autograd.grad(outputs[n % SETS], sets[n % SETS], d_o, retain_graph=True)

        back = _median_seconds(backward, REPEATS)
    seconds = {"forward": fore, "backward": back}
    return {direction: flops(tokens, direction) / seconds[direction] / 1e12 for direction in DIRECTIONS}


def _matmul(device: str) -> float:
    """What a large product reaches: no kernel can be judged on a device that is slower than it should be."""
    n = 8192
    sets = [[torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2)] for _ in range(3)]
    seconds = _median_seconds(lambda turn: torch.mm(*sets[turn % 3]), 20)
    return 2.0 * n**3 / seconds / 1e12
