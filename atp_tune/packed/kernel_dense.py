"""The name under which the files of packed folders of interfaces up to 5 ask for `kernel.dense_linear`."""

from atp_tune.packed.kernel import dense_linear as linear

__all__ = ["linear"]
