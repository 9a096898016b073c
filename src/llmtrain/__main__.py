"""`python -m llmtrain`: the same as the `llmtrain` command."""

import sys

from llmtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
