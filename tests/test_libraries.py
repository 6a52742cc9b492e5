"""What libraries say of themselves is not shown."""

import logging

import pytest

from atp_tune.utils.system import silenced


def test_a_library_that_asks_for_another_package_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("bitsandbytes.backends.cpu.ops")  # as PEFT imports it
    with silenced():
        library.warning("please install kernels")
        library.error("it does not work")
    library.warning("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["it does not work", "afterwards"]
