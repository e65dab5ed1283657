"""`python -m baton.decode`: runs one decode worker."""

from __future__ import annotations

from baton.decode.settings import DecodeSettings
from baton.rpc.process import main

if __name__ == "__main__":
    # Named, not imported: torch must come after the process has been bound to its cores.
    main(DecodeSettings, "baton.decode.service:build")
