"""The machinery behind the four scripts at the top."""

import signal
import sys

if sys.argv[0] == "-m":  # python -m lab.bench: Ctrl-C while torch is imported is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
