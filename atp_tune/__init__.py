"""atp_tune finds how to share out sparsity over the blocks of a language model, and prunes it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("atp-tune")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0.0.0"
