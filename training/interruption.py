"""Being told to stop: SIGTERM, SIGINT, or the launcher's death."""

import ctypes
import os
import signal
import sys

EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: not finished, try again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class InterruptedRun(Exception):
    """The run was told to stop, and what there was to save is saved."""


class Interruption:
    """Turns a signal into InterruptedRun: at once, or, while `deferred` is set, when the code asks for `requested`.

    A second signal ends the process. A launcher that is killed cannot pass a signal on, and its orphan would keep the
    run's folder occupied: so a process started by one (`accelerate launch`, torchrun) asks Linux for a SIGTERM then.
    """

    def __init__(self):
        self.requested = self.deferred = False
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
        if launched and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def settle(self) -> None:
        """End the deferral.

        Raises:
            InterruptedRun: where a signal came in the meantime.
        """
        self.deferred = False
        if self.requested:
            raise InterruptedRun("stopped: the same command goes on from here")

    def _handle(self, number: int, frame) -> None:
        self.requested = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self.deferred:
            raise InterruptedRun("stopped: the same command goes on from here")
