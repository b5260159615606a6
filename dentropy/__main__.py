"""`python -m dentropy` is the command `dentropy`."""

from dentropy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
