"""`python -m baton.decode`: runs one decode worker."""

from __future__ import annotations

import sys

from baton.decode.service import build
from baton.decode.settings import DecodeSettings
from baton.rpc.process import main

if __name__ == "__main__":
    sys.exit(main(DecodeSettings, build))
