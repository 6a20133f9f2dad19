"""Ctrl-C between two steps instead of in the middle of one."""

import signal
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """Context in which the first SIGINT only sets `asked`; a second one interrupts at once.

    A step that is cut off in the middle leaves parameters and random states between two steps,
    where no checkpoint can be exact.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "DeferredInterrupt":
        # Signals belong to the main thread; elsewhere there is nothing to defer.
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active:
            # None stands for a handler that was not installed from python.
            signal.signal(signal.SIGINT, self._before or signal.SIG_DFL)
