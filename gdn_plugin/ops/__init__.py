"""Gated Delta Net as PyTorch ops: the public functions check, default and call `torch.ops.gdn.*`.

Per value head, with state S in R^{V x K} (Yang et al., "Gated Delta Networks", arXiv:2412.06464, section 3):

    S <- exp(g_t) * S;    S <- S + beta_t * (v_t - S k_t) k_t^T;    o_t = scale * S q_t

Letters: T packed tokens, B sequences, Hk key heads, Hv value heads (a multiple of Hk; value head h reads key head
h // (Hv // Hk)), K and V head dims, W the width of the convolution, dim = 2*Hk*K + Hv*V, N pool rows, R slots of a
ring.

The same for every function here:

- io tensors (q, k, v, mixed_qkv, z, out) share one dtype: bf16, fp16 or fp32. g, beta, gates, norms and all
  accumulation are fp32; q and k are rounded to the io dtype behind the norm.
- state [N, Hv, V, K] fp32, bf16 or fp16: rows dense, any distance apart. conv_state [N, dim, W-1 or more], dense in
  either order of its last two dims. Both are updated in place.
- state_indices int32: each sequence's row, unique. A row <= null_index is padding: nothing is read or written for
  that sequence, whether or not it has tokens.
- Values are not checked, except under GDN_PLUGIN_DEBUG=1: that would synchronise. So rows that are unique and inside
  the pool, offsets that rise to at most T, and counts of accepted tokens from 1 to S are the caller's to see to.
- padding: what the caller promises of padding, for kernels that have no mask for it. "any": nothing. "scratch": padding
  sequences name row 0 (null_index 0), which belongs to nobody and may be read and written, and padding tokens hold
  finite numbers, as conv_prologue leaves them. "none": no sequence is padding and cu_seqlens[-1] is T.
- cu_seqlens [B+1] int32 or int64 from 0 on; repeated offsets are empty sequences, which change no state. Tokens behind
  the last offset are padding.
- Without `out`, rows of padding tokens are zero. With `out` (contiguous), they become zero under zero_padding; without
  it they stay as they were or become zero.
- Projections may come with their heads interleaved, as Qwen3-Next's are: a key head's q, its k and the v of its value
  heads together (with their z between one share and the next), and the b and a of its value heads. A view whose key
  heads are a dim of their own says so: mixed_qkv [T, Hk, dim/Hk] in place of [T, dim], z [T, Hk, Hv/Hk, V] in place of
  [T, Hv, V], a and b [T, Hk, Hv/Hk] in place of [T, Hv]. Channels of conv_weight and conv_state keep the flat order.
- `backend`: None for the current selection (`use`, then the GDN_PLUGIN_* variables, then auto), a name, or names to try
  in order joined by commas. In a compiled graph the choice is a constant.
- Wrong arguments raise ValueError with the argument's name, before anything is written; NoBackendError says that
  nothing that was asked for can run these shapes here, and why.
- No synchronisation on CUDA (backend `reference` excepted); every call can be captured in a CUDA graph. None of the ops
  has a backward, nor a rule for torch.func.vmap.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gdn_plugin.ops.dispatch import compile_count, resolve, use, warm_up
from gdn_plugin.ops.library import public
from gdn_plugin.ops.record import OPS

__all__ = [
    "compile_count",
    "conv_prologue",
    "decode",
    "fused_decode",
    "fused_verify",
    "gated_norm",
    "prefill",
    "replay_decode",
    "replay_fold",
    "replay_verify",
    "resolve",
    "use",
    "verify",
    "warm_up",
]


@public(OPS["conv_prologue"])
def conv_prologue(
    mixed_qkv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor | None,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    state: Tensor | None = None,
    exp_gate: bool = False,
    num_accepted_tokens: Tensor | None = None,
    null_index: int = -1,
    out: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All that stands between the projections and the delta rule: conv, SiLU, split, L2 norm, gates, conv_state.

    Causal depthwise convolution and SiLU in fp32, rounded to the io dtype; then q and k are L2-normalised per head
    (x * rsqrt(sum(x^2) + 1e-6)) and rounded again.

    Args:
        mixed_qkv: [T, dim], q, k and v side by side, or interleaved; last stride 1, others any.
        conv_weight: [dim, W] io dtype or fp32, any strides; the last tap is the current token.
        conv_bias: [dim] or None.
        conv_state: raw inputs in its own dtype. Columns 0..W-2 are a sequence's last W-1 inputs, oldest first; they are
            read where has_initial_state is True, and overwritten. Columns behind them are for num_accepted_tokens.
        has_initial_state: [B] bool; False starts from zeros whatever the row holds. None: all True.
        a, b: [T, Hv] raw gate projections, or interleaved; io dtype or fp32, last stride 1, others any.
        A_log: [Hv] fp32. dt_bias: [Hv] io dtype or fp32. g = -exp(A_log) * softplus(a + dt_bias), beta = sigmoid(b).
        state: where given, rows of sequences with has_initial_state False (not padding, not empty) are zeroed.
        exp_gate: return exp(g) in place of g.
        num_accepted_tokens: [B] int32, for speculative tokens: with n accepted of the step before, the history is
            columns n-1..n+W-3; afterwards columns 0..W-3 hold the last W-2 inputs before this step and column W-2+j
            this step's input j, so that the next step can accept any number of them.
        out: five contiguous buffers (q, k, v, g, beta) to fill in place of new ones.
    Returns:
        q, k [T, Hk, K], v [T, Hv, V] in the io dtype; g, beta [T, Hv] fp32. Padding tokens, those of padding sequences
        among them: zeros (exp(g): one).
    """


@public(OPS["gated_norm"])
def gated_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    gate: str = "silu",
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The gated RMSNorm behind the delta rule: x * rsqrt(mean(x^2) + eps) * weight * gate(z), in fp32, rounded once.

    Args:
        x, z: [T, Hv, V], z also interleaved; last stride 1, other strides any.
        weight: [V], io dtype or fp32.
        gate: "silu" (z * sigmoid(z)) or "sigmoid".
        out: [T, Hv, V], last stride 1; may be x itself, which is then normalised in place.
    Returns:
        out: the buffer given, or a new one.
    """


@public(OPS["prefill"])
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor,
    *,
    has_initial_state: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    exp_gate: bool = False,
    max_seqlen: int = 0,
    null_index: int = -1,
    padding: str = "any",
    zero_padding: bool = False,
    out: Tensor | None = None,
    checkpoints: Tensor | None = None,
    checkpoint_cu_starts: Tensor | None = None,
    checkpoint_every: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The delta rule over packed sequences; final states land in their pool rows.

    Args:
        q, k: [T, Hk, K]. v: [T, Hv, V]. Last stride 1, other strides any.
        g: [T, Hv] fp32, natural log of the decay, <= 0; under exp_gate, the decay itself.
        beta: [T, Hv] fp32.
        has_initial_state: [B] bool; False starts from zero whatever the row holds, NaN included. None: all True.
        scale: on the output; None is K^-0.5.
        use_qk_l2norm: normalise q and k first (what conv_prologue returns is normalised).
        max_seqlen: the longest sequence, where the host knows; 0 = unknown. A hint for launch sizes.
        checkpoints: [C, Hv, V, K] contiguous, fp32, bf16 or fp16. Rows checkpoint_cu_starts[i] + j of sequence i get
            its state after (j + 1) * checkpoint_every tokens, L_i // checkpoint_every of them.
        checkpoint_cu_starts: [B+1] int32.
        checkpoint_every: a multiple of 64.
    Returns:
        out [T, Hv, V]: the buffer given, or a new one.
    """


@public(OPS["decode"])
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    null_index: int = -1,
    padding: str = "any",
    zero_padding: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token a sequence, B = T; the gates are computed from a and b as in conv_prologue.

    Args:
        q, k: [B, Hk, K]. v: [B, Hv, V]. Last stride 1, other strides any.
        a, b: [B, Hv], or interleaved; io dtype or fp32. A_log: [Hv] fp32. dt_bias: [Hv] io dtype or fp32.
        state_indices: [B] int32, any stride.
        scale: on the output; None is K^-0.5.
    Returns:
        out [B, Hv, V]: the buffer given, or a new one.
    """


@public(OPS["fused_decode"])
def fused_decode(
    mixed_qkv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    scale: float | None = None,
    z: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: str = "silu",
    null_index: int = -1,
    zero_padding: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The whole decode step of one token a sequence: conv_prologue, decode and, with z, the gated RMSNorm behind it.

    Args:
        mixed_qkv, conv_weight, conv_bias, conv_state, a, b, A_log, dt_bias: as in conv_prologue, T = B. Columns of
            conv_state behind W-2 are left alone.
        z: [B, Hv, V], or interleaved, last stride 1, with norm_weight [V] (io dtype or fp32); both or neither. With o
            rounded to the io dtype: out = o * rsqrt(mean(o^2) + norm_eps) * norm_weight * gate(z), in fp32.
        gate: "silu" or "sigmoid".
        scale: on the delta rule's output; None is K^-0.5.
    Returns:
        out [B, Hv, V]: the buffer given, or a new one.
    """


@public(OPS["verify"])
def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    num_accepted_tokens: Tensor,
    cu_seqlens: Tensor,
    *,
    start_rows: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    null_index: int = -1,
    padding: str = "any",
    zero_padding: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Speculative tokens: every token's state is kept, so that the next step can start from any of them.

    Args:
        q, k: [T, Hk, K]. v: [T, Hv, V]. a, b, A_log, dt_bias: as in decode.
        state_indices: [B, S] int32, any row stride, unique. Sequence i starts from row
            state_indices[i, num_accepted_tokens[i] - 1] and writes the state after its token t to row
            state_indices[i, t]; rows past its length are untouched. A sequence whose start row is padding is padding.
        num_accepted_tokens: [B] int32, 1..S, of padding sequences with tokens too.
        cu_seqlens: [B+1]; sequences of at most S tokens.
        start_rows: [B] int32, where the caller has looked the rows to start from up: they are taken as they are, and
            num_accepted_tokens is not read. A row that another sequence writes in this call must not be among them.
            Layers can share them, and FlashInfer's kernel needs no other launch then.
        scale: on the output; None is K^-0.5.
    Returns:
        out [T, Hv, V]: the buffer given, or a new one.
    """


@public(OPS["fused_verify"])
def fused_verify(
    mixed_qkv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    num_accepted_tokens: Tensor,
    cu_seqlens: Tensor,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    has_initial_state: Tensor | None = None,
    start_rows: Tensor | None = None,
    scale: float | None = None,
    z: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: str = "silu",
    null_index: int = -1,
    zero_padding: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The whole step of speculative tokens: conv_prologue, verify and, with z, the gated RMSNorm behind it.

    Args:
        mixed_qkv, conv_weight, conv_bias, a, b, A_log, dt_bias: as in conv_prologue.
        conv_state: [N, dim, W-2+S or more]; rows state_indices[:, 0], columns as num_accepted_tokens of conv_prologue
            says. Columns behind this step's inputs are left alone.
        state_indices: [B, S] int32, any row stride, unique; as in verify. A sequence whose first row, or the row that
            it would start from, is padding is padding.
        num_accepted_tokens: [B] int32, 1..S.
        cu_seqlens: [B+1]; sequences of at most S tokens.
        has_initial_state: [B] bool; False starts from a zero state and zero history whatever the rows hold, and reads
            neither num_accepted_tokens nor start_rows. None: all True.
        start_rows: [B] int32, as in verify, for the state; the history follows num_accepted_tokens all the same.
        z, norm_weight, norm_eps, gate: as in fused_decode, z [T, Hv, V] or interleaved.
        scale: on the delta rule's output; None is K^-0.5.
    Returns:
        out [T, Hv, V]: the buffer given, or a new one.
    """


@public(OPS["replay_decode"])
def replay_decode(
    mixed_qkv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    ring_span: Tensor,
    state_indices: Tensor,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    scale: float | None = None,
    z: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: str = "silu",
    null_index: int = -1,
    zero_padding: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """fused_decode that does not write the state at every token: the token's update goes to the row's ring.

    A row's state S_n is its anchor S_0, which `state` holds, and the n updates in its ring, in their order:

        S_i = exp(g_i) S_(i-1) + u_i k_i^T,    u_i = beta_i (v_i - exp(g_i) S_(i-1) k_i)

    The outputs follow from S_0 and the updates without S_n (gdn_plugin.backends.triton.replay has the sums). A token
    reads the state once and writes k, u and g. Before a step for which the ring has no room, where n + 2 S > R, S_n is
    written to `state` and the ring starts anew; S is 1 here, or what conv_state has columns for, columns - W + 2, so
    that replay_verify can follow. Behind a replay_verify of which drafts were accepted, replay_verify goes on, of one
    token too: it is told how many.

    Args:
        mixed_qkv, conv_weight, conv_bias, conv_state, a, b, A_log, dt_bias, z, norm_weight, norm_eps, gate, scale: as
            in fused_decode.
        state: written only where the ring is full.
        ring_k: [N, R, Hk, K] io dtype, keys as used. ring_u: [N, R, Hv, V] fp32, bf16 or fp16. ring_g: [N, R, Hv] fp32.
            Rows dense, any distance apart, of `state`'s numbers; R >= 2 S. Slots that hold nothing are not read.
        ring_span: [N, Hk, 2] int32: the slot of the first update and how many there are, the same for every key head;
            they go on from slot R-1 to slot 0. A row of zeros makes the row a plain state. New updates go to the slots
            behind, those of a fold too, which then only moves the first slot on.
    Returns:
        out [B, Hv, V]: the buffer given, or a new one.
    """


@public(OPS["replay_verify"])
def replay_verify(
    mixed_qkv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    ring_span: Tensor,
    state_indices: Tensor,
    num_accepted_tokens: Tensor,
    cu_seqlens: Tensor,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    has_initial_state: Tensor | None = None,
    scale: float | None = None,
    z: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: str = "silu",
    null_index: int = -1,
    zero_padding: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """fused_verify with one row a sequence: the ring keeps every token's update, the next step counts the good ones.

    Of the step before, the first token always counts and ring_span says so; num_accepted_tokens - 1 more updates count
    from now on, so that a sequence begins with held + num_accepted_tokens - 1 updates. Whatever else that step wrote is
    written over.

    Args:
        state_indices: [B] int32, any stride.
        num_accepted_tokens: [B] int32, 1..S; 1 behind a prefill, a fold or replay_decode.
        cu_seqlens: [B+1]; sequences of at most S tokens, S = columns of conv_state - W + 2.
        has_initial_state: [B] bool; False starts from a zero state, which is written to `state`, zero history and an
            empty ring, whatever the rows hold, and does not read num_accepted_tokens. None: all True.
        others: as in replay_decode and fused_verify.
    Returns:
        out [T, Hv, V]: the buffer given, or a new one.
    """


@public(OPS["replay_fold"])
def replay_fold(
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    ring_span: Tensor,
    state: Tensor,
    state_indices: Tensor,
    *,
    has_initial_state: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_index: int = -1,
    backend: str | None = None,
) -> None:
    """Rows with a ring become plain states, for whoever reads a row as a state: S_n is written, the ring emptied.

    Args:
        ring_k, ring_u, ring_g, ring_span, state: as in replay_decode. The state of a row whose ring is empty keeps its
            bits; its spans become zero.
        state_indices: [B] int32, any stride.
        has_initial_state: [B] bool; where False the ring is emptied and the state left alone. None: all True.
        num_accepted_tokens: [B] int32, as in replay_verify; None: all 1. conv_state is not this op's: behind accepted
            drafts its history still begins at column num_accepted_tokens - 1, and the caller moves it to the first.
    """
