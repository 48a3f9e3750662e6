"""The truth that engines are measured against: transformers in fp32, the whole sequence at once, no cache."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gdn_plugin.tools.accuracy.task import ANSWER_LENGTH, Prompt

MODELING = "transformers.models.qwen3_next.modeling_qwen3_next"
FASTER = ("fla", "causal_conv1d")  # kernels for GPUs, and of less than fp32's exactness
BATCH_TOKENS = 16384


class Reference:
    """Log-probabilities of an fp32 model over what was said, each sequence computed once.

    Args:
        directory: a Qwen3-Next checkpoint; its weights are read as stored and widened to fp32.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import logging

        Qwen3NextForCausalLM = _without(FASTER, MODELING).Qwen3NextForCausalLM
        logging.set_verbosity_error()  # transformers would name the faster packages that it does not find
        logging.disable_progress_bar()
        self._model: Any = Qwen3NextForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._known: dict[tuple[int, ...], list[list[float]]] = {}

    def log_probabilities(
        self, sequences: Iterable[tuple[int, ...]], progress: Callable[[int], None] | None = None
    ) -> dict[tuple[int, ...], list[list[float]]]:
        """Log-probabilities [answer position][token] at the last ANSWER_LENGTH tokens of each sequence.

        Args:
            progress: called with the number of sequences just computed.
        """
        wanted = list(dict.fromkeys(sequences))
        missing = sorted((s for s in wanted if s not in self._known), key=len)
        while missing:
            length = len(missing[0])
            batch = [s for s in missing if len(s) == length][: max(1, BATCH_TOKENS // length)]
            missing = missing[len(batch) :]
            self._compute(batch)
            if progress is not None:
                progress(len(batch))
        return {sequence: self._known[sequence] for sequence in wanted}

    def answers(self, prompts: Sequence[Prompt], progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
        """The reference's own answers, in the form in which an engine returns them.

        A whole answer is right under greedy decoding exactly when every token is the most likely one after the right
        ones before it, so one pass over prompt and right answer decides. (Past a first wrong token the tokens named
        here are not those that greedy decoding would say; none of them counts.)
        """
        truth = self.log_probabilities((prompt.tokens + prompt.answer for prompt in prompts), progress)
        said = []
        for prompt in prompts:
            rows = truth[prompt.tokens + prompt.answer]
            tokens = [max(range(len(row)), key=row.__getitem__) for row in rows]
            said.append({"tokens": tokens, "logprobs": [], "cached_tokens": 0})
        return said

    @torch.inference_mode()
    def _compute(self, sequences: Sequence[tuple[int, ...]]) -> None:
        logits = self._model(torch.tensor(sequences), use_cache=False, logits_to_keep=ANSWER_LENGTH + 1).logits
        rows = torch.log_softmax(logits[:, :-1].double(), dim=-1).tolist()
        self._known.update(zip(sequences, rows, strict=True))


def _without(packages: Sequence[str], module: str) -> Any:
    """The module, imported as if there were none of the packages: transformers takes them where it finds them."""
    modules: dict[str, Any] = sys.modules
    hidden = {name: modules.pop(name) for name in (*packages, module) if name in modules}
    modules |= dict.fromkeys(packages)  # None: importing it is an ImportError
    try:
        return importlib.import_module(module)
    finally:
        for name in (*packages, module):
            modules.pop(name, None)
        modules |= hidden
