"""`python -m histossl` is `histossl`."""

import sys

from histossl.cli import main

sys.exit(main())
