"""`python -m initjax` is the command line."""

from initjax.cli import main

if __name__ == "__main__":
    main(prog_name="initjax")
