"""Waits for a condition: no test may depend on how busy the machine is."""

import time

PATIENCE = 60.0  # seconds: generous, as only a test that fails waits for so long


def until(condition, seconds: float = PATIENCE) -> bool:
    """Whether condition() comes true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
