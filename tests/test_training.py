"""The training against a naive one: a plain model, its weights summed by hand, Adam and the clip written out."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from expect import parametrize, refusal, refused, slow
from families import checkpoint_of, random_ids, tiny
from test_lora import with_zeros
from torch import Tensor
from torch.func import functional_call

from atp_tune.config.prune import Training
from atp_tune.errors import UserError
from atp_tune.folders import training
from atp_tune.folders.training import Trainer, bytes_needed, order
from atp_tune.inputs.items import Items

SETTINGS = Training(
    train="lora",
    loss="next-token",
    eval_every=20,
    patience=0,
    steps=5,
    rank=2,
    alpha=3,
    learning_rate=0.02,
    seqlen=13,
    batch=2,
    seed=3,
)
FACTS = {"rank": "2"}


@pytest.fixture(autouse=True)
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine, so that it is compared in float32."""
    monkeypatch.setattr(training, "find_dtype", lambda name, device: torch.float32)


def windows(count: int) -> Items:
    return Items.windows(random_ids(count).numpy())


def trainer(settings: Training = SETTINGS) -> Trainer:
    return Trainer(checkpoint_of(with_zeros("llama")), windows(7), settings)


def naive(parameters: dict[str, Tensor], steps: int) -> list[float]:
    """Trains in place as the head of the module says; the loss of each step."""
    model = with_zeros("llama")
    weights = {name: w.detach() for name, w in model.named_parameters()}
    generator = torch.Generator().manual_seed(SETTINGS.seed)
    rows = torch.cat([torch.randperm(7, generator=generator) for _ in range(2)])
    m, v = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    losses = []
    for step in range(steps):
        ids = random_ids(7)[rows[2 * step : 2 * step + 2]]
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        summed = dict(weights)
        for name in {name.rpartition(".")[0] for name in leaves}:
            update = leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"] * 3 / 2
            summed[name] = weights[name] + update * (weights[name] != 0)
        logits = functional_call(model, summed, kwargs={"input_ids": ids}).logits
        nll = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        loss = nll.mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        lr = 0.02 if step == 0 else 0.02 * (1 + math.cos(math.pi * (step - 1) / 4)) / 2
        for name in parameters:
            g = gradients[name] * min(1, 1 / (norm + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            parameters[name] -= (
                lr * (m[name] / (1 - 0.9 ** (step + 1))) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            )
        losses.append(loss.item())
    return losses


def values(trained: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained._parameters.items()}


def test_steps_are_those_of_plain_torch() -> None:
    ours = trainer()
    parameters = values(ours)
    expected = naive(parameters, steps=3)
    assert [ours.step() for _ in range(3)] == pytest.approx(expected, rel=1e-5)
    for name, value in values(ours).items():
        assert torch.allclose(value, parameters[name], rtol=1e-3, atol=2e-5), name
    assert ours.losses == pytest.approx(expected, rel=1e-5)


# --- the dense model's predictions


def kl_trainer(held_out: Items | None = None, loss: str = "kl", **settings: object) -> Trainer:
    """One whose teacher is the model before anything was zeroed."""
    ours = Trainer(checkpoint_of(with_zeros("llama")), windows(7), with_loss(loss, **settings), held_out)
    ours._teacher = tiny("llama").requires_grad_(False)
    return ours


def with_loss(loss: str, **settings: object) -> Training:
    return SETTINGS.model_copy(update={"loss": loss, **settings})


def naive_loss(loss: str, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Mean over predicted tokens of Σ p ln(p / q), or of half of that and of half of -ln q of the token."""
    model, dense = with_zeros("llama"), tiny("llama")
    p = dense(input_ids=ids).logits[:, :-1].softmax(-1).detach()
    q = functional_call(model, weights, kwargs={"input_ids": ids}).logits[:, :-1].softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    return kl if loss == "kl" else (kl - q.gather(-1, ids[:, 1:, None]).log().mean()) / 2


@parametrize("kind", ["kl", "both"])
def test_the_loss_by_the_dense_model_and_its_gradient_are_the_naive_ones(kind: str) -> None:
    ours = kl_trainer(loss=kind)
    with torch.no_grad():
        for parameter in ours._parameters.values():
            parameter.normal_(0, 0.1)
    rows = order(7, SETTINGS)[:2]
    loss = ours._backward(windows(7)[rows])
    merged = {name: tuned.clone().requires_grad_() for name, _, tuned in ours.adapters.merged()}
    expected = naive_loss(kind, merged, random_ids(7)[rows])
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    for name, weight in merged.items():
        masked = weight.grad * (weight != 0)
        b = ours._parameters[f"{name}.lora_B"].detach()
        mine = ours._parameters[f"{name}.lora_A"].grad
        assert torch.allclose(mine, 1.5 * b.T @ masked, rtol=1e-3, atol=1e-5)


# --- held-out windows


def held_out_trainer(**settings: object) -> Trainer:
    made = with_loss("next-token", patience=2, eval_every=2, **settings)
    return Trainer(checkpoint_of(with_zeros("llama")), windows(7), made, windows(12)[7:])


def run(ours: Trainer) -> Trainer:
    """To its end, as `finetune` does."""
    if ours.must_measure:
        ours.measure()
    while not ours.has_ended:
        ours.step()
        if ours.must_measure:
            ours.measure()
    return ours


@parametrize(("room", "runs"), [(2**30, 3), (2 * 12 * 97 * 4, 3 + 2), (0, 2 * 3)])
def test_the_dense_model_predicts_held_out_windows_once_if_there_is_room(room: int, runs: int) -> None:
    """5 windows of 13 tokens in batches of 2, measured twice; the second room is that of the first batch."""
    ours = kl_trainer(held_out=windows(12)[7:], patience=2, eval_every=2)
    ours._room, ran = room, []
    ours._teacher.register_forward_hook(lambda *_: ran.append(1))
    assert ours.measure() == ours.measure()
    assert len(ran) == runs


@slow
def test_it_ends_when_the_held_out_loss_rises_and_takes_the_best() -> None:
    """Random windows have nothing in common, so that training on some raises the loss of others."""
    ours = held_out_trainer(steps=40, learning_rate=0.05)
    kept = {}
    while not ours.has_ended:
        if ours.must_measure:
            ours.measure()
            kept[len(ours.losses)] = values(ours)
        if not ours.has_ended:
            ours.step()
    step, _ = ours.early_stop.best
    assert len(ours.losses) == step + 4 < 40
    ours.take_best()
    assert all(torch.equal(value, kept[step][name]) for name, value in values(ours).items())
    assert not all(torch.equal(value, kept[step + 4][name]) for name, value in values(ours).items())


@slow
@parametrize("made", [held_out_trainer, partial(held_out_trainer, rank=None, alpha=None)])
def test_held_out_losses_and_the_best_go_on_to_the_same_bits(made: Callable[..., Trainer], tmp_path: Path) -> None:
    settings = {"steps": 12, "learning_rate": 0.02}
    whole, half, rest = run(made(**settings)), made(**settings), made(**settings)
    half.measure()
    for _ in range(3):
        half.step()
        if half.must_measure:
            half.measure()
    half.save(tmp_path / "part", FACTS)
    rest.restore(tmp_path / "part", FACTS)
    run(rest)
    assert rest.losses == whole.losses
    assert rest.early_stop.losses == whole.early_stop.losses
    for trained in (whole, rest):
        trained.take_best()
    assert all(torch.equal(value, values(whole)[name]) for name, value in values(rest).items())


def test_a_file_of_other_options_is_refused(tmp_path: Path) -> None:
    ours, path = trainer(), tmp_path / "part"
    ours.step()
    ours.save(path, FACTS)
    assert (
        refusal(trainer().restore, path, {"rank": "4"})
        == f"{path}: was begun with another rank; give the same options, or remove the file"
    )


# --- a run that was cut off


@parametrize("content", [b"", b"nonsense that is longer than a header"])
def test_a_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(content)
    assert refusal(trainer().restore, path, FACTS) == f"{path}: was not written by an earlier run; remove it"


# --- order and rate


# --- what does not fit


@slow
def test_blocks_are_recomputed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = trainer()
    needed = bytes_needed(roomy.adapters, SETTINGS, recompute=False)
    assert bytes_needed(roomy.adapters, SETTINGS, recompute=True) < needed
    monkeypatch.setattr(training, "free_memory", lambda device: needed)
    tight = trainer()
    assert "partial" in str(tight._model.model.layers[0].forward)
    assert "partial" not in str(roomy._model.model.layers[0].forward)
    assert [tight.step() for _ in range(3)] == [roomy.step() for _ in range(3)]


def test_too_little_memory_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "free_memory", lambda device: 1000)
    with pytest.raises(
        UserError, match=r"^training: needs about 0\.0 GiB beside the weights, 0\.0 GiB are free; lower"
    ):
        trainer()


def test_windows_longer_than_the_model_are_refused() -> None:
    with refused(r"^seqlen: 65, the model has 64 positions; lower it$"):
        trainer(SETTINGS.model_copy(update={"seqlen": 65}))


def test_a_loss_that_is_no_number_is_said() -> None:
    ours = trainer(SETTINGS.model_copy(update={"learning_rate": 1e30}))
    with refused(r"^training: the loss is (nan|inf) at step \d; lower the learning rate$"):
        for _ in range(5):
            ours.step()
