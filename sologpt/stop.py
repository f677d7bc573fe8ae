"""
Ctrl-C, SIGTERM and SIGHUP as a request, which a loop answers where it can end with everything saved.
"""

import contextlib
import os
import signal
import sys
import threading

SIGPIPE = 13  # which Windows does not have
SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    SIGNALS.append(signal.SIGHUP)  # the terminal was closed, perhaps with its ssh session


class Stopped(KeyboardInterrupt):
    """Raised where a StopRequest is answered. Nothing that catches errors takes it for one."""


class StopRequest:
    """Inside `with StopRequest(text) as stop`, the first signal writes text to stderr and sets stop.number; a
    Ctrl-C after it ends the process at once. After the `with`, signals do what they did before."""

    in_force = None  # the one whose `with` has been entered

    def __init__(self, text):
        self.text = text
        self.number = 0  # of the signal; 0: nobody has asked
        self.interrupting = False
        self.agreed = False  # whether all processes of a run know why they leave; parallel.py
        self.raised = False  # whether a Stopped is on its way
        self.repeating = None  # a thread, once Python has dropped a Stopped
        self.left = threading.Event()

    def __enter__(self):
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        self.hook_before = sys.unraisablehook
        sys.unraisablehook = self.dropped
        for number, handler in self.before.items():
            if number in (signal.SIGINT, signal.SIGTERM) or handler != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.ask)
        StopRequest.in_force = self
        return self

    def __exit__(self, *error):
        StopRequest.in_force = None
        sys.unraisablehook = self.hook_before
        self.left.set()
        if self.repeating:
            self.repeating.join()  # its signal would end the process below
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        if not self.number:
            self.number = number
            self.write(self.text)
        elif number == signal.SIGINT:
            os._exit(128 + number)
        elif not self.repeating:
            return  # a terminal that closes and the end of a session send two, 0 to 200 ms apart
        if self.interrupting and not self.raised:
            self.raised = True
            raise Stopped

    def dropped(self, error):
        """Python's hook for errors in a weakref's callback or a __del__, of which compiling has many: there
        a Stopped would be printed and forgotten. It is raised again, a little later."""
        if not isinstance(error.exc_value, Stopped):
            self.hook_before(error)
            return
        if not self.repeating:
            self.repeating = threading.Thread(target=self.repeat, daemon=True)
            self.repeating.start()
        self.raised = False  # last, so that the next one is not raised here

    def repeat(self):
        while self.interrupting and not self.left.wait(0.1):
            signal.raise_signal(signal.SIGTERM)

    def write(self, text):
        # a log may be on a full disk; not print(), which the signal may have interrupted
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"\n{text}\n".encode())

    def reader_has_ended(self):
        """Asks to stop, if no signal has, because nobody reads stdout any more."""
        if not self.number:
            self.number = SIGPIPE
            self.write("nobody reads the output any more: stopping")

    def check(self):
        """Raises Stopped if somebody has asked to stop."""
        if self.number:
            raise Stopped

    @contextlib.contextmanager
    def interrupts(self):
        """Returns a context for work that may be lost: a signal raises Stopped in the middle of it."""
        self.interrupting = True
        try:
            self.check()
            yield
        finally:
            self.interrupting = False
