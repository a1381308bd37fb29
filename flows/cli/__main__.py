"""`python -m flows.cli`: the command line, as `temper` is."""

from flows.cli.main import main

main()
