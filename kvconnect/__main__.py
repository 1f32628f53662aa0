"""``python -m kvconnect``."""

import sys

from kvconnect.cli import main

if __name__ == "__main__":
    sys.exit(main())
