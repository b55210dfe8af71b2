"""`python -m histossl` is `histossl`."""

import sys

from histossl.cli.main import main

sys.exit(main())
