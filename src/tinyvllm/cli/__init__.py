"""The command line: `tinyvllm COMMAND ...`. Commands are loaded when they are called.

stdout carries the answer and nothing else. What goes wrong is one line on stderr, with a table
below it where a model does not fit, and an exit code:

    0 done                         4 it will not fit
    1 failed while running         5 no such device
    2 usage, or an unusable input  130 SIGINT, 143 SIGTERM
    3 the model cannot be loaded   141 the reader of stdout has gone
"""

from __future__ import annotations

import signal


def main() -> None:
    """The entry point."""
    # Until the program listens to signals, which takes some imports, Ctrl-C just ends it: Python's
    # own way would be a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tinyvllm.cli.program import run

    run()
