"""The command `histossl`, also as `python -m histossl`."""

import os
import sys
from typing import NoReturn

from histossl.cli.main import main


def program() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    code = main()
    if code == 2 and "h5py" in sys.modules:
        # Where a full disk did not take all of a file, HDF5 tries again when the process ends, and crashes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
