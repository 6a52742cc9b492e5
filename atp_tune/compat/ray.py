"""Ray: where a cluster is.

bootstrap_address: what people write, `auto` among it, as HOST:PORT; the public `ray.init` would try it for minutes.
"""

from ray._private.services import canonicalize_bootstrap_address_or_die as bootstrap_address

__all__ = ["bootstrap_address"]
