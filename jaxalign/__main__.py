"""`python -m jaxalign` is the command line."""

from jaxalign.cli import entry

if __name__ == "__main__":
    entry()
