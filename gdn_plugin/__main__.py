"""`python -m gdn_plugin` is the `gdn-plugin` command."""

import sys

from gdn_plugin.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
