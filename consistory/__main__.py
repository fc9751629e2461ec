"""`python -m consistory` is the command `consistory`."""

import sys

from .cli import main

sys.exit(main())
