import copy
from collections.abc import Iterator
from typing import Any

import naive
import pytest
import torch
from families import CPU, FAMILIES, TOKENS, bench_of, nlls_of, random_ids, replay_of, scores_of, tiny
from plans import planned
from torch import Tensor

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.blocks.replay import AutoBatch, Replay
from atp_tune.checkpoints import devices
from atp_tune.errors import TrialError
from atp_tune.measures import perplexity
from atp_tune.run import observers
from atp_tune.run.observers import RoleScores, parts_of
from atp_tune.run.session import Session
from atp_tune.scores import evaluation, next_token
from atp_tune.scores.evaluation import Block, final_states, head_scores
from atp_tune.scores.next_token import NEXT_TOKEN, loss_gradient, mean_loss, token_kls, token_nlls


def dense_blocks(replay: Replay) -> Iterator[Block]:
    return ((index, replay.checkpoint.weights(index)) for index in range(len(replay.checkpoint.blocks)))


def batch_of(windows: int, notes: list[str] | None = None) -> AutoBatch:
    batch = AutoBatch(CPU, TOKENS, 1, ([] if notes is None else notes).append)
    batch.windows = windows
    return batch


@torch.inference_mode()
def nlls_in(replay: Replay, groups: list[Tensor], batch: AutoBatch, heads: AutoBatch) -> list[list[float]]:
    states = final_states(replay, batch, dense_blocks(replay), groups)
    return [
        head_scores(replay, NEXT_TOKEN, heads, group, hidden)["nlls"]
        for group, hidden in zip(groups, states, strict=True)
    ]


def parts_in(work: Session, role: str, pruned: Any = None, kl: bool = False, one_by_one: bool = True) -> list[Any]:
    """The scores of each part, of the dense model by default."""
    heard: list[Any] = []
    work.measure(None, [RoleScores(role, kl, heard.append, one_by_one)], blocks=pruned)
    return heard


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_the_model_s_own_loss(family: str) -> None:
    model, ids = tiny(family), random_ids(7)
    own = naive.nlls_of(model, ids)
    [nlls] = nlls_in(replay_of(model), [ids], batch_of(4), batch_of(4))
    assert nlls == pytest.approx(own, rel=1e-5)
    assert perplexity(nlls).value == pytest.approx(float(torch.tensor(own).mean().exp()), rel=1e-5)
    assert max(own) > 1.001 * min(own)  # windows differ: a wrong one would show


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma3"])
def test_perplexity_of_a_pruned_model_is_its_own_loss(family: str) -> None:
    model = tiny(family)
    work = bench_of(model)
    pruned = list(work.prune(planned("sparsegpt", "uniform", (0.5,) * len(work.checkpoint.blocks))))
    nlls = nlls_of(work, ((block.index, block.weights) for block in pruned), "validation")
    other = pruned_copy(model, work, pruned)
    assert nlls == pytest.approx(naive.nlls_of(other, random_ids(7, TOKENS, seed=1)), rel=1e-5)
    assert nlls != pytest.approx(nlls_of(work, work.blocks(None), "validation"), rel=1e-3)


def pruned_copy(model: Any, work: Session, pruned: list[PrunedBlock]) -> Any:
    other = copy.deepcopy(model)
    blocks = other.get_submodule(work.checkpoint.blocks_name)
    for block in pruned:
        blocks[block.index].load_state_dict(block.weights)
    return other


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma3", "olmoe"])
def test_kl_is_that_of_the_models_own_logits(family: str) -> None:
    model = tiny(family)
    work = bench_of(model)
    pruned = list(work.prune(planned("wanda", "uniform", (0.5,) * len(work.checkpoint.blocks))))
    kls = scores_of(work, ((block.index, block.weights) for block in pruned), "validation", kl=True)["kls"]
    expected = naive.kls_of(model, pruned_copy(model, work, pruned), random_ids(7, TOKENS, seed=1))
    assert kls == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert max(kls) > 1.001 * min(kls) > 0


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_kl_of_the_dense_model_is_zero(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench_of(tiny("llama"))
    monkeypatch.setattr(work.batch("validation"), "windows", batch)
    assert scores_of(work, work.blocks(None), "validation", kl=True)["kls"] == [0.0] * 7
    assert scores_of(work, work.blocks(None), "validation").keys() == {"nlls"}


@pytest.mark.slow
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


def test_the_dense_model_is_run_once_for_all_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    work, ran = bench_of(tiny("llama")), []
    original = evaluation.advance
    monkeypatch.setattr(evaluation, "advance", lambda *args: ran.append(1) or original(*args))
    for _ in range(3):
        scores_of(work, work.blocks(None), "validation", kl=True)
    assert len(ran) == (1 + 3) * 4 * len(parts_of(work.items("validation"), work.batch("validation").windows))


@pytest.mark.parametrize("cached", [1, 97 * 3, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kls_of_tokens_are_sums_over_words(cached: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token, "CACHED", cached)
    dense, logits = (5 * torch.randn(10, 97).to(dtype) for _ in range(2))
    p, q = dense.double().softmax(1), logits.double().softmax(1)
    expected = [sum(float(p[t, v] * (p[t, v] / q[t, v]).log()) for v in range(97)) for t in range(10)]
    assert token_kls(dense, logits).tolist() == pytest.approx(expected, rel=1e-5)
    assert token_kls(dense, dense).tolist() == [0.0] * 10
    assert token_kls(dense, torch.full_like(dense, torch.nan)).isnan().all()


def test_two_tokens_are_enough() -> None:
    model, ids = tiny("llama"), random_ids(3, 2)
    [nlls] = nlls_in(replay_of(model), [ids], batch_of(2), batch_of(2))
    assert nlls == pytest.approx(naive.nlls_of(model, ids), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_batch_sizes_do_not_matter(family: str) -> None:
    replay, ids = replay_of(tiny(family)), random_ids(7)
    [expected] = nlls_in(replay, [ids], batch_of(8), batch_of(8))
    for windows, heads in ((1, 1), (2, 8), (8, 2), (3, 4)):
        [nlls] = nlls_in(replay, [ids], batch_of(windows), batch_of(heads))
        assert nlls == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "falcon-alibi"])
def test_groups_are_the_same_windows(family: str) -> None:
    replay, ids = replay_of(tiny(family)), random_ids(7)
    [expected] = nlls_in(replay, [ids], batch_of(4), batch_of(4))
    groups = nlls_in(replay, list(ids.split([3, 1, 2, 1])), batch_of(4), batch_of(4))
    assert [len(group) for group in groups] == [3, 1, 2, 1]
    assert [nll for group in groups for nll in group] == pytest.approx(expected, rel=1e-5)


def test_blocks_are_met_once_and_in_order() -> None:
    replay, met = replay_of(tiny("llama")), []

    def blocks() -> Iterator[Block]:
        for index, weights in dense_blocks(replay):
            met.append(index)
            yield index, weights

    with torch.inference_mode():
        final_states(replay, batch_of(1), blocks(), random_ids(4).split(2))
    assert met == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_bench_gives_groups_whether_or_not_it_keeps_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    work, events = bench_of(tiny("llama")), []
    expected = nlls_of(work, work.blocks(None), "validation")
    for kept in (True, False):
        monkeypatch.setattr(observers, "can_keep", lambda checkpoint, kept=kept: kept)
        for most, batch, sizes in ((3, 1, [3, 2, 2]), (8, 1, [1] * 7), (8, 4, [4, 3]), (8, 8, [7])):
            monkeypatch.setattr(observers, "GROUPS", most)
            monkeypatch.setattr(work.batch("validation"), "windows", batch)
            groups = [scores["nlls"] for scores in parts_in(work, "validation")]
            assert [len(group) for group in groups] == sizes
            assert [nll for group in groups for nll in group] == pytest.approx(expected, rel=1e-5)
            assert [
                scores["nlls"] for scores in parts_in(work, "validation", one_by_one=False)
            ] == groups  # to the last bit: the batches are the same
        assert events == []


def test_the_first_group_comes_before_the_second_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    work, ran = bench_of(tiny("llama")), []
    monkeypatch.setattr(observers, "can_keep", lambda checkpoint: True)
    monkeypatch.setattr(work.batch("validation"), "windows", 3)
    original = work.replay.run
    monkeypatch.setattr(work.replay, "run", lambda *args: ran.append(len(args[2])) or original(*args))
    seen: list[list[int]] = []
    work.measure(None, [RoleScores("validation", heard=lambda scores: seen.append([*ran]), one_by_one=True)])
    assert seen[:2] == [[3] * 4, [3] * 4 + [2] * 4]


def test_a_model_on_the_host_gives_the_same() -> None:
    one, other = bench_of(tiny("gpt2"), offload="none"), bench_of(tiny("gpt2"), offload="cpu")
    expected = nlls_of(one, one.blocks(None), "test")
    assert nlls_of(other, other.blocks(None), "test") == expected
    assert [nll for scores in parts_in(other, "test") for nll in scores["nlls"]] == expected


@pytest.mark.parametrize("most", [1, 2])
def test_logits_that_do_not_fit_change_no_result(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.gc, "collect", int)
    replay, ids, notes = replay_of(tiny("llama")), random_ids(7), list[str]()
    [expected] = nlls_in(replay, [ids], batch_of(8), batch_of(8))
    original = replay.logits

    def logits(ids: Tensor, hidden: Tensor) -> Tensor:
        if len(hidden) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(ids, hidden)

    monkeypatch.setattr(replay, "logits", logits)
    batch, heads = batch_of(8, notes), batch_of(8, notes)
    [nlls] = nlls_in(replay, [ids], batch, heads)
    assert nlls == pytest.approx(expected, rel=1e-5)
    assert (batch.windows, heads.windows) == (8, most)
    assert len(notes) == 1


def test_one_window_whose_logits_do_not_fit_fails_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.gc, "collect", int)
    replay, ids = replay_of(tiny("llama")), random_ids(2)

    def logits(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(replay, "logits", logits)
    with torch.inference_mode(), pytest.raises(TrialError, match="with one window"):
        head_scores(replay, NEXT_TOKEN, batch_of(2), ids, replay.embed(ids))


def test_logits_of_a_bfloat16_model_are_summed_in_float32() -> None:
    model, ids = tiny("llama", torch.bfloat16), random_ids(5)
    [nlls] = nlls_in(replay_of(model), [ids], batch_of(1), batch_of(1))
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=row[None]).logits for row in ids])
    assert logits.dtype == torch.bfloat16
    logs = logits[:, :-1].double().log_softmax(-1)
    expected = [
        -sum(float(logs[w, t, ids[w, t + 1]]) for t in range(TOKENS - 1)) / (TOKENS - 1) for w in range(len(ids))
    ]
    assert nlls == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_positions_change_no_result(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm and head work position by position, in every family; 5 and 1 leave a shorter slice and none."""
    replay, ids = replay_of(tiny(family)), random_ids(3)
    [expected] = nlls_in(replay, [ids], batch_of(4), batch_of(4))
    for positions in (5, 1, TOKENS - 1):
        monkeypatch.setattr(next_token, "POSITIONS", positions)
        [nlls] = nlls_in(replay, [ids], batch_of(4), batch_of(4))
        assert nlls == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cached", [1, 97 * 3, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nlls_of_tokens_are_cross_entropies(cached: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token, "CACHED", cached)
    logits, targets = 30 * torch.randn(10, 97).to(dtype), torch.randint(97, (10,))
    before = logits.clone()
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(token_nlls(logits, targets).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("cached", [1, 97 * 3, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.9])
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


def test_logits_that_are_not_finite_show() -> None:
    logits = torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [1.0, -torch.inf]])
    assert token_nlls(logits, torch.zeros(3, dtype=torch.long)).tolist() == pytest.approx(
        [torch.nan, torch.nan, 0.0], nan_ok=True
    )
