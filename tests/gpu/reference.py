"""Core attention in f64, in the plainest form, row block by row block so that memory stays small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cases import Case, Tensors

# Bytes of one [group, rows, keys] intermediate; a handful of them live at a time.
BLOCK_BYTES = 256 << 20


@dataclass
class Reference:
    """Results [tokens, heads, dim] and what backward is given. `floor` is the norm of the error that rounding in f32
    alone may leave in a gradient, however its terms cancel."""

    o: torch.Tensor
    lse: torch.Tensor
    final_lse: torch.Tensor
    final_d: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    floor: dict[str, float]


def _blocks(case: Case, keys: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (8 * case.group * max(1, keys)))
    for start in range(0, case.rows, step):
        yield slice(start, min(case.rows, start + step))


def _forward(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE of queries [group, rows, dim] of one kv head, with `before` keys more than the task's."""
    o = torch.zeros(*q.shape[:2], v.shape[1], dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    for rows in _blocks(case, k.shape[0]):
        seen = case.visible(rows, str(q.device), before)
        scores = (case.scale * (q[:, rows] @ k.T)).masked_fill_(~seen, -torch.inf)
        lse[:, rows] = torch.logsumexp(scores, dim=-1)
        # A row without keys has no weights, rather than the NaN of inf - inf.
        weights = torch.exp(scores - lse[:, rows, None]).masked_fill_(~seen, 0.0)
        o[:, rows] = weights @ v
    return o, lse


def compute(case: Case, tensors: Tensors) -> Reference:
    """Both directions of a case. LSE and D are rounded to f32 before backward uses them: so they are given."""
    q, k, v, d_o = (x.double() for x in (tensors.q, tensors.k, tensors.v, tensors.d_o))
    o, lse = torch.zeros_like(d_o), torch.zeros_like(d_o[..., 0])
    final_lse, final_d = torch.zeros_like(lse), torch.zeros_like(lse)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    size = {"dq": 0.0, "dk": 0.0}
    for h in range(case.kv_heads):
        heads = slice(h * case.group, (h + 1) * case.group)
        qh, doh = (x[:, heads].transpose(0, 1).contiguous() for x in (q, d_o))
        kh, vh = k[:, h].contiguous(), v[:, h].contiguous()
        oh, lseh = _forward(case, qh, kh, vh, 0)
        whole_o, whole_lse = oh, lseh
        if case.elsewhere:
            before = (tensors.k_before[:, h].double(), tensors.v_before[:, h].double())
            whole_k, whole_v = torch.cat([before[0], kh]), torch.cat([before[1], vh])
            whole_o, whole_lse = _forward(case, qh, whole_k, whole_v, case.elsewhere)
        o[:, heads], lse[:, heads] = oh.transpose(0, 1), lseh.T
        given_lse = whole_lse.float().double()
        given_d = (doh * whole_o).sum(-1).float().double()
        final_lse[:, heads], final_d[:, heads] = given_lse.T, given_d.T
        for rows in _blocks(case, kh.shape[0]):
            seen = case.visible(rows, str(q.device))
            scores = case.scale * (qh[:, rows] @ kh.T)
            weights = torch.exp(scores - given_lse[:, rows, None]).masked_fill_(~seen, 0.0)
            del scores
            dp = doh[:, rows] @ vh.T
            ds = case.scale * weights * (dp - given_d[:, rows, None])
            dq[rows, heads] = (ds @ kh).transpose(0, 1)
            dk[:, h] += torch.einsum("grk,grd->kd", ds, qh[:, rows])
            dv[:, h] += torch.einsum("grk,grd->kd", weights, doh[:, rows])
            terms = (case.scale * weights * (dp.abs() + given_d[:, rows, None].abs())).square_().sum().item()
            size["dq"] += terms * kh.square().sum(-1).mean().item()
            size["dk"] += terms * qh.square().sum(-1).mean().item()
    floor = {name: 2e-6 * value**0.5 for name, value in size.items()}
    return Reference(o, lse, final_lse, final_d, dq, dk, dv, floor)
