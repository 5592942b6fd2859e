"""Being told to stop: SIGTERM, SIGINT, or the launcher's death."""

import os
import signal

EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: not finished, try again


class Interruption:
    """Remembers a request to stop, for the training loop to act on between two steps.

    A second signal of the same kind acts at once. A launcher that is killed cannot pass a signal on, and its orphan
    would keep the folder of the run occupied: so a process started by one (`accelerate launch`, torchrun) also stops
    when its parent is gone.
    """

    def __init__(self):
        self._requested = False
        self._parent = os.getppid() if self._launched() else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    @staticmethod
    def _launched() -> bool:
        return any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))

    def _handle(self, number: int, frame) -> None:
        self._requested = True
        signal.signal(number, signal.SIG_DFL)

    @property
    def requested(self) -> bool:
        """Whether to stop at the next step."""
        return self._requested or (self._parent is not None and os.getppid() != self._parent)


class InterruptedRun(Exception):
    """The run was told to stop and has saved what there was to save."""
