"""A layer's GDN core on chosen backends: one step's batch through the ops. Knows tensors, not vLLM.

A prefill part is two launches (conv_prologue, prefill), a decode part one (fused_decode, with the gated norm behind it
where the caller hands that over) or two where the decode backend has no fused kernel, a speculative part two
(conv_prologue, verify). What FlashInfer's kernels want of row numbers is made once a step, by the first layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.hosts.vllm.metadata import NULL_INDEX, Batch, Checkpoints, DecodePart, PrefillPart, SpecPart
from gdn_plugin.registry import Problem, Selection


@dataclass(frozen=True, slots=True)
class Shape:
    """What a rank's share of a layer looks like; dtypes by name, as the registry has them.

    Args:
        spec_tokens: most tokens that a speculative row brings (drafts + 1); 0 without speculation.
        checkpoints: the host may ask for states from the middle of a prefill.
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

    @property
    def qkv_dim(self) -> int:
        return 2 * self.num_k_heads * self.head_k_dim + self.num_v_heads * self.head_v_dim

    def problems(self) -> dict[str, Problem]:
        """What the registry is to choose backends for.

        vLLM's pools are always row-padded: a page holds both states. Its speculative batches are ragged: drafts end
        early, at a stop, at the length limit, or where a drafter has no more to say.
        """
        used = ["conv_prologue", "prefill", "decode", "fused_decode"] + (["verify"] if self.spec_tokens else [])
        return {
            op: Problem(
                op,
                dtype=self.dtype,
                state_dtype=self.state_dtype,
                num_k_heads=self.num_k_heads,
                num_v_heads=self.num_v_heads,
                head_k_dim=self.head_k_dim,
                head_v_dim=self.head_v_dim,
                padded_pool=True,
                checkpoints=self.checkpoints and op == "prefill",
                max_spec_tokens=self.spec_tokens if op in ("verify", "conv_prologue") else 0,
                ragged=op == "verify",
            )
            for op in used
        }


@dataclass(frozen=True, slots=True)
class Parameters:
    """The layer's weights and pools, read anew each step: the host may replace them.

    Args:
        conv_weight: [dim, W].
        conv_state: [N, dim, W-1 + drafts] view, either physical order.
        state: [N, Hv, V, K].
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    A_log: Tensor
    dt_bias: Tensor
    conv_state: Tensor
    state: Tensor


@dataclass(frozen=True, slots=True)
class GatedNorm:
    """The gated RMSNorm behind the core, where it is this call's to do.

    Args:
        z: [T, Hv, V].
        apply: apply(x, z) normalises rows of the output buffer in place, for parts without a fused kernel.
    """

    z: Tensor
    weight: Tensor
    eps: float
    gate: str
    apply: Callable[[Tensor, Tensor], None]


class Core:
    """Runs batches of a layer on the backends of `selection`."""

    def __init__(self, shape: Shape, selection: Selection) -> None:
        self.shape = shape
        self.selection = selection
        self._backend = selection.backends()
        # FlashInfer's prefill has no mask for fresh sequences and takes exp(g): the prologue zeroes their rows and
        # gives that, in the launch it makes anyway.
        self._flashinfer_prefill = self._backend["prefill"] == "flashinfer"
        self._native_norm = self._backend["prefill"] == "cpu"

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
            a, b: [T, Hv].
            out: [T, Hv, V]; rows of padding tokens are left as they are, or are zero.
        """
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
        n = part.count
        if self.selection.fuse_decode:
            ops.fused_decode(
                mixed_qkv[:n],
                p.conv_weight,
                p.conv_bias,
                p.conv_state,
                a[:n],
                b[:n],
                p.A_log,
                p.dt_bias,
                p.state,
                part.state_indices,
                num_k_heads=self.shape.num_k_heads,
                head_k_dim=self.shape.head_k_dim,
                head_v_dim=self.shape.head_v_dim,
                z=norm.z[:n] if norm is not None else None,
                norm_weight=norm.weight if norm is not None else None,
                norm_eps=norm.eps if norm is not None else 1e-6,
                gate=norm.gate if norm is not None else "silu",
                out=out[:n],
                null_index=NULL_INDEX,
                backend=self._backend["fused_decode"],
            )
            return
        q, k, v, _, _ = self._prologue(
            mixed_qkv[:n], a[:n], b[:n], p, part.state_indices, part.cu_seqlens, None, None, None, exp_gate=False
        )
        rows, null_index = self._decode_rows(batch, part.state_indices)
        ops.decode(
            q,
            k,
            v,
            a[:n],
            b[:n],
            p.A_log,
            p.dt_bias,
            p.state,
            rows,
            use_qk_l2norm=False,
            out=out[:n],
            null_index=null_index,
            backend=self._backend["decode"],
        )
        if norm is not None:
            self._apply(norm, out[:n], norm.z[:n])

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
        zeroed = self._flashinfer_prefill
        q, k, v, g, beta = self._prologue(
            mixed_qkv,
            a,
            b,
            p,
            part.state_indices,
            part.cu_seqlens,
            part.has_initial_state,
            None,
            p.state if zeroed else None,
            exp_gate=self._flashinfer_prefill,
        )
        kept = part.checkpoints
        emitted = None
        if kept is not None:
            emitted = p.state.new_empty((kept.count, *p.state.shape[1:]))
        target = out[part.first : part.first + part.count] if part.tokens is None else torch.zeros_like(v)
        ops.prefill(
            q,
            k,
            v,
            g,
            beta,
            p.state,
            self._dense_rows(batch, "prefill", part.state_indices) if zeroed else part.state_indices,
            part.cu_seqlens,
            has_initial_state=None if zeroed else part.has_initial_state,
            use_qk_l2norm=False,
            exp_gate=self._flashinfer_prefill,
            max_seqlen=part.max_seqlen,
            out=target,
            checkpoints=emitted,
            checkpoint_cu_starts=kept.cu_starts if kept is not None else None,
            checkpoint_every=kept.every if kept is not None else 0,
            null_index=NULL_INDEX,
            backend=self._backend["prefill"],
        )
        if kept is not None and emitted is not None:
            _keep_states(p.state, kept, emitted)
            history = mixed_qkv[kept.conv_tokens].transpose(1, 2)
            p.conv_state[:, :, : self.shape.conv_width - 1].index_copy_(0, kept.rows, history.to(p.conv_state.dtype))
        if norm is not None:
            self._apply(norm, target, _take(norm.z, part.tokens, part.first, part.count))
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
        q, k, v, _, _ = self._prologue(
            mixed_qkv,
            a,
            b,
            p,
            part.state_indices[:, 0],
            part.cu_seqlens,
            None,
            part.num_accepted_tokens,
            None,
            exp_gate=False,
        )
        target = out[: part.count] if part.tokens is None else torch.zeros_like(v)
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
            null_index=NULL_INDEX,
            backend=self._backend["verify"],
        )
        if norm is not None:
            self._apply(norm, target, _take(norm.z, part.tokens, 0, part.count))
        if part.tokens is not None:
            out.index_copy_(0, part.tokens, target)

    def _decode_rows(self, batch: Batch, rows: Tensor) -> tuple[Tensor, int]:
        """Row numbers that the decode backend's kernel takes as they are, and the null index that they go with.

        FlashInfer skips negative rows of an fp32 pool and knows no null block, so padding becomes -1: one launch a step
        and none a layer. With a bf16 pool it runs padding on row 0, which is the null block.
        """
        if self._backend["decode"] != "flashinfer":
            return rows, NULL_INDEX
        if self.shape.state_dtype == "float32":
            return batch.shared.get("decode", self, lambda: torch.threshold(rows, NULL_INDEX, -1)), -1
        return self._dense_rows(batch, "decode", rows), NULL_INDEX

    def _dense_rows(self, batch: Batch, part: str, rows: Tensor) -> Tensor:
        """FlashInfer reads row numbers that lie side by side; a column of a wider block table is copied once a step."""
        return rows if rows.is_contiguous() else batch.shared.get(part, self, rows.contiguous)

    def _apply(self, norm: GatedNorm, x: Tensor, z: Tensor) -> None:
        """The gated norm of a part without a fused kernel, in place."""
        if self._native_norm:
            from gdn_plugin.ops.cpu.gated_norm import gated_norm

            gated_norm(x, z, norm.weight, norm.eps, norm.gate)
        else:
            norm.apply(x, z)

    def _prologue(
        self,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        p: Parameters,
        state_indices: Tensor,
        cu_seqlens: Tensor,
        has_initial_state: Tensor | None,
        num_accepted_tokens: Tensor | None,
        state: Tensor | None,
        *,
        exp_gate: bool,
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
            state=state,
            exp_gate=exp_gate,
            num_accepted_tokens=num_accepted_tokens,
            null_index=NULL_INDEX,
            backend=self._backend["conv_prologue"],
        )


def _keep_states(pool: Tensor, kept: Checkpoints, emitted: Tensor) -> None:
    """The wanted ones of the emitted states to their pool rows."""
    if pool.is_cpu:  # row by row: no buffer in between, whose pages a CPU would have to map first
        for row, source in zip(kept.rows.tolist(), kept.emitted.tolist(), strict=True):
            pool[row].copy_(emitted[source])
    else:
        pool.index_copy_(0, kept.rows, emitted.index_select(0, kept.emitted))


def _take(x: Tensor, tokens: Tensor | None, first: int, count: int) -> Tensor:
    return x[first : first + count] if tokens is None else x.index_select(0, tokens)
