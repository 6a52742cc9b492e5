import copy
from typing import Any

import naive
import pytest
import torch
from expect import parametrize, slow
from families import CPU, FAMILIES, TOKENS, bench_of, nlls_of, random_ids, replay_of, scores_of, tiny
from plans import planned
from torch import Tensor

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.blocks.replay import AutoBatch, Replay
from atp_tune.events import ignore_events
from atp_tune.measures import perplexity
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session
from atp_tune.scores import next_token
from atp_tune.scores.next_token import (
    NEXT_TOKEN,
    Passing,
    head_scores,
    loss_gradient,
    mean_loss,
    token_kls,
    token_nlls,
)


def batch_of(windows: int) -> AutoBatch:
    batch = AutoBatch(CPU, TOKENS, 1, ignore_events)
    batch.windows = windows
    return batch


@torch.inference_mode()
def nlls_in(replay: Replay, groups: list[Tensor], batch: AutoBatch, heads: AutoBatch) -> list[list[float]]:
    passing = Passing(replay, batch, groups)
    for index in range(len(replay.checkpoint.blocks)):
        passing.block(index, replay.checkpoint.weights(index))
    return [
        head_scores(replay, NEXT_TOKEN, heads, group, hidden)["nlls"]
        for group, hidden in zip(groups, passing.states, strict=True)
    ]


def parts_in(work: Session, role: str, pruned: Any = None, kl: bool = False, one_by_one: bool = True) -> list[Any]:
    """The scores of each part, of the dense model by default."""
    heard: list[Any] = []
    work.measure(None, [RoleScores(role, kl, heard.append, one_by_one)], blocks=pruned)
    return heard


@parametrize("family", FAMILIES)
def test_perplexity_is_the_model_s_own_loss(family: str) -> None:
    model, ids = tiny(family), random_ids(7)
    own = naive.nlls_of(model, ids)
    [nlls] = nlls_in(replay_of(model), [ids], batch_of(4), batch_of(4))
    assert nlls == pytest.approx(own, rel=1e-5)
    assert perplexity(nlls).value == pytest.approx(float(torch.tensor(own).mean().exp()), rel=1e-5)
    assert max(own) > 1.001 * min(own)  # windows differ: a wrong one would show


def pruned_copy(model: Any, work: Session, pruned: list[PrunedBlock]) -> Any:
    other = copy.deepcopy(model)
    blocks = other.get_submodule(work.checkpoint.blocks_name)
    for block in pruned:
        blocks[block.index].load_state_dict(block.weights)
    return other


@parametrize("family", ["llama", "gpt2", "falcon", "gemma3", "olmoe"])
def test_kl_is_that_of_the_models_own_logits(family: str) -> None:
    model = tiny(family)
    work = bench_of(model)
    pruned = list(work.prune(planned("wanda", "uniform", (0.5,) * len(work.checkpoint.blocks))))
    kls = scores_of(work, ((block.index, block.weights) for block in pruned), "validation", kl=True)["kls"]
    expected = naive.kls_of(model, pruned_copy(model, work, pruned), random_ids(7, TOKENS, seed=1))
    assert kls == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert max(kls) > 1.001 * min(kls) > 0


@slow
def test_kl_does_not_change_with_batches_slices_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench_of(tiny("llama"))
    pruned = list(work.prune(planned("wanda", "uniform", (0.5,) * 4)))
    expected, nlls = scores_of(work, pruned, "validation", kl=True)["kls"], nlls_of(work, pruned, "validation")
    for windows, heads, positions, cached in (
        (1, 1, 256, 1),
        (2, 8, 5, 1 << 22),
        (8, 2, 1, 97 * 3),
        (3, 4, 7, 1 << 22),
    ):
        monkeypatch.setattr(work.batch("validation"), "windows", windows)
        monkeypatch.setattr(work.heads, "windows", heads)
        monkeypatch.setattr(next_token, "POSITIONS", positions)
        monkeypatch.setattr(next_token, "CACHED", cached)
        for one_by_one in (False, True):  # parts other than those in which the dense states were computed
            parts = parts_in(work, "validation", pruned, True, one_by_one)
            assert [kl for part in parts for kl in part["kls"]] == pytest.approx(expected, rel=1e-4)
            assert [nll for part in parts for nll in part["nlls"]] == pytest.approx(nlls, rel=1e-5)


@parametrize("cached", [1, 97 * 3, 1 << 22])
@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kls_of_tokens_are_sums_over_words(cached: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token, "CACHED", cached)
    dense, logits = (5 * torch.randn(10, 97).to(dtype) for _ in range(2))
    p, q = dense.double().softmax(1), logits.double().softmax(1)
    expected = [sum(float(p[t, v] * (p[t, v] / q[t, v]).log()) for v in range(97)) for t in range(10)]
    assert token_kls(dense, logits).tolist() == pytest.approx(expected, rel=1e-5)
    assert token_kls(dense, dense).tolist() == [0.0] * 10
    assert token_kls(dense, torch.full_like(dense, torch.nan)).isnan().all()


@parametrize("cached", [1, 97 * 3, 1 << 22])
@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nlls_of_tokens_are_cross_entropies(cached: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token, "CACHED", cached)
    logits, targets = 30 * torch.randn(10, 97).to(dtype), torch.randint(97, (10,))
    before = logits.clone()
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(token_nlls(logits, targets).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)


@parametrize("cached", [1, 97 * 3, 1 << 22])
@parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize("share", [None, 0.0, 0.5, 0.9])
def test_gradients_by_logits_are_those_of_the_losses(
    share: float | None, dtype: torch.dtype, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`share` of the NLL; None without a dense model."""
    monkeypatch.setattr(next_token, "CACHED", cached)
    (dense, logits), targets = (5 * torch.randn(10, 97).to(dtype) for _ in range(2)), torch.randint(97, (10,))
    leaf, p = logits.double().requires_grad_(), dense.double().softmax(1)
    loss = torch.nn.functional.cross_entropy(leaf, targets, reduction="sum")
    if share is not None:
        loss = share * loss + (1 - share) * (p * (p.log() - leaf.log_softmax(1))).sum()
    [expected] = torch.autograd.grad(loss / 7, leaf)
    before, given = logits.clone(), (None, 0.5) if share is None else (dense, share)
    found = loss_gradient(logits, targets, given[0], 1 / 7, given[1])
    assert mean_loss(logits, targets, *given).item() == pytest.approx(loss.item() / 10, rel=1e-4)
    assert found.dtype == dtype and torch.equal(logits, before)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
