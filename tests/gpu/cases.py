"""Tasks to check: shapes, masks and numbers, and the files that `outboard compute` reads."""

from __future__ import annotations

import ctypes
import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Slice:
    """Queries x keys with a band: (i, j) counts iff lo <= j - i <= hi. Positions are the document's."""

    q: tuple[int, int]
    kv: tuple[int, int]
    lo: int | None = None
    hi: int | None = None


@dataclass(frozen=True)
class Case:
    """One task. `elsewhere` keys before its own belong to other tasks of the same rows: then the final LSE and D are
    not those of the task alone."""

    name: str
    dtype: str
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    q: tuple[int, int]
    kv: tuple[int, int]
    slices: tuple[Slice, ...]
    numbers: str = "normal"
    elsewhere: int = 0

    @property
    def scale(self) -> float:
        """The usual scale, as the f32 that it becomes."""
        return torch.tensor(self.head_dim**-0.5, dtype=torch.float32).item()

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.q_heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Queries."""
        return self.q[1] - self.q[0]

    @property
    def keys(self) -> int:
        """Keys."""
        return self.kv[1] - self.kv[0]

    def visible(self, rows: slice, device: str, keys_before: int = 0) -> torch.Tensor:
        """[rows, keys] of some rows: which cells count. `keys_before` keys in front of the task's all count."""
        i = torch.arange(self.q[0] + rows.start, self.q[0] + rows.stop, device=device)[:, None]
        j = torch.arange(self.kv[0], self.kv[1], device=device)[None, :]
        seen = torch.zeros(i.shape[0], j.shape[1], dtype=torch.bool, device=device)
        for part in self.slices:
            inside = (i >= part.q[0]) & (i < part.q[1]) & (j >= part.kv[0]) & (j < part.kv[1])
            if part.lo is not None:
                inside &= j - i >= part.lo
            if part.hi is not None:
                inside &= j - i <= part.hi
            seen |= inside
        if keys_before:
            before = torch.ones(seen.shape[0], keys_before, dtype=torch.bool, device=device)
            seen = torch.cat([before, seen], dim=1)
        return seen

    def form(self) -> tuple[str, int]:
        """What torch calls this mask: full, causal (aligned at the last key), window (with its width) or mask."""
        if len(self.slices) == 1:
            part = self.slices[0]
            if part.q == self.q and part.kv == self.kv:
                aligned = self.q[1] == self.kv[1] and self.rows <= self.keys
                if part.lo is None and part.hi is None:
                    return "full", 0
                if part.hi == 0 and aligned and part.lo is None:
                    return "causal", 0
                if part.hi == 0 and aligned and part.lo is not None:
                    return "window", -part.lo
        return "mask", 0

    def entry(self, direction: str) -> dict:
        """The task in batch.json."""
        return {
            "name": f"{self.name}.{direction}",
            "direction": direction,
            "geometry": {
                "q_heads": self.q_heads,
                "kv_heads": self.kv_heads,
                "head_dim": self.head_dim,
                "v_head_dim": self.v_head_dim,
                "scale": self.scale,
                "dtype": self.dtype,
            },
            "q": list(self.q),
            "kv": list(self.kv),
            "kv_heads": [0, self.kv_heads],
            "mask": [
                {"kv_heads": [0, self.kv_heads], "q": list(s.q), "kv": list(s.kv), "lo": s.lo, "hi": s.hi}
                for s in self.slices
            ],
        }


@dataclass
class Tensors:
    """A task's inputs [tokens, heads, dim]; `k_before` and `v_before` are the keys that other tasks compute."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_o: torch.Tensor
    k_before: torch.Tensor
    v_before: torch.Tensor


def draw(case: Case, device: str) -> Tensors:
    """Numbers of a case, the same for the same name on any machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    dtype = DTYPES[case.dtype]

    def normal(tokens: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(tokens, heads, dim, generator=generator)

    q, d_o = normal(case.rows, case.q_heads, case.head_dim), normal(case.rows, case.q_heads, case.v_head_dim)
    k = normal(case.elsewhere + case.keys, case.kv_heads, case.head_dim)
    v = normal(case.elsewhere + case.keys, case.kv_heads, case.v_head_dim)
    if case.numbers == "low":
        # Every score near -200, so that LSE lies below what exp() of an f32 can hold (-88.7), and varies a little.
        level = (200.0 / (case.head_dim * case.scale)) ** 0.5
        q, k = level + 0.25 * q, -level + 0.25 * k
    elif case.numbers == "large":
        # Scores far apart in both directions: rows see one key, or a few.
        q, k = 6.0 * q, 6.0 * k
    q, k, v, d_o = (x.to(dtype).to(device) for x in (q, k, v, d_o))
    before = case.elsewhere
    return Tensors(q, k[before:].contiguous(), v[before:].contiguous(), d_o, k[:before], v[:before])


def raw(tensor: torch.Tensor) -> bytes:
    """The elements as they lie in memory, without a copy through lists (and without numpy, which may be missing)."""
    tensor = tensor.detach().contiguous().cpu()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def values(data: bytes, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """A result file as f64."""
    flat = torch.frombuffer(bytearray(data), dtype=torch.float32)
    if flat.numel() != torch.Size(shape).numel():
        raise ValueError(f"{flat.numel()} elements where {shape} were expected")
    return flat.reshape(shape).to(device).double()


def write(folder: Path, case: Case, tensors: Tensors, lse: torch.Tensor, d: torch.Tensor) -> list[dict]:
    """Writes the files of both directions, and gives their entries."""
    entries = []
    for direction in ("forward", "backward"):
        entry = case.entry(direction)
        files = {"q": tensors.q, "k": tensors.k, "v": tensors.v}
        if direction == "backward":
            files |= {"d_o": tensors.d_o, "lse": lse.float(), "d": d.float()}
        for suffix, tensor in files.items():
            (folder / f"{entry['name']}.{suffix}").write_bytes(raw(tensor))
        entries.append(entry)
    return entries


def write_batch(folder: Path, entries: list[dict]) -> None:
    """Writes batch.json."""
    (folder / "batch.json").write_text(json.dumps({"version": 1, "tasks": entries}, indent=1) + "\n")


def batches(small: bool, seed: int) -> dict[str, list[Case]]:
    """All cases, by the batch that they are computed in. `small` is for a CPU, which takes minutes for a full case."""
    rng = random.Random(seed)
    made: dict[str, list[Case]] = {}
    # A GPU builds a plan for each kind of head, at up to seconds each: few kinds, many shapes. f16 shares all but the
    # conversions with bf16.
    kinds = {"bf16": ((1, 64), (4, 64), (4, 128), (8, 128)), "f16": ((4, 128),)}
    dims = {"bf16": ((80, 80), (96, 96), (192, 192), (192, 128), (256, 256)), "f16": ((80, 80), (256, 256))}
    for dtype in DTYPES:
        made[f"{dtype}-ragged"] = [c for g, d in kinds[dtype] for c in _ragged(dtype, g, d, small, rng)]
        made[f"{dtype}-dims"] = [_other_dim(dtype, d, v, small) for d, v in dims[dtype]]
        made[f"{dtype}-traps"] = [c for d in (64, 128) for c in _traps(dtype, d, small)]
    return made


def _ragged(dtype: str, group: int, dim: int, small: bool, rng: random.Random) -> list[Case]:
    most_rows, most_keys = (200, 700) if small else (4096, 32768)

    def length(most: int) -> int:
        # Short ones are as likely as long ones: tasks of all sizes share a batch.
        return max(1, int(most ** rng.random()))

    def case(kind: str, q: tuple[int, int], kv: tuple[int, int], *slices: Slice, elsewhere: int = 0) -> Case:
        name = f"{dtype}-g{group}-d{dim}-{kind}"
        return Case(name, dtype, 2 * group, 2, dim, dim, q, kv, slices, elsewhere=elsewhere)

    rows = [length(most_rows) for _ in range(6)]
    keys = [max(n, length(most_keys)) for n in rows]
    made = []
    q, kv = (keys[0] - rows[0], keys[0]), (0, keys[0])
    made.append(case("causal", q, kv, Slice(q, kv, None, 0)))
    n = min(most_rows, 1000 + rng.randrange(1000)) if not small else 150
    made.append(case("square", (0, n), (0, n), Slice((0, n), (0, n), None, 0)))
    q, kv = (keys[1] + 7, keys[1] + 7 + rows[1]), (3, 3 + keys[1])
    made.append(case("full", q, kv, Slice(q, kv)))
    q, kv = (keys[2] - rows[2], keys[2]), (0, keys[2])
    made.append(case("window", q, kv, Slice(q, kv, -max(1, keys[2] // 5), 0)))
    r, k = min(rows[3], 700), min(keys[3], 3000)
    made.append(case("anticausal", (0, r), (0, k), Slice((0, r), (0, k), 0, None)))
    # Sinks and a window, disjoint: two slices of one row.
    w = 64 if small else 500
    n = 4 * w
    q, kv = (n - w, n), (0, n)
    made.append(case("slices", q, kv, Slice(q, (0, 16), None, 0), Slice(q, (16, n), -w, 0)))
    # A window of keys that the first rows lie before, and the last rows beyond.
    q, kv = (0, 2 * w), (w // 2, w)
    made.append(case("gaps", q, kv, Slice(q, kv, -w // 4, 0)))
    # Keys from the middle of a row on: LSE and D are of the whole row.
    q, kv = (n - w, n), (n - 2 * w, n)
    made.append(case("part", q, kv, Slice(q, kv, None, 0), elsewhere=n - 2 * w))
    made.append(case("one", (0, 1), (0, 1), Slice((0, 1), (0, 1), None, 0)))
    return made


def _other_dim(dtype: str, dim: int, v_dim: int, small: bool) -> Case:
    n = 160 if small else 1500
    q, kv = (n // 3, n), (0, n)
    name = f"{dtype}-g4-d{dim}" + (f"-v{v_dim}" if v_dim != dim else "") + "-causal"
    return Case(name, dtype, 8, 2, dim, v_dim, q, kv, (Slice(q, kv, None, 0),))


def _traps(dtype: str, dim: int, small: bool) -> list[Case]:
    # kv % 128 == 64 with LSE below -88.7: NaN in dQ was seen of a kernel that cuDNN has.
    keys = 128 * (2 if small else 16) + 64
    q, kv = (keys - keys // 2, keys), (0, keys)
    causal, full = Slice(q, kv, None, 0), Slice(q, kv)

    def case(kind: str, part: Slice, numbers: str) -> Case:
        return Case(f"{dtype}-d{dim}-{kind}", dtype, 8, 2, dim, dim, q, kv, (part,), numbers)

    return [
        case("low-causal", causal, "low"),
        case("low-full", full, "low"),
        case("large-causal", causal, "large"),
    ]
