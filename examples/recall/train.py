"""Train the recall model: two Gated Delta Net layers that learn associative recall in minutes on one CPU core.

    python examples/recall/train.py --out examples/recall/model

Writes a Qwen3-Next checkpoint (bf16 safetensors, config, tokenizer) that vLLM and transformers load. Training runs
in fp32 through transformers' chunked PyTorch function, because that one has a backward pass.

A second stage trains an MTP head, which drafts for vLLM, on the stored and frozen model, and adds it to the checkpoint;
`--mtp-only` runs that stage alone.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM, Qwen3NextModel, logging
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from gdn_plugin.tools.accuracy import task

Example = tuple[tuple[torch.Tensor, ...], torch.Tensor]  # inputs, targets

# The head's lessons: pairs, tokens, and the share of all steps by which it ends.
LESSONS = ((4, 64, 0.16), (8, 64, 0.28), (task.TRAINING_PAIRS, task.TRAINING_LENGTH, 1.0))
PASSES = 8  # over a lesson's batches: the frozen model's hidden states cost more than the head's step


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


class Head(torch.nn.Module):
    """The head as vLLM's Qwen3NextMTP computes it: from the embedding of token t + 1 and hidden state t, token t + 2.

    The hidden state is the one behind the model's last norm, and embedding and output matrix are the model's own. The
    decoder layer is numbered 0, so it has the mixture of experts, and its position is t.
    """

    def __init__(self, main: Qwen3NextForCausalLM) -> None:
        super().__init__()
        config = Qwen3NextConfig(**main.config.to_dict() | {"num_hidden_layers": 1, "layer_types": ["full_attention"]})
        size = config.hidden_size
        self.pre_fc_norm_embedding = Qwen3NextRMSNorm(size, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3NextRMSNorm(size, eps=config.rms_norm_eps)
        self.fc = torch.nn.Linear(2 * size, size, bias=False)
        self.body = Qwen3NextModel(config).float()  # the decoder layer and mtp.norm
        self.body.embed_tokens.requires_grad_(False)  # not used

    def forward(self, embedding: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)], dim=-1)
        return self.body(inputs_embeds=self.fc(both), use_cache=False).last_hidden_state

    def weights(self) -> dict[str, torch.Tensor]:
        """By the names of a checkpoint; transformers' own writer takes the experts apart."""
        with tempfile.TemporaryDirectory() as folder:
            self.body.save_pretrained(folder)
            found = load_file(Path(folder, "model.safetensors"))
        found = {name: value for name, value in found.items() if not name.startswith("embed_tokens")}
        found |= {name: value for name, value in self.state_dict().items() if not name.startswith("body.")}
        return {f"mtp.{name}": value for name, value in found.items()}


def batch(
    rng: random.Random, size: int, length: int, pairs: int, reserved: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences and their targets; a share of `reserved` of them has the pairs that are kept for evaluation."""
    sequences = [
        task.training_sequence(rng, length, pairs, held_out=reserved > 0 and rng.random() < reserved)
        for _ in range(size)
    ]
    return torch.tensor([s[0] for s in sequences]), torch.tensor([s[1] for s in sequences])


def examples(arguments: argparse.Namespace) -> Iterator[Example]:
    rng = random.Random(arguments.seed)
    for step in range(arguments.steps):
        pairs = 4 if step < arguments.steps // 8 else task.TRAINING_PAIRS
        length = 32 if step < arguments.steps // 8 else task.TRAINING_LENGTH
        tokens, targets = batch(rng, arguments.batch, length, pairs)
        yield (tokens,), targets


def head_examples(main: Qwen3NextForCausalLM, arguments: argparse.Namespace) -> Iterator[Example]:
    """Embeddings of tokens t + 1 and hidden states t, with tokens t + 2 where the context determines them.

    The reserved pairs are among them, unlike in the model's own training. A head that never saw them learns that they
    do not occur, and it decides no answer: a draft counts only where the model says the same.
    """
    rng = random.Random(arguments.seed)
    begin = 0
    for pairs, length, until in LESSONS:
        steps = int(until * arguments.mtp_steps) - begin
        begin += steps
        known: list[Example] = []
        for step in range(steps):
            if step < math.ceil(steps / PASSES):
                tokens, targets = batch(rng, arguments.batch, length, pairs, reserved=1 / task.RESERVED)
                known.append((head_inputs(main, tokens), targets[:, 1:]))
            yield known[step % len(known)]


@torch.no_grad()
def head_inputs(main: Qwen3NextForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = main.model(tokens, use_cache=False).last_hidden_state
    return main.model.embed_tokens(tokens[:, 1:]), hidden[:, :-1]


@torch.no_grad()
def score(main: Qwen3NextForCausalLM, head: Head, prompts: list[task.Prompt]) -> tuple[float, float, float]:
    """Shares under teacher forcing: prompts whose first answer token is right, prompts whose whole answer is, and
    answer tokens behind the first that the head names one step ahead."""
    tokens = torch.tensor([(*p.tokens, *p.answer) for p in prompts])
    answers = torch.tensor([p.answer for p in prompts])
    best, drafts = [], []
    for chunk in tokens.split(50):
        embedding, hidden = head_inputs(main, chunk)
        best.append(main.lm_head(hidden[:, -task.ANSWER_LENGTH :]).argmax(-1))
        drafts.append(main.lm_head(head(embedding, hidden)[:, -task.ANSWER_LENGTH : -1]).argmax(-1))
    right = torch.cat(best) == answers
    ahead = torch.cat(drafts) == answers[:, 1:]
    return right[:, 0].float().mean().item(), right.all(-1).float().mean().item(), ahead.float().mean().item()


def fit(
    module: torch.nn.Module,
    predict: Callable[..., torch.Tensor],
    data: Iterable[Example],
    steps: int,
    arguments: argparse.Namespace,
) -> None:
    """Train the module's parameters on what `predict` says of each example's inputs."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))),
    )
    bar = tqdm(data, total=steps, unit="step", file=sys.stderr, mininterval=arguments.refresh)
    loss_mean = right_mean = None
    for inputs, targets in bar:
        logits = predict(*inputs)
        counted = targets != -100
        loss = torch.nn.functional.cross_entropy(logits[counted].float(), targets[counted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        right = (logits[counted].argmax(-1) == targets[counted]).float().mean().item()
        loss_mean = loss.item() if loss_mean is None else 0.95 * loss_mean + 0.05 * loss.item()
        right_mean = right if right_mean is None else 0.95 * right_mean + 0.05 * right
        bar.set_postfix(loss=f"{loss_mean:.3f}", right=f"{right_mean:.3f}", refresh=False)


def train(arguments: argparse.Namespace) -> Qwen3NextForCausalLM:
    model = new_model(arguments.seed)
    fit(model, lambda tokens: model(tokens, use_cache=False).logits, examples(arguments), arguments.steps, arguments)
    return model


def train_head(main: Qwen3NextForCausalLM, arguments: argparse.Namespace) -> Head:
    torch.manual_seed(arguments.seed)
    head = Head(main)
    data = head_examples(main, arguments)
    fit(head, lambda *inputs: main.lm_head(head(*inputs)), data, arguments.mtp_steps, arguments)
    return head


def write(model: Qwen3NextForCausalLM, directory: Path) -> None:
    """bf16 weights, config and a word tokenizer: what vLLM loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.to(torch.bfloat16).save_pretrained(directory)
    words = {word: number for number, word in enumerate(task.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)


def write_head(head: Head, directory: Path) -> None:
    """Add the head to the checkpoint in bf16. The model's weights are copied as they are stored."""
    file = directory / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if not name.startswith("mtp.")}
    save_file(weights | head.to(torch.bfloat16).weights(), file, metadata={"format": "pt"})
    config = Qwen3NextConfig.from_pretrained(directory)
    config.num_nextn_predict_layers = 1
    config.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--mtp-steps", type=int, default=2500, help="of the MTP head")
    parser.add_argument("--mtp-only", action="store_true", help="keep the model in --out, train its head alone")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--refresh", type=float, default=0.5, help="seconds between updates of the progress bar")
    parser.add_argument("--evaluate", type=int, default=200, help="held-out prompts a length behind training")
    arguments = parser.parse_args()
    if arguments.mtp_only and not (arguments.out / "model.safetensors").exists():
        parser.error(f"--mtp-only: no model.safetensors in {arguments.out}")

    logging.set_verbosity_error()  # transformers would name the faster packages that it does not find
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    if not arguments.mtp_only:
        began = time.perf_counter()
        model = train(arguments)
        print(f"trained in {(time.perf_counter() - began) / 60:.1f} minutes; writing {arguments.out}")
        write(model, arguments.out)
    began = time.perf_counter()
    stored = Qwen3NextForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).requires_grad_(False)
    head = train_head(stored, arguments)
    print(f"MTP head trained in {(time.perf_counter() - began) / 60:.1f} minutes; adding it to {arguments.out}")
    write_head(head, arguments.out)
    head.float()  # from bf16: what was stored
    for factor in (1, 2, 4, 8):
        length = factor * task.TRAINING_LENGTH
        prompts = task.held_out_prompts(arguments.evaluate, length, seed=arguments.seed + 1)
        first, whole, ahead = score(stored, head, prompts)
        print(f"held out, {length:5d} tokens: first answer {first:.3f}, whole answer {whole:.3f}, drafts {ahead:.3f}")


if __name__ == "__main__":
    main()
