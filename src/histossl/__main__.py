"""`python -m histossl` is `histossl`."""

from histossl.cli.main import program

program()
