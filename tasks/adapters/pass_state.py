"""State of a forward pass that one hook finds and another one reads, on a model that several threads run."""

from __future__ import annotations

import threading
from typing import Any


class PassState(threading.local):
    """Each thread's own attributes, as autograd's mode is each thread's own: a pass stays within its thread.

    What holds it may be copied, as models are: the copy is in no pass.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> PassState:
        return type(self)()

    def __reduce__(self) -> tuple[type[PassState], tuple[()]]:
        return type(self), ()
