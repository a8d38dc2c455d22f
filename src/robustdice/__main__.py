"""``python -m robustdice``: the command line."""

from robustdice.cli import main

main()
