"""Variants of the tiny checkpoint, written by hand: a LoRA adapter, the two merged, and the same weights in int8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GDN_PROJECTIONS = (
    *("in_proj_qkvz", "in_proj_ba", "out_proj"),  # Qwen3-Next
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # Qwen3.5
)


def write_adapter(model: Path, directory: Path, rank: int = 8, strength: float = 0.5, seed: int = 0) -> Path:
    """A random LoRA adapter, in PEFT's form, on every projection of every GDN layer of the checkpoint `model`.

    Args:
        strength: size of the change to a projection, as a part of the size of its weight.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in _weights(model).items():
        projection = name.removesuffix(".weight").rpartition(".")[2]
        if ".linear_attn." not in name or projection not in GDN_PROJECTIONS:
            continue
        prefix = "base_model.model." + name.removesuffix(".weight")
        rows, columns = weight.shape
        down = torch.randn(rank, columns, generator=rng)
        up = torch.randn(rows, rank, generator=rng) * (strength * weight.float().std().item() / rank**0.5)
        tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    return directory


def write_merged(model: Path, adapter: Path, directory: Path) -> Path:
    """The checkpoint with the adapter added to its weights, which are stored in fp32."""
    shutil.copytree(model, directory, dirs_exist_ok=True)
    tensors = _weights(model)
    with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as file:
        for name in (n for n in file.keys() if n.endswith("lora_A.weight")):  # noqa: SIM118 (no mapping)
            target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            up, down = file.get_tensor(name.replace("lora_A", "lora_B")), file.get_tensor(name)
            tensors[target] = tensors[target].float() + up @ down
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory


def write_int8(model: Path, directory: Path) -> Path:
    """The checkpoint with its GDN projections as compressed-tensors W8A8: int8 weights with a scale a row.

    Activations are quantised a token at run time; the gates' small projections and all other layers stay as they are.
    """
    shutil.copytree(model, directory, dirs_exist_ok=True)
    tensors = _weights(model)
    wanted = ("in_proj_qkvz", "in_proj_qkv", "in_proj_z", "out_proj")
    for name in [n for n in tensors if ".linear_attn." in n and n.split(".")[-2] in wanted]:
        weight = tensors[name].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[name.removesuffix("weight") + "weight_scale"] = scale.to(torch.bfloat16)
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    rounding = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {
            "group_0": {
                "targets": [rf"re:.*linear_attn\.({'|'.join(wanted)})"],
                "weights": rounding | {"strategy": "channel", "dynamic": False},
                "input_activations": rounding | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _weights(model: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(model / "model.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping: it has keys alone)


def write_scaled(model: Path, directory: Path, factor: float) -> Path:
    """The checkpoint with every convolution of a GDN layer multiplied by `factor`."""
    shutil.copytree(model, directory, dirs_exist_ok=True)
    scaled = {name: x * factor if name.endswith("conv1d.weight") else x for name, x in _weights(model).items()}
    save_file(scaled, str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory
