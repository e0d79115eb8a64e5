"""`python -m diffkd`: the command line."""

from diffkd.cli import main

main()
