"""`python -m lmclock` is the `lmclock` command."""

from lmclock.cli import main

main()
