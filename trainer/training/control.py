"""What other threads may ask of a training: pause, go on, stop."""

from __future__ import annotations

import threading


# No TutelageError: nothing failed, and nothing should turn it into a message or an exit code.
class Stopped(Exception):
    """The training was asked to stop while it waited for the teacher, or for another process of this student."""


class Control:
    """Asked by one thread, obeyed by the training between steps."""

    def __init__(self) -> None:
        self._running = threading.Event()
        self._running.set()
        self._stopped = threading.Event()

    def pause(self) -> None:
        """Stands still after the present step."""
        self._running.clear()

    def resume(self) -> None:
        """Goes on after a pause."""
        self._running.set()

    def stop(self) -> None:
        """Ends after the present step; what was done is saved."""
        self._stopped.set()
        self._running.set()  # One that is paused would never see that it is to stop.

    @property
    def paused(self) -> bool:
        """Whether a pause was asked for."""
        return not self._running.is_set()

    @property
    def stopped(self) -> bool:
        """Whether a stop was asked for."""
        return self._stopped.is_set()

    def wait_while_paused(self) -> None:
        """Returns when the training may go on."""
        self._running.wait()

    def check_stopped(self) -> None:
        """For waiting code.

        Raises:
            Stopped: a stop was asked for.

        """
        if self.stopped:
            raise Stopped
