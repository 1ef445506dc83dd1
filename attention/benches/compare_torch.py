#!/usr/bin/env python3
"""Outboard's CPU kernel beside torch's scaled_dot_product_attention, on this machine.

Both are measured in turn (ours, torch, ours, torch, ...) and compared pair by pair, so that whatever else the machine
does slows down both. Time is what a process spends on its cores, over the number of threads; ratios by the clock on the
wall stand beside it.

    cargo build --release
    attention/benches/compare_torch.py --install          # makes a virtual environment with torch, then measures
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HEADS = 8
HEAD_DIM = 128
# A sample of torch takes at least this long, and torch is warmed up by one call.
SAMPLE_SECONDS = 0.3
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Shape:
    name: str
    queries: int
    keys: int
    kv_heads: int


@dataclass(frozen=True)
class Case:
    shape: Shape
    dtype: str
    direction: str
    target: "float | None"

    @property
    def name(self):
        return f"{self.dtype} {self.shape.name} {self.direction}"


@dataclass(frozen=True)
class Speed:
    """GFLOP/s by the time on cores, and by the clock on the wall."""

    cpu: float
    wall: float


SHAPES = [
    Shape("causal 1k", 1024, 1024, HEADS),
    Shape("causal 4k", 4096, 4096, HEADS),
    Shape("causal 16k", 16384, 16384, HEADS),
    Shape("128 queries, 16k keys, GQA 4", 128, 16384, HEADS // 4),
]


def target(shape, dtype, direction):
    """The least ratio to torch, where there is one."""
    forward = direction == "forward"
    if shape.queries != shape.keys:
        return 2.0
    if dtype == "bf16":
        return None if shape.keys < 4096 else (2.5 if forward else 1.8)
    return {4096: 1.4 if forward else 1.45, 16384: 1.3 if forward else 1.4}.get(shape.keys)


def flops(shape, direction):
    """Useful FLOPs: of the cells of a bottom-right aligned causal mask."""
    cells = shape.queries * shape.keys - shape.queries * (shape.queries - 1) // 2
    return (4 if direction == "forward" else 10) * HEAD_DIM * HEADS * cells


def ours(args, case):
    shape = case.shape
    command = [args.outboard, "bench", "kernel", "--json", "-", "--heads", HEADS, "--kv-heads", shape.kv_heads]
    command += ["--head-dim", HEAD_DIM, "--tokens", shape.keys, "--queries", shape.queries, "--dtype", case.dtype]
    command += ["--directions", case.direction, "--threads", args.threads, "--repeats", args.repeats]
    run = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        sys.exit(f"compare_torch: {args.outboard} failed with exit code {run.returncode}")
    for line in map(json.loads, run.stdout.splitlines()):
        if line["kind"] == "kernel":
            return Speed(line["gflops"], line["wall_gflops"])
    sys.exit(f"compare_torch: {args.outboard} measured nothing")


class Torch:
    """One case on torch: by whichever of the ways to ask for it is the fastest here."""

    def __init__(self, torch, case, threads):
        self.case = case
        self.threads = threads
        calls = [call for call in self.ways(torch) if self.works(call)]
        if not calls:
            sys.exit(f"compare_torch: torch {torch.__version__} computes none of the ways to ask for {case.name}")
        self.call = min(calls, key=lambda call: self.seconds(call, 1)[0])
        self.runs = max(1, round(SAMPLE_SECONDS / self.seconds(self.call, 1)[0]))

    def ways(self, torch):
        shape, direction = self.case.shape, self.case.direction
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[self.case.dtype]
        generator = torch.Generator().manual_seed(1)
        group = HEADS // shape.kv_heads

        def tensor(heads, tokens):
            noise = 2 * torch.rand(1, heads, tokens, HEAD_DIM, generator=generator) - 1
            return noise.to(dtype).requires_grad_(direction == "backward")

        q, d_o = tensor(HEADS, shape.queries), tensor(HEADS, shape.queries).detach()
        k, v = tensor(shape.kv_heads, shape.keys), tensor(shape.kv_heads, shape.keys)
        masks = [{"is_causal": True}]
        if shape.queries != shape.keys:
            from torch.nn.attention.bias import causal_lower_right

            allowed = torch.ones(shape.queries, shape.keys, dtype=torch.bool).tril(shape.keys - shape.queries)
            bias = torch.zeros(shape.queries, shape.keys, dtype=dtype).masked_fill_(~allowed, float("-inf"))
            lower_right = causal_lower_right(shape.queries, shape.keys)
            masks = [{"attn_mask": lower_right}, {"attn_mask": allowed}, {"attn_mask": bias}]
        heads = [(k, v, {})]
        if group > 1:
            expanded = [x.detach().repeat_interleave(group, 1).requires_grad_(x.requires_grad) for x in (k, v)]
            heads = [(k, v, {"enable_gqa": True}), (*expanded, {})]
        for mask in masks:
            for k, v, more in heads:
                yield self.callable(torch, (q, k, v, d_o), {**mask, **more})

    def callable(self, torch, tensors, how):
        q, k, v, d_o = tensors
        attention = torch.nn.functional.scaled_dot_product_attention
        if self.case.direction == "forward":

            def forward():
                with torch.no_grad():
                    attention(q, k, v, **how)

            return forward
        graph = []

        def backward():
            if not graph:
                graph.append(attention(q, k, v, **how))
            torch.autograd.grad(graph[0], (q, k, v), d_o, retain_graph=True)

        return backward

    @staticmethod
    def works(call):
        try:
            call()
            return True
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return False

    def seconds(self, call, runs):
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(runs):
            call()
        return (time.process_time() - cpu) / self.threads / runs, (time.perf_counter() - wall) / runs

    def speed(self):
        cpu, wall = self.seconds(self.call, self.runs)
        work = flops(self.case.shape, self.case.direction) * 1e-9
        return Speed(work / cpu, work / wall)


def compare(args, torch, case):
    theirs = Torch(torch, case, args.threads)
    pairs = [(ours(args, case), theirs.speed()) for _ in range(args.pairs)]
    ratio = statistics.median(a.cpu / b.cpu for a, b in pairs)
    return {
        "shape": case.name,
        "ours_gflops": round(statistics.median(a.cpu for a, _ in pairs), 1),
        "torch_gflops": round(statistics.median(b.cpu for _, b in pairs), 1),
        "ratio": round(ratio, 3),
        "wall_ratio": round(statistics.median(a.wall / b.wall for a, b in pairs), 3),
        "target": case.target,
        "pass": None if case.target is None else ratio >= case.target,
        "threads": args.threads,
        "torch": torch.__version__,
    }


HEADER = ("shape", "ours", "torch", "ratio", "by wall", "target", "")


def row(cells):
    return "{:<46} {:>8} {:>8} {:>7} {:>8} {:>7}  {}".format(*cells).rstrip()


def cells(result):
    verdict = {None: "", True: "pass", False: "miss"}[result["pass"]]
    wanted = "" if result["target"] is None else f">= {result['target']:g}"
    speeds = [f"{result[key]:.1f}" for key in ("ours_gflops", "torch_gflops")]
    ratios = [f"{result[key]:.2f}" for key in ("ratio", "wall_ratio")]
    return (result["shape"], *speeds, *ratios, wanted, verdict)


def install(args):
    """Makes a virtual environment with torch and runs this script again in it."""
    folder = Path(args.venv or tempfile.mkdtemp(prefix="outboard-torch-"))
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if subprocess.run([python, "-c", "import torch"], stderr=subprocess.DEVNULL).returncode != 0:
        print(f"installing torch into {folder}", file=sys.stderr)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        small = ["--retries", "0", "--timeout", "10", "--index-url", "https://download.pytorch.org/whl/cpu"]
        # The index of CPU builds is far smaller, and not reachable from everywhere.
        if subprocess.run([*pip, *small, "torch", "numpy"], stderr=subprocess.DEVNULL).returncode != 0:
            subprocess.run([*pip, "torch", "numpy"], check=True)
    rest = [word for word in sys.argv[1:] if word != "--install"]
    os.execv(python, [str(python), os.path.abspath(__file__), *rest])


def arguments():
    def words(choices):
        def parse(text):
            chosen = text.split(",")
            unknown = [word for word in chosen if word not in choices]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} must be one of {', '.join(choices)}")
            return chosen

        return parse

    def at_least_one(text):
        if not text.isdigit() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number above zero")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outboard", default=ROOT / "target/release/outboard", help="the command to measure")
    parser.add_argument("--threads", type=at_least_one, default=2, help="threads of both [default: 2]")
    parser.add_argument("--pairs", type=at_least_one, default=5, help="times that each is measured [default: 5]")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="runs of ours in each of those [default: 3]")
    parser.add_argument("--dtype", type=words(["f32", "bf16"]), default=["f32", "bf16"], help="f32,bf16")
    parser.add_argument(
        "--directions", type=words(["forward", "backward"]), default=["forward", "backward"], help="forward,backward"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="only shapes with TEXT in their name")
    parser.add_argument("--json", metavar="FILE", help="write one JSON object a line instead of a table; - is stdout")
    parser.add_argument("--install", action="store_true", help="first install torch into a virtual environment")
    parser.add_argument("--venv", metavar="DIR", help="where that is [default: a new temporary folder]")
    return parser.parse_args()


def main():
    args = arguments()
    if args.install:
        install(args)
    if not Path(args.outboard).exists():
        sys.exit(f"compare_torch: {args.outboard} does not exist; `cargo build --release` makes it")
    cores = sorted(os.sched_getaffinity(0))
    if args.threads > len(cores):
        sys.exit(f"compare_torch: --threads {args.threads}, but this process may run on {len(cores)} cores")
    # Before torch starts its threads. Ours pins its own to the same cores.
    os.sched_setaffinity(0, cores[: args.threads])
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    try:
        import torch
    except ImportError:
        sys.exit("compare_torch: torch is not installed here; --install installs it into a virtual environment")
    torch.set_num_threads(args.threads)

    cases = [
        Case(shape, dtype, direction, target(shape, dtype, direction))
        for dtype in args.dtype
        for shape in SHAPES
        for direction in args.directions
    ]
    cases = [case for case in cases if args.only in case.name]
    if not cases:
        sys.exit(f"compare_torch: --only {args.only!r}: no shape has that in its name")
    out = sys.stdout if args.json in (None, "-") else open(args.json, "w", encoding="utf-8")
    if args.json is None:
        print(f"GFLOP/s of useful work on {args.threads} threads, torch {torch.__version__}")
        print(row(HEADER), flush=True)
    for case in cases:
        result = compare(args, torch, case)
        print(row(cells(result)) if args.json is None else json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
