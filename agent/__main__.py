"""``python -m agent`` runs the daemon."""

import sys

from agent.daemon import main

if __name__ == "__main__":
    sys.exit(main())
