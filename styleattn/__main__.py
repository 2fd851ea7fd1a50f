"""`python -m styleattn`: the command line."""

import sys

from styleattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
