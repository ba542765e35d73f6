"""`python -m elastic_lm` is the `elastic-lm` command."""

from elastic_lm.cli import main

if __name__ == "__main__":
    main()
