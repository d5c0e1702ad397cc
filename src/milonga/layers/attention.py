"""Causal attention over a window or over everything; rotary positions or none, grouped keys, short convolution."""

from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from milonga.layers.base import (
    Keep,
    Layer,
    LayerConfig,
    keep_on_device,
    keep_per_sequence,
    last_columns,
    last_columns_,
    write_,
)
from milonga.layers.linear import Linear, in_parts, separable
from milonga.layers.norm import norm_of
from milonga.layers.recompute import cheap
from milonga.ops.causal_conv import causal_conv
from milonga.ops.decode_step import has_step_kernels, linear_step, ring_write_
from milonga.ops.mamba_piece import has_piece_kernels
from milonga.ops.rotary import rotary
from milonga.ops.window_attention import window_attention
from milonga.segments import Segments, sequence_bounds, sequence_count

# Slots that a full-attention buffer starts with; it doubles when full.
FIRST_CAPACITY = 64


class AttentionConfig(LayerConfig):
    """H query heads of width K share G key heads. `window` counts the query's own key; None is full attention."""

    kind: Literal["attention"] = "attention"
    heads: PositiveInt
    kv_heads: PositiveInt | None = None  # None: as many as heads
    head_dim: PositiveInt | None = None  # None: d_model / heads
    window: PositiveInt | None = None
    rope_base: PositiveFloat | None = 10000.0  # None: no positions at all
    short_conv: int | None = Field(None, ge=2, le=8)  # width of a depthwise convolution with SiLU on q, k and v

    def shape(self, d_model: int) -> tuple[int, int, int]:
        """(H, G, K).

        Raises:
            ValueError: if heads do not divide, or rotary positions meet an odd K.
        """
        groups = self.kv_heads or self.heads
        if self.heads % groups:
            raise ValueError(f"attention: kv_heads must divide heads, got heads {self.heads} and kv_heads {groups}")
        if self.head_dim is None and d_model % self.heads:
            raise ValueError(
                f"attention: heads must divide d_model, got heads {self.heads} and d_model {d_model} (or set head_dim)"
            )
        width = self.head_dim or d_model // self.heads
        if self.rope_base is not None and width % 2:
            raise ValueError(
                f"attention: rotary positions need an even head_dim, got {width} (or set rope_base to null)"
            )
        return self.heads, groups, width

    def build(self, d_model: int) -> "Attention":
        """As `LayerConfig.build`."""
        return Attention(d_model, self)

    def parameter_count(self, d_model: int) -> int:
        """As `LayerConfig.parameter_count`."""
        heads, groups, width = self.shape(d_model)
        fused = (heads + 2 * groups) * width
        return d_model * fused + heads * width * d_model + fused * (self.short_conv or 0)

    def flops_per_token(self, d_model: int, context: float) -> float:
        """As `LayerConfig.flops_per_token`: projections, scores and weighted sum over the keys in sight."""
        heads, groups, width = self.shape(d_model)
        fused = (heads + 2 * groups) * width
        keys = context + 1 if self.window is None else min(context + 1, self.window)
        return (
            2.0 * d_model * fused
            + 2.0 * heads * width * d_model
            + 4.0 * heads * width * keys
            + (2.0 * fused * (self.short_conv or 0))
        )

    def state_bytes(self, d_model: int, length: int, dtype: torch.dtype) -> int:
        """As `LayerConfig.state_bytes`: constant for a window, the doubling buffer for full attention."""
        heads, groups, width = self.shape(d_model)
        slots = buffer_capacity(length) if self.window is None else self.window - 1
        columns = ((self.short_conv or 1) - 1) * (heads + 2 * groups) * width
        return (2 * slots * groups * width + columns) * dtype.itemsize + torch.int64.itemsize


class AttentionState(NamedTuple):
    """The keys and values in sight, and where the text stands.

    The key of position p lies in slot p mod P. For a window of w, P = w - 1 for ever; for full attention P is a
    capacity that doubles when full: the one state that grows with the text.
    """

    k: Float[Tensor, "S P G K"]  # rotated
    v: Float[Tensor, "S P G K"]
    position: Int[Tensor, " S"]  # int64: steps read so far
    conv: Float[Tensor, "S C F"]  # columns before the short convolution; no columns without one


class AttentionTrace(NamedTuple):
    """What a piece adds."""

    k: Float[Tensor, "B T G K"]
    v: Float[Tensor, "B T G K"]
    columns: Float[Tensor, "B T F"]  # inputs of the short convolution; without one of any width
    segments: Segments | None


class Attention(Layer):
    """Samba, section 2.1.2: softmax attention of a window, rotary positions over the whole head."""

    residual_output = "out_proj.weight"

    def __init__(self, d_model: int, config: AttentionConfig):
        super().__init__()
        self.config = config
        self.deterministic = True  # whether gradients are the same bits on every run, see `window_attention`
        self.heads, self.groups, self.width = config.shape(d_model)
        fused = (self.heads + 2 * self.groups) * self.width
        self.qkv_proj = Linear(d_model, fused)
        self.out_proj = Linear(self.heads * self.width, d_model)
        if config.short_conv:
            bound = 1 / config.short_conv**0.5
            self.conv_weight = nn.Parameter(torch.empty(fused, config.short_conv).uniform_(-bound, bound))
            self.own_init = ("conv_weight",)

    def _conv(self, columns: Tensor, state: AttentionState | None, segments: Segments | None) -> Tensor:
        initial = state.conv.to(columns.dtype) if state is not None else None
        return causal_conv(columns, self.conv_weight, None, initial=initial, segments=segments)[0]

    def advance(
        self, x: Float[Tensor, "B T D"], state: AttentionState | None, segments: Segments | None = None
    ) -> tuple[Float[Tensor, "B T D"], AttentionTrace]:
        """As `Layer.advance`."""
        start = state.position if state is not None else None
        q, k, v, columns = self._project(x, state, segments)
        past_k, past_v = (state.k.to(k.dtype), state.v.to(v.dtype)) if state is not None else (None, None)
        y = window_attention(
            q,
            k,
            v,
            window=self.config.window,
            past_k=past_k,
            past_v=past_v,
            position=start,
            segments=segments,
            deterministic=self.deterministic,
        )
        return self.out_proj(y.flatten(2)), AttentionTrace(k, v, columns, segments)

    def advance_last(
        self, x: Float[Tensor, "B T D"], state: AttentionState | None, segments: Segments | None = None
    ) -> tuple[Float[Tensor, "B L D"], AttentionTrace]:
        """As `Layer.advance_last`: keys of all steps, and one query where the piece holds every key that it sees."""
        (batch, time), window = x.shape[:2], self.config.window
        inside = time >= window if window is not None and state is not None else state is None
        alone = separable(self.qkv_proj) and not self.config.short_conv
        if not inside or time < 2 or segments is not None or not alone:
            return super().advance_last(x, state, segments)
        kv = self.qkv_proj.from_feature(x, self.heads * self.width).view(batch, time, 2 * self.groups, self.width)
        k, v = kv.split(self.groups, 2)
        k = self._turned(k, state, None)
        q = self.qkv_proj(x[:, -1:]).view(batch, 1, -1, self.width)[:, :, : self.heads]
        q = self._turned(q, state, None, skipped=time - 1)
        past = time - 1 if window is None else min(window, time) - 1
        before = slice(time - 1 - past, time - 1)
        y = window_attention(
            q,
            k[:, -1:],
            v[:, -1:],
            window=None,  # all that is handed over is in sight
            past_k=k[:, before],
            past_v=v[:, before],
            position=torch.full((batch,), past, dtype=torch.int64, device=x.device),
            deterministic=self.deterministic,
        )
        return self.out_proj(y.flatten(2)), AttentionTrace(k, v, x[..., :0], None)

    def _project(
        self, x: Tensor, state: AttentionState | None, segments: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> (q `[B T H K]` and k `[B T G K]`, turned; v; the inputs of the short convolution, none without one)."""
        batch, time, _ = x.shape
        heads = [self.heads, self.groups, self.groups]
        if self.config.short_conv is None and x.is_cuda and torch.is_grad_enabled():
            # in parts from the beginning: gradients of views of one tensor would have to be copied together
            parts = in_parts(self.qkv_proj, x, [count * self.width for count in heads])
            q, k, v = (part.unflatten(2, (count, self.width)) for part, count in zip(parts, heads, strict=True))
            return self._turned(q, state, segments), self._turned(k, state, segments), v, x[..., :0]
        columns = self.qkv_proj(x)
        qkv = self._conv(columns, state, segments) if self.config.short_conv else columns
        qk, v = qkv.view(batch, time, sum(heads), self.width).split([self.heads + self.groups, self.groups], dim=2)
        q, k = self._turned(qk, state, segments).split(heads[:2], dim=2)
        return q, k, v, columns

    def _turned(
        self, heads: Tensor, state: AttentionState | None, segments: Segments | None, skipped: int = 0
    ) -> Tensor:
        """`[B T H K]` with rotary positions, where the layer has them; without segments from the step `skipped` on."""
        if self.config.rope_base is None:
            return heads
        start = state.position if state is not None else None
        time = heads.shape[1] + skipped
        positions = self._positions(heads.shape[0], time, start, segments, heads.device)[..., skipped:]
        turn = partial(rotary, positions=positions, base=self.config.rope_base)
        return cheap("rotary", turn(heads), turn, heads)

    @staticmethod
    def _positions(
        batch: int, time: int, start: Tensor | None, segments: Segments | None, device: torch.device
    ) -> Tensor:
        """Absolute position of every step, int64: `[T]` where all rows agree, else `[B T]`."""
        steps = torch.arange(time, device=device)
        if segments is not None:
            bounds = segments.on(device)
            shift = -bounds[:-1] if start is None else start - bounds[:-1]
            return (steps + torch.repeat_interleave(shift, bounds.diff(), output_size=time)).unsqueeze(0)
        return steps if start is None else start[:, None] + steps

    def commit(self, state: AttentionState | None, trace: AttentionTrace, keep: Keep | None = None) -> AttentionState:
        """As `Layer.commit`."""
        (batch, time), device = trace.k.shape[:2], trace.k.device
        bounds = sequence_bounds(batch, time, trace.segments)
        steps = keep_per_sequence(keep, bounds.diff())
        if keep is None and trace.segments is None:  # made there: a copy to a GPU would wait for all it has to do
            kept = keep_on_device(None, batch, time, device)
            starts = torch.arange(batch, device=device) * time
        else:
            kept, starts = (value.to(device, non_blocking=True) for value in (steps, bounds[:-1]))
        if state is None:
            rows = sequence_count(batch, trace.segments)
            state = self._with_room(self.init_state(rows, device=device, dtype=trace.k.dtype), steps)
        else:
            state = self._with_room(state, state.position + kept)
        k, v = (_write_ring(r, n, state.position, kept, starts) for r, n in ((state.k, trace.k), (state.v, trace.v)))
        conv = state.conv
        if self.config.short_conv:
            conv = last_columns(conv, trace.columns, steps, trace.segments)
        return AttentionState(k, v, state.position + kept, conv)

    def _with_room(self, state: AttentionState, ends: Tensor) -> AttentionState:
        """For full attention: the same state with capacity up to the positions `ends`, doubled as often as needed."""
        if self.config.window is not None or ends.numel() == 0:
            return state
        capacity = buffer_capacity(int(ends.max()), state.k.shape[1])
        extra = capacity - state.k.shape[1]
        if extra == 0:
            return state
        pads = [r.new_zeros(r.shape[0], extra, *r.shape[2:]) for r in (state.k, state.v)]
        return state._replace(k=torch.cat([state.k, pads[0]], 1), v=torch.cat([state.v, pads[1]], 1))

    def commit_(self, state: AttentionState, trace: AttentionTrace, keep: Keep | None = None) -> None:
        """As `Layer.commit_`: writes the slots of the kept steps and no others.

        Raises:
            ValueError: on a CPU, if the buffer of full attention has no room for them (see `resized`).
        """
        if trace.segments is not None:
            write_(state, self.commit(state, trace, keep))
            return
        batch, time = trace.k.shape[:2]
        kept = keep_on_device(keep, batch, time, trace.k.device)
        slots = state.k.shape[1]
        if self.config.window is None and kept.device.type == "cpu" and kept.numel():
            needed = int((state.position + kept).max())
            if needed > slots:
                raise ValueError(f"attention: the buffer holds {slots} steps, {needed} are to be kept: resize it first")
        for ring, new in ((state.k, trace.k), (state.v, trace.v)):
            _write_ring_(ring, new, state.position, kept)
        if self.config.short_conv:
            last_columns_(state.conv, trace.columns, kept)
        state.position.add_(kept)

    def step_(self, x: Float[Tensor, "B 1 D"], state: AttentionState, norm: nn.Module) -> Float[Tensor, "B 1 D"]:
        """As `Layer.step_`; on a GPU with the products of `linear_step`, and one slot written by `ring_write_`."""
        before = norm_of(norm, self.qkv_proj, self.out_proj)
        if before is None or self.config.short_conv or not has_step_kernels(x):
            return super().step_(x, state, norm)
        rows = x[:, 0].contiguous()
        heads = linear_step(rows, self.qkv_proj.weight, norm=before).view(x.shape[0], 1, -1, self.width)
        qk, v = heads.split([self.heads + self.groups, self.groups], dim=2)
        if self.config.rope_base is not None:
            qk = rotary(qk, state.position[:, None], base=self.config.rope_base)
        q, k = qk.split([self.heads, self.groups], dim=2)
        y = window_attention(
            q, k, v, window=self.config.window, past_k=state.k, past_v=state.v, position=state.position
        )
        ring_write_(k[:, 0], v[:, 0], state.k, state.v, state.position)
        return linear_step(y.reshape(x.shape[0], -1), self.out_proj.weight, residual=rows)[:, None]

    def read_piece(
        self, x: Float[Tensor, "B T D"], state: AttentionState, norm: nn.Module
    ) -> tuple[Float[Tensor, "B T D"], AttentionTrace]:
        """As `Layer.read_piece`; on a GPU with the products of `linear_step`."""
        before = norm_of(norm, self.qkv_proj, self.out_proj)
        if before is None or self.config.short_conv or not has_piece_kernels(x):
            return super().read_piece(x, state, norm)
        rows = x.flatten(0, 1).contiguous()
        columns = linear_step(rows, self.qkv_proj.weight, norm=before).view(*x.shape[:2], -1)
        qk, v = columns.unflatten(2, (-1, self.width)).split([self.heads + self.groups, self.groups], dim=2)
        q, k = self._turned(qk, state, None).split([self.heads, self.groups], dim=2)
        y = window_attention(
            q, k, v, window=self.config.window, past_k=state.k, past_v=state.v, position=state.position
        )
        out = linear_step(y.reshape(len(rows), -1), self.out_proj.weight, residual=rows)
        return out.view(x.shape), AttentionTrace(k, v, columns, None)

    def resized(self, state: AttentionState, capacity: int) -> AttentionState:
        """As `Layer.resized`. No key may be lost: `capacity` is at least the largest position."""
        if self.config.window is not None or capacity == state.k.shape[1]:
            return state
        rings = []
        for ring in (state.k, state.v):
            resized = ring.new_zeros(ring.shape[0], capacity, *ring.shape[2:])
            shared = min(capacity, ring.shape[1])
            resized[:, :shared] = ring[:, :shared]
            rings.append(resized)
        return state._replace(k=rings[0], v=rings[1])

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """As `Layer.init_state`: a ring of w - 1 empty slots, or for full attention a buffer without capacity yet."""
        weight = self.qkv_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        slots = 0 if self.config.window is None else self.config.window - 1
        ring = torch.zeros(batch, slots, self.groups, self.width, device=device, dtype=dtype)
        columns = (self.config.short_conv or 1) - 1
        return AttentionState(
            ring,
            torch.zeros_like(ring),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, columns, weight.shape[0], device=device, dtype=dtype),
        )


def buffer_capacity(length: int, present: int = 0) -> int:
    """Slots of a full-attention buffer that has `present` slots and is to hold `length` keys: doubled when full."""
    capacity = max(present, FIRST_CAPACITY if length else 0)
    while capacity < length:
        capacity *= 2
    return capacity


def _write_ring(ring: Tensor, new: Tensor, position: Tensor, kept: Tensor, starts: Tensor) -> Tensor:
    """The ring `[S P G K]` after the first `kept[s]` new steps of each sequence.

    Slot j ends up with the newest position p that is j modulo P. A gather rather than a scatter: no two steps write to
    one place, and gradients flow to old and new alike.
    """
    slots = ring.shape[1]
    flat = new.flatten(0, 1)
    if slots == 0 or flat.shape[0] == 0:
        return ring.clone()
    if flat.shape[0] == new.shape[0] == ring.shape[0]:  # one step of each row, as in decoding: one slot changes
        rows, slot = torch.arange(ring.shape[0], device=ring.device), torch.remainder(position, slots)
        written = ring.clone()
        written[rows, slot] = torch.where((kept > 0)[:, None, None], flat.to(ring.dtype), ring[rows, slot])
        return written
    last = (position + kept - 1)[:, None]
    newest = last - torch.remainder(last - torch.arange(slots, device=ring.device), slots)
    fresh = newest >= position[:, None]
    index = (starts[:, None] + (newest - position[:, None]).clamp_min(0)).clamp_max(flat.shape[0] - 1)
    return torch.where(fresh[..., None, None], flat[index].to(ring.dtype), ring)


def _write_ring_(ring: Tensor, new: Tensor, position: Tensor, kept: Tensor) -> None:
    """`_write_ring` into the ring itself: `[B P G K]` and `[B T G K]`, everything on one device, nothing read back."""
    slots, (batch, time) = ring.shape[1], new.shape[:2]
    if slots == 0 or batch * time == 0:
        return
    if time > slots:  # steps meet in a slot, and the newest of them stays
        starts = torch.arange(batch, device=ring.device) * time
        ring.copy_(_write_ring(ring, new, position, kept, starts))
        return
    steps = torch.arange(time, device=ring.device)
    rows, slot = torch.arange(batch, device=ring.device)[:, None], torch.remainder(position[:, None] + steps, slots)
    taken = (steps < kept[:, None])[..., None, None]
    ring[rows, slot] = torch.where(taken, new.to(ring.dtype), ring[rows, slot])
