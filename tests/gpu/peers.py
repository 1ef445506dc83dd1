"""The same case by torch's own 16-bit kernels: what precision such a kernel can be expected to have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from cases import Case, Tensors
from reference import Reference

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # Before torch 2.10.
    varlen_attn = None  # type: ignore[assignment]

# Cells above which a mask is not laid out in memory, [queries, keys] for every head of the slower kernels.
MOST_MASKED = 1 << 28

Output = dict[str, torch.Tensor]


@dataclass
class Peer:
    """A kernel's results, or why it has none."""

    name: str
    output: Output | None
    refusal: str = ""


def compute(case: Case, tensors: Tensors, reference: Reference) -> list[Peer]:
    """Every torch kernel that computes this case; where none does, 16-bit attention spelled out."""
    peers = [_attempt(name, case, tensors, call) for name, call in _kernels(case, tensors)]
    if not any(peer.output for peer in peers):
        peers.append(Peer("spelled out", _spelled_out(case, tensors, reference)))
    return peers


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _kernels(case: Case, tensors: Tensors) -> list[tuple[str, Kernel]]:
    """Functions of q, k, v [tokens, heads, dim] (all with as many heads as q has) to o."""
    if case.elsewhere:
        # Autograd knows no LSE but its own.
        return []
    form, width = case.form()
    device = tensors.q.device
    cuda = device.type == "cuda"

    def dense(backend: SDPBackend | None, **how: Any) -> Kernel:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            if backend is None:
                out = scaled_dot_product_attention(q, k, v, scale=case.scale, **how)
            else:
                with sdpa_kernel(backend):
                    out = scaled_dot_product_attention(q, k, v, scale=case.scale, **how)
            return out[0].transpose(0, 1)

        return call

    def varlen(window: tuple[int, int]) -> Kernel:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ends_q, ends_k = (torch.tensor([0, x.shape[0]], dtype=torch.int32, device=device) for x in (q, k))
            lengths = (q.shape[0], k.shape[0])
            out = varlen_attn(q, k, v, ends_q, ends_k, *lengths, scale=case.scale, window_size=window)
            return out[0] if isinstance(out, tuple) else out

        return call

    named = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    kernels: list[tuple[str, Kernel]] = []
    if cuda and form == "full":
        kernels += [(name, dense(backend)) for name, backend in named.items()]
    if cuda and form == "causal":
        if case.rows == case.keys:
            kernels += [(name, dense(backend, is_causal=True)) for name, backend in named.items()]
        else:
            bias = causal_lower_right(case.rows, case.keys)
            kernels.append(("flash", dense(SDPBackend.FLASH_ATTENTION, attn_mask=bias)))
    if cuda and varlen_attn is not None and form in ("causal", "window"):
        window = (-1, 0) if form == "causal" else (width, 0)
        kernels.append(("varlen", varlen(window)))
    if case.rows * case.keys <= MOST_MASKED:
        mask = case.visible(slice(0, case.rows), str(device))
        if mask.any(dim=1).all():
            backends = {"cudnn, mask": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
            every = [(name, dense(backend, attn_mask=mask)) for name, backend in backends.items()]
            kernels += every if cuda else [("cpu", dense(None, attn_mask=mask))]
    return kernels


def _attempt(name: str, case: Case, tensors: Tensors, call: Kernel) -> Peer:
    """Runs a kernel both ways, on keys repeated for each query head: dK and dV are then summed here, in f64, which is
    better than any kernel does."""
    k, v = (x.repeat_interleave(case.group, dim=1) for x in (tensors.k, tensors.v))
    inputs = [x.detach().clone().requires_grad_() for x in (tensors.q, k, v)]
    try:
        o = call(*inputs)
        dq, dk, dv = torch.autograd.grad(o, inputs, tensors.d_o)
        if tensors.q.is_cuda:
            torch.cuda.synchronize()
    except (RuntimeError, ValueError, TypeError) as error:
        return Peer(name, None, str(error).strip().splitlines()[0][:120] if str(error).strip() else repr(error))
    dk, dv = (x.double().unflatten(1, (case.kv_heads, case.group)).sum(2) for x in (dk, dv))
    return Peer(name, {"o": o.detach().double(), "dq": dq.double(), "dk": dk, "dv": dv})


def _spelled_out(case: Case, tensors: Tensors, reference: Reference) -> Output:
    """What fused 16-bit kernels do: products of 16-bit factors summed in f32, the weights and score gradients rounded
    to 16 bits before each product. Takes any mask, and the final LSE and D."""
    dtype = tensors.q.dtype

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).float()

    seen = case.visible(slice(0, case.rows), str(tensors.q.device))
    out: dict[str, list[torch.Tensor]] = {name: [] for name in ("o", "dq", "dk", "dv")}
    for head in range(case.q_heads):
        h = head // case.group
        q, d_o = tensors.q[:, head].float(), tensors.d_o[:, head].float()
        k, v = tensors.k[:, h].float(), tensors.v[:, h].float()
        scores = (case.scale * (q @ k.T)).masked_fill_(~seen, -torch.inf)
        most = scores.amax(-1, keepdim=True).clamp_min(-3e38)
        weights = torch.exp(scores - most)
        total = weights.sum(-1, keepdim=True).clamp_min(1e-30)
        out["o"].append(rounded(rounded(weights) @ v / total))
        weights = torch.exp(scores - reference.final_lse[:, head, None].float()).masked_fill_(~seen, 0.0)
        ds = rounded(weights * (d_o @ v.T - reference.final_d[:, head, None].float()))
        out["dq"].append(rounded(case.scale * (ds @ k)))
        out["dk"].append(rounded(case.scale * (ds.T @ q)))
        out["dv"].append(rounded(rounded(weights).T @ d_o))
    stacked = {name: torch.stack(parts, dim=1).double() for name, parts in out.items()}
    for name in ("dk", "dv"):
        stacked[name] = stacked[name].unflatten(1, (case.kv_heads, case.group)).sum(2)
    return stacked
