"""``python -m flowspec_edge`` is ``flowspec``."""

import sys

from flowspec_edge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
