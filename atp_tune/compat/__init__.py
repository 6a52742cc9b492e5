"""What this package takes from the private parts of other libraries, one module for each that has to be imported alone.

Nothing else in the package imports a name with an underscore of another library. `tests/test_compat.py` says in one
line which release of which library took one away, and pyproject.toml bounds the versions of these libraries.
"""
