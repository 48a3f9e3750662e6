"""A layer's step on chosen backends: conv, gates, recurrence and gated norm of a batch. Knows tensors, and no host.

Launches: a prefill part is conv_prologue, prefill and gated_norm; a decode part fused_decode and a speculative part
fused_verify, or conv_prologue, decode or verify, and gated_norm where the phase's backend has no fused kernel. With
replay it is replay_decode and replay_verify, and replay_fold in front of a prefill part. In what form a backend takes
its arguments is said by its row (`Wants`).
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.hosts.batch import Batch, Checkpoints, DecodePart, PrefillPart, SpecPart
from gdn_plugin.ops.heads import flat_qkv
from gdn_plugin.registry import Problem, Selection


@dataclass(frozen=True, slots=True)
class Shape:
    """What a rank's share of a layer looks like, and what its host promises; dtypes by name, as the registry has them.

    Args:
        spec_tokens: most tokens that a speculative row brings (drafts + 1); 0 without speculation.
        checkpoints: the host may ask for states from the middle of a prefill.
        bias_dtype: of dt_bias.
        null_index: pool rows up to this one hold no sequence; padding names them.
        padding: what the ops may take for granted of padding sequences, see `gdn_plugin.ops`.
        gated_norm: the gated RMSNorm behind the recurrence is the plugin's to do.
        padded_pool: rows of the state pool are further apart than a state is long: a page holds conv and state.
        replay: slots of a row's ring of updates; 0: every step writes its states. A speculative row then has one row.
    """

    dtype: str
    state_dtype: str
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_width: int
    spec_tokens: int = 0
    checkpoints: bool = False
    bias_dtype: str = ""
    null_index: int = -1
    padding: str = "any"
    padded_pool: bool = True
    gated_norm: bool = True
    replay: int = 0

    def problems(self) -> dict[str, Problem]:
        """What the registry is to choose backends for.

        Speculative batches count as ragged: drafts end early, at a stop, at the length limit, or where a drafter has no
        more to say.
        """
        if self.replay:
            used = ["conv_prologue", "prefill", "replay_fold", "replay_decode"]
            used += ["replay_verify"] if self.spec_tokens else []
        else:
            used = ["conv_prologue", "prefill", "decode", "fused_decode"]
            used += ["verify", "fused_verify"] if self.spec_tokens else []
        speculative = ("conv_prologue", "verify", "fused_verify")
        problems = {
            op: Problem(
                op,
                dtype=self.dtype,
                state_dtype=self.state_dtype,
                num_k_heads=self.num_k_heads,
                num_v_heads=self.num_v_heads,
                head_k_dim=self.head_k_dim,
                head_v_dim=self.head_v_dim,
                padded_pool=self.padded_pool,
                checkpoints=self.checkpoints and op == "prefill",
                max_spec_tokens=self.spec_tokens if op in speculative else self._ring_tokens(op),
                ragged=op in ("verify", "fused_verify"),
                padding=self.padding if op in ("prefill", "decode", "verify") else "any",
                ring=self.replay if op.startswith("replay_") else 0,
                bias_dtype="" if op in ("prefill", "replay_fold") else self.bias_dtype,
                qk_l2norm=False if op in ("prefill", "decode", "verify") else None,  # conv_prologue has done it
            )
            for op in used
        }
        if self.gated_norm:
            heads, dim = self.num_v_heads, self.head_v_dim
            problems["gated_norm"] = Problem("gated_norm", self.dtype, "float32", heads, heads, dim, dim)
        return problems

    def _ring_tokens(self, op: str) -> int:
        """Tokens that a step of `op` may put into a ring: by the columns of conv_state, with drafts or without."""
        return max(self.spec_tokens, 1) if op in ("replay_decode", "replay_verify") else 0


class Ring(NamedTuple):
    """Beside each row's state its last updates, as `ops.replay_decode` has them; in the order of the ops' arguments.

    Args:
        k: [N, C, Hk, K] io dtype.
        u: [N, C, Hv, V], the state's dtype.
        g: [N, C, Hv] fp32.
        span: [N, Hk, 2] int32; zeros: the row is a plain state.
    """

    k: Tensor
    u: Tensor
    g: Tensor
    span: Tensor


@dataclass(frozen=True, slots=True)
class Parameters:
    """The layer's weights and pools, read anew each step: the host may replace them.

    Args:
        conv_weight: [dim, W].
        conv_state: [N, dim, W-1 + drafts] view, either physical order.
        state: [N, Hv, V, K].
        ring: with replay.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    A_log: Tensor
    dt_bias: Tensor
    conv_state: Tensor
    state: Tensor
    ring: Ring | None = None

    def in_front(self, mixed_qkv: Tensor, a: Tensor, b: Tensor) -> tuple[Any, ...]:
        """What every fused op takes first, with replay the ring behind it."""
        first = (mixed_qkv, self.conv_weight, self.conv_bias, self.conv_state, a, b, self.A_log, self.dt_bias)
        return (*first, self.state, *(self.ring or ()))


@dataclass(frozen=True, slots=True)
class GatedNorm:
    """The gated RMSNorm behind the recurrence, where it is this call's to do. z: as `ops.gated_norm` takes it."""

    z: Tensor
    weight: Tensor
    eps: float
    gate: str


class Core:
    """Runs batches of a layer on the backends of `selection`."""

    def __init__(self, shape: Shape, selection: Selection) -> None:
        self.shape = shape
        self.selection = selection
        self._fused = {phase for phase in ("decode", "verify") if selection.fuses(phase)}

    def run(
        self,
        batch: Batch,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        parameters: Parameters,
        out: Tensor,
        norm: GatedNorm | None = None,
    ) -> None:
        """Fill `out` for one step's batch and move the states on.

        Args:
            mixed_qkv: [T, 2*Hk*K + Hv*V], any row stride; T may exceed the batch's tokens (padding).
            a, b: [T, Hv]. These and z also with interleaved heads, as the ops take them.
            out: [T, Hv, V], may hold anything. Rows of padding tokens become zero (behind a norm whose z is NaN there,
                NaN): a scale over all rows, or a router, must not see what memory held.
        """
        if batch.num_tokens < out.shape[0]:
            out[batch.num_tokens :].zero_()
        with ops.use(self.selection):
            if batch.decode is not None:
                self._decode(batch, batch.decode, mixed_qkv, a, b, parameters, out, norm)
            if batch.spec is not None:
                self._spec(batch.spec, mixed_qkv, a, b, parameters, out, norm)
            if batch.prefill is not None:
                self._prefill(batch, batch.prefill, mixed_qkv, a, b, parameters, out, norm)

    def _decode(
        self,
        batch: Batch,
        part: DecodePart,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        p: Parameters,
        out: Tensor,
        norm: GatedNorm | None,
    ) -> None:
        mixed_qkv, a, b, out = (x[: part.count] for x in (mixed_qkv, a, b, out))
        if p.ring is not None or "decode" in self._fused:
            step = ops.fused_decode if p.ring is None else ops.replay_decode
            step(
                *p.in_front(mixed_qkv, a, b),
                part.state_indices,
                **self._fused_arguments(norm, None, part.count),
                out=out,
                zero_padding=part.padded,
            )
            return
        q, k, v, _, _ = self._prologue(mixed_qkv, a, b, p, part.state_indices, part.cu_seqlens)
        ops.decode(
            q,
            k,
            v,
            a,
            b,
            p.A_log,
            p.dt_bias,
            p.state,
            self._rows(batch, "decode", part.state_indices),
            use_qk_l2norm=False,
            out=out,
            zero_padding=part.padded,
            null_index=self.shape.null_index,
            padding=self.shape.padding,
        )
        self._norm(norm, out)

    def _prefill(
        self,
        batch: Batch,
        part: PrefillPart,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        p: Parameters,
        out: Tensor,
        norm: GatedNorm | None,
    ) -> None:
        mixed_qkv, a, b = (_take(x, part.tokens, part.first, part.count) for x in (mixed_qkv, a, b))
        wants = self.selection["prefill"].backend.wants
        if p.ring is not None:
            ops.replay_fold(
                *p.ring,
                p.state,
                part.state_indices,
                has_initial_state=part.has_initial_state,
                null_index=self.shape.null_index,
            )
        q, k, v, g, beta = self._prologue(
            mixed_qkv,
            a,
            b,
            p,
            part.state_indices,
            part.cu_seqlens,
            has_initial_state=part.has_initial_state,
            zero_fresh_rows=wants.zeroed_fresh_rows,
            exp_gate=wants.exp_gate,
        )
        kept = part.checkpoints
        emitted = p.state.new_empty((kept.count, *p.state.shape[1:])) if kept is not None else None
        target = _target(out, part.tokens, part.first, part.count)
        ops.prefill(
            q,
            k,
            v,
            g,
            beta,
            p.state,
            self._rows(batch, "prefill", part.state_indices),
            part.cu_seqlens,
            has_initial_state=None if wants.zeroed_fresh_rows else part.has_initial_state,
            use_qk_l2norm=False,
            exp_gate=wants.exp_gate,
            max_seqlen=part.max_seqlen,
            out=target,
            checkpoints=emitted,
            checkpoint_cu_starts=kept.cu_starts if kept is not None else None,
            checkpoint_every=kept.every if kept is not None else 0,
            null_index=self.shape.null_index,
            padding=self.shape.padding,
        )
        if kept is not None and emitted is not None:
            _keep_states(p.state, kept, emitted)
            if p.ring is not None:
                p.ring.span.index_fill_(0, kept.rows, 0)
            history = self._flat(mixed_qkv[kept.conv_tokens]).transpose(1, 2)
            p.conv_state[:, :, : self.shape.conv_width - 1].index_copy_(0, kept.rows, history.to(p.conv_state.dtype))
        self._norm(norm, target, part.tokens, part.first)
        if part.tokens is not None:
            out.index_copy_(0, part.tokens, target)

    def _spec(
        self,
        part: SpecPart,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        p: Parameters,
        out: Tensor,
        norm: GatedNorm | None,
    ) -> None:
        mixed_qkv, a, b = (_take(x, part.tokens, 0, part.count) for x in (mixed_qkv, a, b))
        target = _target(out, part.tokens, 0, part.count)
        if p.ring is not None or "verify" in self._fused:
            step = ops.fused_verify if p.ring is None else ops.replay_verify
            step(
                *p.in_front(mixed_qkv, a, b),
                # With a ring the host's first row of a sequence; it need have no other.
                part.state_indices if p.ring is None else part.state_indices[:, 0],
                part.num_accepted_tokens,
                part.cu_seqlens,
                has_initial_state=part.has_initial_state,
                **self._fused_arguments(norm, part.tokens, part.count),
                out=target,
                zero_padding=part.padded,
            )
        else:
            # A sequence that nothing has been computed of starts from its first row, which may hold another user's
            # state: the prologue zeroes it, in the launch it makes anyway.
            q, k, v, _, _ = self._prologue(
                mixed_qkv,
                a,
                b,
                p,
                part.state_indices[:, 0],
                part.cu_seqlens,
                has_initial_state=part.has_initial_state,
                num_accepted_tokens=part.num_accepted_tokens,
                zero_fresh_rows=True,
            )
            ops.verify(
                q,
                k,
                v,
                a,
                b,
                p.A_log,
                p.dt_bias,
                p.state,
                part.state_indices,
                part.num_accepted_tokens,
                part.cu_seqlens,
                use_qk_l2norm=False,
                out=target,
                zero_padding=part.padded,
                null_index=self.shape.null_index,
                padding=self.shape.padding,
            )
            self._norm(norm, target, part.tokens)
        if part.tokens is not None:
            out.index_copy_(0, part.tokens, target)

    def _flat(self, inputs: Tensor) -> Tensor:
        """Rows of mixed_qkv [C, W-1, ...] in the order of the convolution's channels."""
        if inputs.dim() == 3:
            return inputs
        return flat_qkv(inputs.flatten(0, 1), self.shape.head_k_dim).unflatten(0, inputs.shape[:2])

    def _rows(self, batch: Batch, op: str, rows: Tensor) -> Tensor:
        """Row numbers as the op's backend takes them: a column of a wider block table is copied once a step."""
        if rows.is_contiguous() or not self.selection[op].backend.wants.dense_rows:
            return rows
        return batch.shared.get(op, self, rows.contiguous)

    def _fused_arguments(self, norm: GatedNorm | None, tokens: Tensor | None, count: int) -> dict[str, Any]:
        """What the fused ops take beside tensors and rows: the layer's sizes, and the gated norm of a part's tokens."""
        sizes = {
            "num_k_heads": self.shape.num_k_heads,
            "head_k_dim": self.shape.head_k_dim,
            "head_v_dim": self.shape.head_v_dim,
            "null_index": self.shape.null_index,
        }
        if norm is None:
            return sizes
        z = _take(norm.z, tokens, 0, count)
        return sizes | {"z": z, "norm_weight": norm.weight, "norm_eps": norm.eps, "gate": norm.gate}

    def _norm(self, norm: GatedNorm | None, x: Tensor, tokens: Tensor | None = None, first: int = 0) -> None:
        """The gated norm of a part without a fused kernel, in place."""
        if norm is not None:
            z = _take(norm.z, tokens, first, x.shape[0])
            ops.gated_norm(x, z, norm.weight, eps=norm.eps, gate=norm.gate, out=x)

    def _prologue(
        self,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        p: Parameters,
        state_indices: Tensor,
        cu_seqlens: Tensor,
        *,
        has_initial_state: Tensor | None = None,
        num_accepted_tokens: Tensor | None = None,
        zero_fresh_rows: bool = False,
        exp_gate: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return ops.conv_prologue(
            mixed_qkv,
            p.conv_weight,
            p.conv_bias,
            p.conv_state,
            state_indices,
            cu_seqlens,
            has_initial_state,
            a,
            b,
            p.A_log,
            p.dt_bias,
            num_k_heads=self.shape.num_k_heads,
            head_k_dim=self.shape.head_k_dim,
            head_v_dim=self.shape.head_v_dim,
            state=p.state if zero_fresh_rows else None,
            exp_gate=exp_gate,
            num_accepted_tokens=num_accepted_tokens,
            null_index=self.shape.null_index,
        )


@functools.cache
def resolve(shape: Shape, requests: tuple[tuple[str, str], ...], device_type: str, log: logging.Logger) -> Selection:
    """Backends for a rank's share of the layers, self-checked; one line in the host's log a distinct choice.

    Args:
        requests: (phase, request) pairs.
    """
    selection = ops.resolve(shape.problems(), dict(requests), device=device_type, compile_ahead=True)
    for line in selection.describe():
        log_once(log, logging.INFO, f"gdn_plugin: {line}")
    return selection


@functools.cache
def log_once(log: logging.Logger, level: int, line: str) -> None:
    """A line that every layer would say, once a process."""
    log.log(level, line)


def _keep_states(pool: Tensor, kept: Checkpoints, emitted: Tensor) -> None:
    """The wanted ones of the emitted states to their pool rows."""
    if pool.is_cpu:  # row by row: no buffer in between, whose pages a CPU would have to map first
        for row, source in zip(kept.rows.tolist(), kept.emitted.tolist(), strict=True):
            pool[row].copy_(emitted[source])
    else:
        pool.index_copy_(0, kept.rows, emitted.index_select(0, kept.emitted))


def _take(x: Tensor, tokens: Tensor | None, first: int, count: int) -> Tensor:
    """A part's tokens of x: a view where they are in one piece."""
    return x[first : first + count] if tokens is None else x.index_select(0, tokens)


def _target(out: Tensor, tokens: Tensor | None, first: int, count: int) -> Tensor:
    """Where a part's outputs go: rows of `out` itself where its tokens are in one piece."""
    return out[first : first + count] if tokens is None else torch.empty_like(out[:count])
