"""`python -m lmclock` is the `lmclock` command.

Until a verb is loaded, Ctrl-C ends the process at once: Python's own handler would show whatever
was being imported, and now and then go on.
"""

import gc
import signal


def main() -> None:
    """Entry point of the command."""
    # A vocabulary is 10^5 objects that stay: looking for garbage while they are made took 7 % of
    # the time to the first token.
    gc.set_threshold(100_000)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lmclock.cli import main

    main()


if __name__ == "__main__":
    main()
