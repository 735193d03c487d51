"""`python train.py key=value …` is `nanochat-pl train key=value …`."""

import sys

from nanochat_pl.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
