"""`speedup`: sizes, zeros, then torch and the engine that was asked for."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from atp_tune.checkpoints.classes import model_config
from atp_tune.checkpoints.devices import find_device, oom_as_user_error
from atp_tune.errors import UserError
from atp_tune.events import TrialStarted, Watch
from atp_tune.metrics.speed import Speed
from atp_tune.speed import deepsparse_engine, semistructured, torch_engine
from atp_tune.speed.deepsparse_home import python_of
from atp_tune.speed.graphs import check_onnx
from atp_tune.speed.model_pair import Pair
from atp_tune.speed.sizes import sizes, zeros_by_kind
from atp_tune.speed.throughput import Opening, Task, measured

Open = Callable[[Pair, Task, torch.device, Watch], Iterator[Opening]]


def _torch(pair: Pair, task: Task, device: torch.device, watch: Watch) -> Iterator[Opening]:
    return (torch_engine.opened(pair, task, device, dtype) for dtype in torch_engine.dtypes(device))


def _deepsparse(pair: Pair, task: Task, device: torch.device, watch: Watch) -> Iterator[Opening]:
    yield deepsparse_engine.opened(pair, task, watch)


def _semistructured(pair: Pair, task: Task, device: torch.device, watch: Watch) -> Iterator[Opening]:
    yield semistructured.opened(pair, task, device)


ENGINES: dict[str, Open] = {"torch": _torch, "deepsparse": _deepsparse, semistructured.NAME: _semistructured}


def check(engine: str, pattern: str, device: str) -> None:
    """UserError where an engine cannot run, or not with such zeros: before a model is pruned for it."""
    if engine == "deepsparse":
        check_onnx()
        python_of()
    if engine == semistructured.NAME:
        semistructured.check(pattern, find_device(device))


def check_positions(pair: Pair, task: Task) -> None:
    """UserError where the prompt and the tokens after it are more than the model has positions."""
    config = model_config(pair.dense, pair.trusted).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and task.tokens + task.steps > positions:
        raise UserError(
            f"--tokens {task.tokens}: the model has {positions} positions, of which {task.steps} are for the tokens "
            "after the prompt; lower it"
        )


def measure(pair: Pair, engine: str, task: Task, device: str, watch: Watch) -> Speed:
    """All that is known of a pair of models; torch is measured with every engine, to be compared with."""
    check_positions(pair, task)
    place = find_device("cpu" if engine == "deepsparse" else device)
    opening = partial(ENGINES[engine], pair, task, place, watch)
    first = list(opening()) if engine != "torch" else []
    with oom_as_user_error("speedup"):
        watch(TrialStarted("compressing the weight files", None))
        found = sizes(pair.dense, pair.sparse, watch)
        with pair.load("sparse", torch.float32, torch.device("cpu")) as sparse:
            zeros = zeros_by_kind(sparse)
        rows = [measured(each, "torch", task, watch) for each in _torch(pair, task, place, watch)]
        rows += [measured(each, engine, task, watch) for each in first]
    return Speed(sizes=found, zeros=zeros, engines=tuple(rows))
