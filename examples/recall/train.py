"""Train the recall model: two Gated Delta Net layers that learn associative recall in minutes on one CPU core.

    python examples/recall/train.py --out examples/recall/model

Writes a Qwen3-Next checkpoint (bf16 safetensors, config, tokenizer) that vLLM and transformers load. Training runs
in fp32 through transformers' chunked PyTorch function, because that one has a backward pass.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM, logging

from gdn_plugin.tools.accuracy import task


def model_config() -> Qwen3NextConfig:
    """Two GDN layers, no attention: nothing but the recurrent state can carry an answer, and nothing knows positions.

    Layer 0 has the mixture of experts that vLLM's Qwen3-Next wants; both experts are always on, so that a rounding
    difference cannot flip a route and be mistaken for an error of the kernel.
    """
    config = Qwen3NextConfig(
        vocab_size=len(task.vocabulary()),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        layer_types=["linear_attention", "linear_attention"],
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        mlp_only_layers=[1],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=1,
        dtype="bfloat16",
    )
    config.architectures = ["Qwen3NextForCausalLM"]
    return config


def new_model(seed: int) -> Qwen3NextForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3NextForCausalLM(model_config()).float()
    with torch.no_grad():
        for layer in model.model.layers:
            mixer = layer.linear_attn
            # The library's start forgets within a few tokens. Start from a memory of about a thousand tokens instead
            # (exp(g) near 0.999); what to forget is left to training.
            mixer.A_log.zero_()
            mixer.dt_bias.fill_(math.log(math.expm1(1e-3)))
    return model


def batch(rng: random.Random, size: int, length: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = [task.training_sequence(rng, length, pairs) for _ in range(size)]
    return torch.tensor([s[0] for s in sequences]), torch.tensor([s[1] for s in sequences])


@torch.no_grad()
def score(model: Qwen3NextForCausalLM, prompts: list[task.Prompt]) -> tuple[float, float]:
    """(share of prompts whose first answer token is right, share whose whole answer is) under teacher forcing."""
    tokens = torch.tensor([(*p.tokens, *p.answer) for p in prompts])
    answers = torch.tensor([p.answer for p in prompts])
    best = torch.cat([model(chunk, use_cache=False).logits.argmax(-1) for chunk in tokens.split(50)])
    right = best[:, -task.ANSWER_LENGTH - 1 : -1] == answers
    return right[:, 0].float().mean().item(), right.all(-1).float().mean().item()


def train(arguments: argparse.Namespace) -> Qwen3NextForCausalLM:
    torch.set_num_threads(arguments.threads)
    rng = random.Random(arguments.seed)
    model = new_model(arguments.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.98))
    warm = max(1, arguments.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * step / arguments.steps))),
    )
    bar = tqdm(range(arguments.steps), unit="step", file=sys.stderr, mininterval=arguments.refresh)
    loss_mean = right_mean = None
    for step in bar:
        pairs = 4 if step < arguments.steps // 8 else task.TRAINING_PAIRS
        length = 32 if step < arguments.steps // 8 else task.TRAINING_LENGTH
        tokens, targets = batch(rng, arguments.batch, length, pairs)
        logits = model(tokens, use_cache=False).logits
        counted = targets != -100
        loss = torch.nn.functional.cross_entropy(logits[counted].float(), targets[counted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right = (logits[counted].argmax(-1) == targets[counted]).float().mean().item()
        loss_mean = loss.item() if loss_mean is None else 0.95 * loss_mean + 0.05 * loss.item()
        right_mean = right if right_mean is None else 0.95 * right_mean + 0.05 * right
        bar.set_postfix(loss=f"{loss_mean:.3f}", right=f"{right_mean:.3f}", refresh=False)
    return model


def write(model: Qwen3NextForCausalLM, directory: Path) -> None:
    """bf16 weights, config and a word tokenizer: what vLLM loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.to(torch.bfloat16).save_pretrained(directory)
    words = {word: number for number, word in enumerate(task.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--refresh", type=float, default=0.5, help="seconds between updates of the progress bar")
    parser.add_argument("--evaluate", type=int, default=200, help="held-out prompts a length behind training")
    arguments = parser.parse_args()

    logging.set_verbosity_error()  # transformers would name the faster packages that it does not find
    logging.disable_progress_bar()
    began = time.perf_counter()
    model = train(arguments)
    print(f"trained in {(time.perf_counter() - began) / 60:.1f} minutes; writing {arguments.out}")
    write(model, arguments.out)
    stored = Qwen3NextForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    for factor in (1, 2, 4, 8):
        length = factor * task.TRAINING_LENGTH
        first, whole = score(stored, task.held_out_prompts(arguments.evaluate, length, seed=arguments.seed + 1))
        print(f"held out, {length:5d} tokens: first answer {first:.3f}, whole answer {whole:.3f}")


if __name__ == "__main__":
    main()
