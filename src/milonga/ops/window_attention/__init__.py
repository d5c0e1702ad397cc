"""Causal attention over the last `window` keys, or over all of them, continued from a ring of past keys."""

import torch
from torch import Tensor

from milonga.ops.backend import choice, direct, kernels
from milonga.ops.checks import FLOATS, expect
from milonga.ops.window_attention.library import window_attention_op
from milonga.ops.window_attention.reference import window_attention_reference
from milonga.segments import Segments, sequence_count

# Bound of the relative RMS error of the output and of each gradient against the float64 reference, fp32 inputs.
ERROR_BOUND = 2e-6


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    position: Tensor | None = None,
    segments: Segments | None = None,
    scale: float | None = None,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor:
    """`softmax(scale * q k^T) v` over the keys each query may see.

    The query at absolute position t of its sequence sees the keys t - window + 1 .. t (its own included), or 0 .. t
    where `window` is None. Query head h reads key head `h // (H // G)`.

    Keys before this piece come from a ring: the key of absolute position p lies in slot `p % P` of `past_k`, and the
    slots of the last `min(position, P)` positions hold keys; what the others hold does not matter. A cache that keeps
    everything is the same ring with P >= position.

    Args:
        q: `[B, T, H, K]`, float32, bfloat16, float16 or float64.
        k: `[B, T, G, K]`, dtype of q; G divides H.
        v: `[B, T, G, V]`, dtype of q.
        window: keys a query sees, its own included (>= 1); None for all.
        past_k: `[S, P, G, K]`, dtype of q, keys before this piece; with `past_v` and `position`, or not at all.
        past_v: `[S, P, G, V]`, dtype of q.
        position: int64 `[S]`, how many keys each sequence had before this piece.
        segments: with a packed batch `[1, T]`, where its S sequences start; S = B without.
        scale: factor of the scores; None for 1 / sqrt(K).
        deterministic: False lets a GPU take gradients with a library whose sums have no fixed order, where that is
            faster (docs/performance.md says how much); the same bits on every run otherwise.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        `[B, T, H, V]`, dtype of q. Softmax and sums in at least fp32. Relative RMS error against float64 with fp32
        inputs: at most `ERROR_BOUND`. On the CPU time grows with T * window and memory with T.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, the window is below 1, the ring no longer holds keys that
            the window reaches (not checked under a compiler, nor on a GPU), or the backend cannot run.

    Source: Beltagy, Peters and Cohan, "Longformer" (2020), section 3.1, causal; the blockwise softmax of the kernels is
    that of Dao, "FlashAttention-2" (2023).
    """
    _check(q, k, v, window, segments)
    if past_k is not None or past_v is not None or position is not None:
        _check_past(q, k, v, past_k, past_v, position, segments)
    if position is not None and past_k is not None and q.device.type == "cpu" and not torch.compiler.is_compiling():
        check_capacity(position, past_k.shape[1], window)
    chosen = choice("window_attention", backend, q.device.type, q.dtype)
    if chosen == "reference":
        return window_attention_reference(
            q, k, v, window=window, past_k=past_k, past_v=past_v, position=position, segments=segments, scale=scale
        )
    offsets = None if segments is None else segments.on(q.device)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q, k, v, past_k, past_v, position, offsets, window, factor)
    if direct(q, chosen):
        return kernels("window_attention", chosen).forward(*inputs)[0]
    return window_attention_op(*inputs, deterministic)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, segments: Segments | None) -> None:
    if q.ndim != 4:
        raise ValueError(f"window_attention: q must be [B, T, H, K], got {list(q.shape)}")
    batch, time, heads, width = q.shape
    if k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != width:
        raise ValueError(
            f"window_attention: k must be [B, T, G, K], expected [{batch}, {time}, G, {width}], got {list(k.shape)}"
        )
    groups = k.shape[2]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"window_attention: the heads of k must divide those of q, expected a divisor of {heads}, got {groups}"
        )
    if q.dtype not in FLOATS:
        got = str(q.dtype).removeprefix("torch.")
        raise ValueError(f"window_attention: q must be float32, bfloat16, float16 or float64, got {got}")
    if v.ndim != 4:
        raise ValueError(f"window_attention: v must be [B, T, G, V], got {list(v.shape)}")
    same, device = (q.dtype,), q.device
    expect("window_attention", "k", k, "[B, T, G, K]", (batch, time, groups, width), same, device, "q")
    expect("window_attention", "v", v, "[B, T, G, V]", (batch, time, groups, v.shape[3]), same, device, "q")
    if window is not None and window < 1:
        raise ValueError(f"window_attention: window must be at least 1 (the query's own key) or None, got {window}")
    if segments is not None:
        segments.check(batch, time, "window_attention")


def _check_past(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    segments: Segments | None,
) -> None:
    if past_k is None or past_v is None or position is None:
        given = [n for n, t in (("past_k", past_k), ("past_v", past_v), ("position", position)) if t is not None]
        raise ValueError(
            f"window_attention: expected past_k, past_v and position together or not at all, got {' and '.join(given)}"
        )
    count = sequence_count(q.shape[0], segments)
    groups, width = k.shape[2:]
    if past_k.ndim != 4:
        raise ValueError(f"window_attention: past_k must be [S, P, G, K], got {list(past_k.shape)}")
    slots, same, device = past_k.shape[1], (q.dtype,), q.device
    expect("window_attention", "past_k", past_k, "[S, P, G, K]", (count, slots, groups, width), same, device, "q")
    expect("window_attention", "past_v", past_v, "[S, P, G, V]", (count, slots, groups, v.shape[3]), same, device, "q")
    expect("window_attention", "position", position, "[S]", (count,), (torch.int64,), device, "q")


def check_capacity(position: Tensor, slots: int, window: int | None) -> None:
    """Raise `ValueError` where a ring of `slots` keys lost keys that queries from `position` (on the CPU) on reach."""
    if position.numel() == 0:
        return
    first, most = int(position.min()), int(position.max())
    if first < 0:
        raise ValueError(f"window_attention: position must not be negative, got {first}")
    if most > slots and (window is None or slots < window - 1):
        needed = most if window is None else min(most, window - 1)
        raise ValueError(
            f"window_attention: past_k no longer holds every key that window {window} reaches, "
            f"expected at least {needed} slots at position {most}, got {slots}"
        )


__all__ = ["ERROR_BOUND", "window_attention", "window_attention_reference"]
