"""`python -m orchestrator` is the command `eagleray`; a Ray job's entrypoint needs no script on the path."""

import sys

from orchestrator.cli import main

sys.exit(main())
