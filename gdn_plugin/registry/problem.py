"""What is to be computed: shapes and types, made from metadata and never from tensor values."""

from __future__ import annotations

from dataclasses import dataclass

OPS = ("conv_prologue", "prefill", "decode", "fused_decode", "verify", "fused_verify", "gated_norm", "replay_decode",
       "replay_verify", "replay_fold")  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32", "float64")

PHASE_OF_OP = {
    "conv_prologue": "prefill",
    "prefill": "prefill",
    "decode": "decode",
    "fused_decode": "decode",
    "verify": "verify",
    "fused_verify": "verify",
    "gated_norm": "prefill",
    "replay_decode": "decode",
    "replay_verify": "verify",
    "replay_fold": "prefill",
}
# What a caller says of rows <= null_index, weakest promise first; see the `padding` argument of the ops.
PADDING = ("any", "scratch", "none")


@dataclass(frozen=True, slots=True)
class Problem:
    """One op on one layer of one rank. Hashable: kernels and choices are cached by it.

    Args:
        op: one of `OPS`.
        dtype: io dtype of q, k, v and out, by name ("bfloat16", ...).
        state_dtype: dtype of the state pool, by name.
        num_k_heads: Hk of this rank.
        num_v_heads: Hv of this rank; a multiple of Hk.
        head_k_dim: K.
        head_v_dim: V.
        padded_pool: rows of the pool are further apart than Hv*V*K elements.
        checkpoints: prefill writes intermediate states.
        checkpoint_dtype: of those states, by name; "" is the pool's.
        max_spec_tokens: most tokens a sequence brings to verify; 0 without speculation.
        ragged: sequences of one verify call may bring different numbers of tokens.
        padding: what the caller promises of padding rows, one of `PADDING`.
        strided: q, k, v, g or beta (or what stands for them) are not contiguous.
        unaligned: a large tensor starts off a 32-byte boundary, or rows of a pool lie off a 16-byte one.
        gate_dtype: of a and b, by name; "" is the io dtype.
        ring: slots of a row's replay ring; 0 for ops without one.
        bias_dtype: of dt_bias, by name; "" leaves it open, and warm-up compiles for the io dtype and float32.
        qk_l2norm: whether the op normalises q and k; None leaves it open, and warm-up compiles both.
        num_sequences: sequences a call typically has; 0 = unknown.
        num_tokens: tokens a call typically has; 0 = unknown.
    Raises:
        ValueError: an unknown op or dtype, a size that is not positive, or Hv not a multiple of Hk.
    """

    op: str
    dtype: str
    state_dtype: str
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    padded_pool: bool = False
    checkpoints: bool = False
    max_spec_tokens: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    ragged: bool = False
    checkpoint_dtype: str = ""
    padding: str = "any"
    strided: bool = False
    unaligned: bool = False
    gate_dtype: str = ""
    ring: int = 0
    bias_dtype: str = ""
    qk_l2norm: bool | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op={self.op!r} is not valid; choose one of: {', '.join(OPS)}")
        for name in ("dtype", "state_dtype"):
            value = getattr(self, name)
            if value not in DTYPES:
                raise ValueError(f"{name}={value!r} is not valid; choose one of: {', '.join(DTYPES)}")
        for name in ("checkpoint_dtype", "gate_dtype", "bias_dtype"):
            value = getattr(self, name)
            if value and value not in DTYPES:
                raise ValueError(f"{name}={value!r} is not valid; choose one of: {', '.join(DTYPES)}")
        if self.padding not in PADDING:
            raise ValueError(f"padding={self.padding!r} is not valid; choose one of: {', '.join(PADDING)}")
        for name in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_spec_tokens", "num_sequences", "num_tokens", "ring"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.num_v_heads % self.num_k_heads:
            raise ValueError(
                f"num_v_heads must be a multiple of num_k_heads, got {self.num_v_heads} and {self.num_k_heads}"
            )

    @property
    def heads(self) -> tuple[int, int, int, int]:
        """(Hk, Hv, K, V)."""
        return self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim

    @property
    def phase(self) -> str:
        """The user's phase this op belongs to: conv_prologue to prefill, fused_decode to decode, and so on."""
        return PHASE_OF_OP[self.op]

    def __str__(self) -> str:
        text = (
            f"{self.op}(dtype={self.dtype}, state={self.state_dtype}, Hk={self.num_k_heads}, Hv={self.num_v_heads}, "
            f"K={self.head_k_dim}, V={self.head_v_dim}"
        )
        extras = {
            "padded_pool": self.padded_pool,
            "checkpoints": self.checkpoints,
            "max_spec_tokens": self.max_spec_tokens,
            "ragged": self.ragged,
            "checkpoint_dtype": self.checkpoint_dtype,
            "padding": self.padding if self.padding != "any" else "",
            "strided": self.strided,
            "unaligned": self.unaligned,
            "gate_dtype": self.gate_dtype,
            "ring": self.ring,
            "bias_dtype": self.bias_dtype,
            "qk_l2norm": "" if self.qk_l2norm is None else str(self.qk_l2norm),
            "num_sequences": self.num_sequences,
            "num_tokens": self.num_tokens,
        }
        return text + "".join(f", {name}={value}" for name, value in extras.items() if value) + ")"
