"""`python -m megazh` is the `megazh` command."""

from megazh.cli import main

if __name__ == "__main__":
    main()
