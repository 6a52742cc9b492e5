"""Storages in the memory of this process, by addresses that studies can name: memory://1."""

from itertools import count
from weakref import WeakValueDictionary

from optuna.storages import BaseStorage, InMemoryStorage

from atp_tune.errors import UserError

MEMORY = "memory://"

_storages: WeakValueDictionary[str, BaseStorage] = WeakValueDictionary()
_numbers = count(1)


def new_storage() -> tuple[str, BaseStorage]:
    """A new storage and its address, by which it is found as long as the caller holds the storage."""
    storage = InMemoryStorage()
    address = f"{MEMORY}{next(_numbers)}"
    _storages[address] = storage
    return address, storage


def find(address: str) -> BaseStorage:
    """The storage of an address; UserError if it is gone."""
    storage = _storages.get(address)
    if storage is None:
        raise UserError(f"storage {address}: is gone with its Python process; name a file, as in sqlite:///study.db")
    return storage
