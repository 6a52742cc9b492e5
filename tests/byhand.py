"""The whole way of a trial by hand: a plain transformers model, hooks and loops; nothing of atp_tune."""

import tomllib
from pathlib import Path

import torch
from tinystudy import TOKENS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


class ByHand:
    """A model (the study's, or one in another folder) that is pruned in place."""

    def __init__(self, place: Path, model: Path | None = None) -> None:
        self.place = place
        self.study = tomllib.loads((place / "tiny.toml").read_text())
        self.model = AutoModelForCausalLM.from_pretrained(model or place / "model", dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model or place / "model")

    def windows(self, role: str) -> Tensor:
        count = self.study["texts"][role]["nsamples"]
        ids = self.tokenizer((self.place / f"{role}.txt").read_text(), verbose=False).input_ids
        return torch.tensor(ids[: count * TOKENS]).reshape(count, TOKENS)

    def linears(self, block: int) -> list[nn.Linear]:
        return [module for module in self.model.model.layers[block].modules() if isinstance(module, nn.Linear)]

    @torch.no_grad()
    def prune(self, pruner: str, sparsities: list[float]) -> "ByHand":
        """Block after block; Wanda's inputs come from the whole model as it is at that moment."""
        for block, sparsity in enumerate(sparsities):
            norms = self.input_norms(block) if pruner == "wanda" else None
            for linear in self.linears(block):
                scores = linear.weight.abs() * norms[linear] if norms else linear.weight.abs().reshape(1, -1)
                for row, score in zip(linear.weight.view(scores.shape), scores, strict=True):
                    row[score.argsort(stable=True)[: int(len(score) * sparsity)]] = 0
        return self

    def input_norms(self, block: int) -> dict[nn.Linear, Tensor]:
        inputs: dict[nn.Linear, Tensor] = {}

        def hear(linear: nn.Linear, arguments: tuple[Tensor]) -> None:
            inputs[linear] = arguments[0]

        handles = [linear.register_forward_pre_hook(hear) for linear in self.linears(block)]
        self.model(input_ids=self.windows("calibration"))
        for handle in handles:
            handle.remove()
        return {linear: x.reshape(-1, x.shape[-1]).norm(dim=0) for linear, x in inputs.items()}

    @torch.no_grad()
    def nlls(self, role: str) -> list[float]:
        return [float(self.model(input_ids=row[None], labels=row[None]).loss) for row in self.windows(role)]

    def zeros(self) -> float:
        weights = [linear.weight for block in range(len(self.model.model.layers)) for linear in self.linears(block)]
        return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
