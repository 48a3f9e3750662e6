"""Models that need no download: tiny ones with weights of their own, and real sizes of which vLLM makes the weights up.

A tiny Qwen3-Next or Qwen3.5 is written from nothing in a second. Tests, demo and bench need a model whose GDN layers
matter, whose next token is not a coin toss, and which is small enough for two CPU cores. Four layers (three GDN, one
full attention), hidden size 256, byte-level vocabulary.
The token embedding dominates the residual stream and the output matrix is the embedding permuted, so that the model
mostly follows a fixed cycle of tokens (which gives n-gram and MTP drafts something to hit) while the layers perturb
it enough that every wrong GDN state shows in the log-probabilities.

`examples/tiny_model.py DIR` writes one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdn_plugin.registry import DTYPES

BYTES = 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def model_config(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint's config.json says of its text model.

    Raises:
        ValueError: there is none, or it is something else; one sentence.
    """
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ValueError(f"{folder}: no config.json that can be read there: {exc}") from exc
    text = (config.get("text_config") or config) if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise ValueError(f"{folder}: its config.json is not that of a model")
    return text


# What a Qwen3-Next or Qwen3.5 says of its GDN layers, by the names that `Shape` has for it.
_GDN_SIZES = {
    "num_k_heads": "linear_num_key_heads",
    "num_v_heads": "linear_num_value_heads",
    "head_k_dim": "linear_key_head_dim",
    "head_v_dim": "linear_value_head_dim",
    "conv_width": "linear_conv_kernel_dim",
}


def gdn_layer(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint's config.json says of its GDN layers, as `Shape` names it.

    Raises:
        ValueError: as `model_config`, or it says nothing of them or what cannot be; one sentence.
    """
    config = model_config(folder)
    layer: dict[str, Any] = {}
    for name, key in _GDN_SIZES.items():
        if key not in config:
            raise ValueError(f"{folder}: its config.json has no {key}, so no GDN layers")
        layer[name] = size = config[key]
        if type(size) is not int or size < 1:
            raise ValueError(f"{folder}: {key} in its config.json is {size!r}, not a whole number above 0")
    if layer["num_v_heads"] % layer["num_k_heads"]:
        raise ValueError(f"{folder}: linear_num_value_heads in its config.json is no multiple of linear_num_key_heads")
    layer["dtype"] = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    layer["state_dtype"] = config.get("mamba_ssm_dtype") or layer["dtype"]
    for name in ("dtype", "state_dtype"):
        if layer[name] not in DTYPES:
            raise ValueError(f"{folder}: a dtype in its config.json is {layer[name]!r}, not one of {', '.join(DTYPES)}")
    return layer


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """Sizes of the checkpoint. `cycle` is how strongly the embedding decides the next token (0: not at all).

    `flat` writes a dense Qwen3.5: projections of q, k, v, of z, of b and of a apart, heads not interleaved, no experts.
    `vision` (with `flat`) names it as the text part of a model with a vision tower, which SGLang wants, and has none.
    """

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    gdn_k_heads: int = 2
    gdn_v_heads: int = 4
    gdn_k_dim: int = 128
    gdn_v_dim: int = 128
    conv_width: int = 4
    experts: int = 4
    intermediate: int = 256
    moe_intermediate: int = 64
    moe_layers: tuple[int, ...] = (0,)
    cycle: float = 1.0
    mtp: bool = True
    seed: int = 0
    flat: bool = False
    vision: bool = False

    @property
    def vocab(self) -> int:
        return 320  # BYTES + SPECIAL, rounded up to what vLLM's padded vocabulary likes

    def layer_types(self) -> list[str]:
        return ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(self.layers)]


def write_tiny_qwen3_next(directory: str | Path, config: TinyConfig | None = None) -> Path:
    """Write config.json, model.safetensors (bf16) and a byte-level tokenizer to `directory`; nothing if it is complete.

    Returns:
        The directory, ready for `vllm.LLM(model=...)`.
    """
    config = config or TinyConfig()
    directory = Path(directory)
    stamp = directory / "tiny.json"
    described = json.dumps({name: getattr(config, name) for name in TinyConfig.__dataclass_fields__}, sort_keys=True)
    if stamp.exists() and stamp.read_text() == described:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    _write_config(directory, config)
    _write_tokenizer(directory)
    _write_weights(directory, config)
    stamp.write_text(described)
    return directory


def _write_config(directory: Path, c: TinyConfig) -> None:
    from transformers import Qwen3_5TextConfig, Qwen3NextConfig

    sizes: dict[str, Any] = {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "intermediate_size": c.intermediate,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": 8192,
        "linear_conv_kernel_dim": c.conv_width,
        "linear_key_head_dim": c.gdn_k_dim,
        "linear_value_head_dim": c.gdn_v_dim,
        "linear_num_key_heads": c.gdn_k_heads,
        "linear_num_value_heads": c.gdn_v_heads,
        "layer_types": c.layer_types(),
        "eos_token_id": BYTES,
        "bos_token_id": BYTES,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    if c.flat:
        hf = Qwen3_5TextConfig(**sizes)
        hf.architectures = ["Qwen3_5ForCausalLM"]
        hf.mtp_num_hidden_layers = 1
        if c.vision:
            _with_vision(hf).save_pretrained(directory)
        else:
            hf.save_pretrained(directory)
        return
    hf = Qwen3NextConfig(
        **sizes,
        moe_intermediate_size=c.moe_intermediate,
        shared_expert_intermediate_size=c.moe_intermediate,
        num_experts=c.experts,
        num_experts_per_tok=2,
        # vLLM wants at least one mixture-of-experts layer a pipeline stage; and the MTP layer is numbered 0
        mlp_only_layers=[i for i in range(c.layers) if i not in c.moe_layers],
    )
    hf.architectures = ["Qwen3NextForCausalLM"]
    hf.full_attention_interval = 4  # SGLang reads this and not layer_types
    hf.num_nextn_predict_layers = 1
    hf.save_pretrained(directory)


def _with_vision(text: Any) -> Any:
    from transformers import Qwen3_5Config

    part = text.to_dict() | {"full_attention_interval": 4}  # SGLang reads this and not layer_types
    tower = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "num_position_embeddings": 64}
    hf = Qwen3_5Config(text_config=part, vision_config=tower | {"out_hidden_size": text.hidden_size})
    hf.architectures = ["Qwen3_5ForConditionalGeneration"]
    hf.dtype = text.dtype
    return hf


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.save_pretrained(directory)


def _write_weights(directory: Path, c: TinyConfig) -> None:
    import torch
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(c.seed)

    def normal(*shape: int, gain: float = 1.0) -> torch.Tensor:
        """A matrix that keeps the variance of its input, times `gain`."""
        return torch.randn(*shape, generator=rng) * (gain / shape[-1] ** 0.5)

    def zero_centred(size: int) -> torch.Tensor:
        return torch.randn(size, generator=rng) * 0.05  # Qwen3-Next multiplies by 1 + weight

    def mlp(prefix: str, size: int) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.gate_proj.weight": normal(size, c.hidden),
            f"{prefix}.up_proj.weight": normal(size, c.hidden),
            f"{prefix}.down_proj.weight": normal(c.hidden, size, gain=0.5),
        }

    def moe(prefix: str) -> dict[str, torch.Tensor]:
        out = {
            f"{prefix}.gate.weight": normal(c.experts, c.hidden),
            f"{prefix}.shared_expert_gate.weight": normal(1, c.hidden),
        }
        for expert in range(c.experts):
            out |= mlp(f"{prefix}.experts.{expert}", c.moe_intermediate)
        return out | mlp(f"{prefix}.shared_expert", c.moe_intermediate)

    def attention(prefix: str) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.q_proj.weight": normal(2 * c.heads * c.head_dim, c.hidden),  # query and output gate
            f"{prefix}.k_proj.weight": normal(c.kv_heads * c.head_dim, c.hidden),
            f"{prefix}.v_proj.weight": normal(c.kv_heads * c.head_dim, c.hidden),
            f"{prefix}.o_proj.weight": normal(c.hidden, c.heads * c.head_dim, gain=0.5),
            f"{prefix}.q_norm.weight": zero_centred(c.head_dim),
            f"{prefix}.k_norm.weight": zero_centred(c.head_dim),
        }

    def gdn(prefix: str) -> dict[str, torch.Tensor]:
        key_dim, value_dim = c.gdn_k_heads * c.gdn_k_dim, c.gdn_v_heads * c.gdn_v_dim
        if c.flat:
            projections = {
                f"{prefix}.in_proj_qkv.weight": normal(2 * key_dim + value_dim, c.hidden),
                f"{prefix}.in_proj_z.weight": normal(value_dim, c.hidden),
                f"{prefix}.in_proj_b.weight": normal(c.gdn_v_heads, c.hidden),
                f"{prefix}.in_proj_a.weight": normal(c.gdn_v_heads, c.hidden),
            }
        else:
            projections = {
                f"{prefix}.in_proj_qkvz.weight": normal(2 * key_dim + 2 * value_dim, c.hidden),
                f"{prefix}.in_proj_ba.weight": normal(2 * c.gdn_v_heads, c.hidden),
            }
        return projections | {
            f"{prefix}.conv1d.weight": torch.randn(2 * key_dim + value_dim, 1, c.conv_width, generator=rng) * 0.6,
            f"{prefix}.out_proj.weight": normal(c.hidden, value_dim),
            # decays from slow (a state that remembers hundreds of tokens) to fast
            f"{prefix}.A_log": torch.linspace(-6.0, 1.0, c.gdn_v_heads),
            f"{prefix}.dt_bias": torch.randn(c.gdn_v_heads, generator=rng) * 0.5,
            f"{prefix}.norm.weight": 1.0 + zero_centred(c.gdn_v_dim),
        }

    def norms(prefix: str) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.input_layernorm.weight": zero_centred(c.hidden),
            f"{prefix}.post_attention_layernorm.weight": zero_centred(c.hidden),
        }

    embedding = torch.randn(c.vocab, c.hidden, generator=rng)
    successor = torch.randperm(BYTES, generator=rng)
    head = normal(c.vocab, c.hidden, gain=1.0)
    # successor is the next token's row: logit[successor[t]] is large where the residual stream holds embedding[t]
    head[successor] += embedding[:BYTES] * (c.cycle * 7.0 / c.hidden)
    head[BYTES:] *= 0.01  # special tokens stay improbable, so that generation does not end by accident

    weights: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": zero_centred(c.hidden),
        "lm_head.weight": head,
    }
    for i, kind in enumerate(c.layer_types()):
        prefix = f"model.layers.{i}"
        weights |= norms(prefix)
        weights |= attention(f"{prefix}.self_attn") if kind == "full_attention" else gdn(f"{prefix}.linear_attn")
        has_experts = i in c.moe_layers and not c.flat
        weights |= moe(f"{prefix}.mlp") if has_experts else mlp(f"{prefix}.mlp", c.intermediate)
    if c.mtp:
        # the draft reads the next token's embedding and a little of the hidden state: right often, not always
        fc = torch.cat([torch.eye(c.hidden), 0.3 * torch.eye(c.hidden)], dim=1)
        weights |= {
            "mtp.fc.weight": fc,
            "mtp.norm.weight": zero_centred(c.hidden),
            "mtp.pre_fc_norm_hidden.weight": zero_centred(c.hidden),
            "mtp.pre_fc_norm_embedding.weight": zero_centred(c.hidden),
        }
        weights |= norms("mtp.layers.0") | attention("mtp.layers.0.self_attn")
        weights |= mlp("mtp.layers.0.mlp", c.intermediate) if c.flat else moe("mtp.layers.0.mlp")
    if c.vision:
        weights = {name.replace("model.", "model.language_model.", 1): value for name, value in weights.items()}
    keep_fp32 = ("A_log",)
    stored = {
        name: (value if name.endswith(keep_fp32) else value.to(torch.bfloat16)).contiguous()
        for name, value in weights.items()
    }
    save_file(stored, str(directory / "model.safetensors"), metadata={"format": "pt"})


def _write_qwen3_5_4b(directory: Path) -> None:
    from transformers import Qwen3_5TextConfig

    hf = Qwen3_5TextConfig(
        **_real_sizes(32), hidden_size=2560, intermediate_size=9216, num_key_value_heads=4, tie_word_embeddings=True
    )
    hf.architectures = ["Qwen3_5ForCausalLM"]
    hf.mtp_num_hidden_layers = 1
    hf.save_pretrained(directory)


def _write_qwen3_next_12l(directory: Path) -> None:
    from transformers import Qwen3NextConfig

    hf = Qwen3NextConfig(
        **_real_sizes(12), hidden_size=2048, intermediate_size=5120, num_key_value_heads=2, tie_word_embeddings=False,
        moe_intermediate_size=512, shared_expert_intermediate_size=512, num_experts=512, num_experts_per_tok=10,
    )  # fmt: skip
    hf.architectures = ["Qwen3NextForCausalLM"]
    hf.full_attention_interval = 4  # SGLang reads this and not layer_types
    hf.num_nextn_predict_layers = 1
    hf.save_pretrained(directory)


def _real_sizes(layers: int) -> dict[str, Any]:
    """What Qwen3.5-4B and Qwen3-Next-80B have in common."""
    return {
        "vocab_size": 151936,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 262144,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "layer_types": ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)],
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "bos_token_id": 1,
    }


@dataclass(frozen=True, slots=True)
class Size:
    """A model by name. Without weights in its folder, whoever loads it makes them up."""

    about: str
    write: Callable[[Path], object]
    weights: bool


SIZES = {
    "tiny": Size("Qwen3-Next's layout, 3 GDN layers of 2/4 heads, for a CPU", write_tiny_qwen3_next, True),
    "tiny-flat": Size(
        "the same in Qwen3.5's layout", lambda at: write_tiny_qwen3_next(at, TinyConfig(flat=True)), True
    ),
    "qwen3.5-4b": Size("Qwen3.5-4B's sizes, 24 GDN layers of 16/32 heads, 9 GB", _write_qwen3_5_4b, False),
    "qwen3-next-12l": Size("12 of Qwen3-Next-80B's 48 layers, 512 experts, 20 GB", _write_qwen3_next_12l, False),
}
