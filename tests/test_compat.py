"""What other libraries do not call public and we use all the same: each is still there, and is called as we call it."""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import pytest
from expect import parametrize, slow
from optuna.storages import RDBStorage
from tinystudy import quiet

import atp_tune
from atp_tune.storage import attributes, database

ROOT = Path(atp_tune.__file__).parent
PACKAGES = {"lm_eval": "lm-eval"}  # whose releases have another name than what is imported
Import = tuple[str, str]

# What we call, as we call it.
CALLS: dict[Import, tuple[str, ...]] = {
    ("optuna.storages._heartbeat", "is_heartbeat_enabled"): ("storage",),
    ("optuna.storages._rdb.storage", "_create_scoped_session"): ("scoped_session", "ignore_integrity_error"),
    ("optuna.storages._grpc.client", "GrpcClientCache"): ("grpc_client",),
    ("optuna.storages._grpc.servicer", "OptunaStorageProxyService"): ("storage",),
    ("optuna._gp.search_space", "SearchSpace"): ("optuna_search_space",),
    ("ray._private.services", "canonicalize_bootstrap_address_or_die"): ("addr",),
}
# What we read of them, or override.
PARTS: dict[Import, tuple[str, ...]] = {
    ("optuna.storages._heartbeat", "BaseHeartbeat"): (
        "record_heartbeat", "_get_stale_trial_ids", "get_heartbeat_interval", "get_heartbeat_stale_trial_callback",
    ),
    ("optuna.study._frozen", "FrozenStudy"): ("study_name", "_study_id", "user_attrs", "system_attrs"),
    ("optuna.storages._rdb.models", "TrialHeartbeatModel"): ("trial_id", "heartbeat"),
    ("optuna.storages._rdb.models", "TrialModel"): ("study_id", "state"),
    ("optuna.storages._rdb.models", "TrialUserAttributeModel"): ("trial_id", "key", "value_json"),
    ("optuna.storages._rdb.models", "TrialSystemAttributeModel"): ("trial_id", "key", "value_json"),
    ("optuna.storages._rdb.models", "StudySystemAttributeModel"): ("study_id", "key", "value_json"),
    ("optuna.storages._grpc.auto_generated", "api_pb2_grpc"): (
        "StorageServiceStub", "add_StorageServiceServicer_to_server",
    ),
    ("optuna._gp.search_space", "SearchSpace"): ("get_normalized_params",),
}  # fmt: skip


def is_private(module: str, name: str) -> bool:
    """Whether a name has a part with one underscore in front, and is another library's; Python's own are Python's."""
    parts = [*module.split("."), name]
    is_foreign = parts[0] not in {"atp_tune", *sys.stdlib_module_names}
    return is_foreign and any(part.startswith("_") and not part.startswith("__") for part in parts)


def private_imports(path: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from ((module, name) for module, name in named if is_private(module, name))


USED = list(dict.fromkeys(private_imports(ROOT / "utils" / "compat.py")))


def upstream(module: str) -> str:
    """The library's name and version, for one line that says who changed."""
    library = module.split(".", maxsplit=1)[0]
    return f"{library} {version(PACKAGES.get(library, library))}"


def part(module: str, name: str) -> Any:
    pytest.importorskip(module.split(".", maxsplit=1)[0])
    try:
        with suppress(ImportError):
            return importlib.import_module(f"{module}.{name}")
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.fail(f"{upstream(module)} has no {module}.{name} any more", pytrace=False)


def check_takes(module: str, name: str, call: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """Whether the arguments that we give are the first ones, and the others have defaults."""
    taken = list(inspect.signature(call).parameters.values())
    asked = [one.name for one in taken if one.default is inspect.Parameter.empty and "VAR" not in one.kind.name]
    if [one.name for one in taken][: len(arguments)] != list(arguments) or not set(asked) <= set(arguments):
        now = ", ".join(one.name for one in taken)
        pytest.fail(f"{upstream(module)}: {module}.{name} takes ({now}), not ({', '.join(arguments)})", pytrace=False)


def test_there_is_something_to_check() -> None:
    assert {module.split(".")[0] for module, _ in USED} == {"optuna", "ray"}
    assert {*CALLS, *PARTS} == set(USED)


def test_private_parts_are_imported_in_compat_alone() -> None:
    others = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "compat.py"]
    assert others
    assert not {str(path): found for path in others if (found := list(private_imports(path)))}


@slow
@parametrize(("module", "name"), USED, ids=str)
def test_what_is_imported_is_there(module: str, name: str) -> None:
    part(module, name)


@parametrize(("module", "name"), CALLS, ids=str)
def test_what_is_called_takes_what_it_is_given(module: str, name: str) -> None:
    check_takes(module, name, part(module, name), CALLS[module, name])


@parametrize(("module", "name"), PARTS, ids=str)
def test_what_is_read_has_its_parts(module: str, name: str) -> None:
    owner = part(module, name)
    known = {*dir(owner), *(inspect.signature(owner).parameters if inspect.isclass(owner) else ())}
    for wanted in PARTS[module, name]:
        if wanted not in known and wanted.removeprefix("_") not in known:
            pytest.fail(f"{upstream(module)}: {module}.{name} has no {wanted} any more", pytrace=False)


@parametrize("name", [*database.CALLS, "set_trial_state_values", "record_heartbeat"])
def test_what_a_database_makes_again_is_a_call_of_optuna_s(name: str) -> None:
    """A method of another name would never be called: a lost server would end the worker."""
    if not hasattr(RDBStorage, name) and name not in vars(attributes.AttributeStorage):
        pytest.fail(f"{upstream('optuna')}: RDBStorage has no {name} any more", pytrace=False)


@parametrize(
    ("name", "wanted"),
    [
        ("_set_trial_attr_without_commit", ("self", "session", "model_cls", "trial_id", "key", "value")),
        ("_build_frozen_trial_from_trial_model", ("self", "trial")),
    ],
)
def test_what_separates_attributes_and_joins_them_is_there(name: str, wanted: tuple[str, ...]) -> None:
    call = getattr(RDBStorage, name, None)
    if call is None:
        pytest.fail(f"{upstream('optuna')}: RDBStorage has no {name} any more", pytrace=False)
    check_takes("optuna.storages", f"RDBStorage.{name}", call, wanted)


@pytest.fixture
def study() -> Iterator[optuna.Study]:
    with quiet():
        made = optuna.create_study()
        made.enqueue_trial({"x": 0.5})
        made.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
        yield made


# Attributes of its objects that we read outside of compat, as Optuna's own dashboard and integrations do.
ATTRIBUTES = {
    "_storage": lambda study: study,
    "_study_id": lambda study: study,
    "_trial_id": lambda study: study.trials[0],
    "_params": lambda study: study.trials[0],
    "_distributions": lambda study: study.trials[0],
    "_cached_frozen_trial": lambda study: study.ask(),
}


# Methods of other libraries that we call, or override.
METHODS = {
    ("peft", "LoraConfig", "_register_custom_module"): ("self", "mapping"),
    ("lm_eval.models.huggingface", "HFLM", "_model_call"): ("self", "inps"),
    ("transformers.modeling_utils", "PreTrainedModel", "_get_dtype_plan"): ("self", "dtype"),
}
OTHERS = {
    "_version",  # of torch's tensors: how often one was changed in place
    "_forward_pre_hooks",  # of torch's modules: see test_unchanged
    "_C", "_current_level", "_dispatch_tls_local_include_set",  # of torch: see the ways in test_packed_ways
    "_attn_implementation", "_has_any_global_hook",  # of transformers' configs, of torch's modules: see test_decoder
    "_ctx",  # of llama-cpp-py-sync's Llama: see test_gguf
    "_apply_gate",  # of some experts of transformers, called where it is there
    "_replace",  # of grpc's handlers, which are named tuples
    "_backend", "_gprs_cache_list", "_X_train", "_host", "_port", "_set_trial_attr_without_commit",
    "_build_frozen_trial_from_trial_model",  # see other tests
}  # fmt: skip


def names_of_its_own(tree: ast.Module) -> Iterator[str]:
    """Names with an underscore that a module defines, its fields, and its attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_private_attributes_are_those_that_are_tried_here() -> None:
    trees = [ast.parse(path.read_text()) for path in ROOT.rglob("*.py")]
    known = {name for tree in trees for name in names_of_its_own(tree)}
    known |= {*ATTRIBUTES, *OTHERS, *(name for _, _, name in METHODS)}
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    found = {node.attr for node in nodes if node.attr.startswith("_") and not node.attr.startswith("__")}
    assert found >= {"_study_id", "_trial_id", "_register_custom_module"}
    assert found - known == set()


@parametrize(("module", "owner", "name"), METHODS, ids=str)
def test_methods_of_others(module: str, owner: str, name: str) -> None:
    call = getattr(part(module, owner), name, None)
    if call is None:
        pytest.fail(f"{upstream(module)}: {module}.{owner} has no {name} any more", pytrace=False)
    check_takes(module, f"{owner}.{name}", call, METHODS[module, owner, name])


@parametrize("name", ATTRIBUTES)
def test_attributes_of_optuna_s_objects(name: str, study: optuna.Study) -> None:
    owner = ATTRIBUTES[name](study)
    if not hasattr(owner, name):
        pytest.fail(f"{upstream('optuna')}: {type(owner).__name__} has no {name} any more", pytrace=False)


def test_the_storage_behind_optuna_s_cache() -> None:
    """`set_attributes` writes to it directly; through the cache it would write one by one."""
    with quiet():
        cached = optuna.storages.get_storage("sqlite:///:memory:")
    behind = getattr(cached, "_backend", None)
    if not isinstance(behind, RDBStorage):
        pytest.fail(f"{upstream('optuna')}: {type(cached).__name__} has no _backend any more", pytrace=False)
    behind.engine.dispose()


def test_the_client_of_the_storage_proxy() -> None:
    """`RemoteStorage` sets up a channel of its own in the place of Optuna's."""
    with quiet():
        client = optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=1)
    client.close()
    for name in ("_setup", "_host", "_port", "_channel", "_stub", "_cache"):
        if not hasattr(client, name):
            pytest.fail(f"{upstream('optuna')}: GrpcStorageProxy has no {name} any more", pytrace=False)


@slow
def test_the_process_of_a_gp_sampler() -> None:
    from optuna.samplers import GPSampler

    from atp_tune.utils.compat import SearchSpace, fitted

    with quiet():
        sampler = GPSampler(seed=0, n_startup_trials=2)
        made = optuna.create_study(sampler=sampler)
        made.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=4)
    if not hasattr(sampler, "_gprs_cache_list"):
        pytest.fail(f"{upstream('optuna')}: GPSampler has no _gprs_cache_list any more", pytrace=False)
    process = fitted(sampler)
    points = SearchSpace(made.trials[0].distributions).get_normalized_params(made.trials)
    mean, variance = process.posterior(process._X_train.new_tensor(points))
    assert mean.shape == variance.shape == (4,)
