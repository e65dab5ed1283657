"""`python -m baton.prefill`: runs one prefill worker."""

from __future__ import annotations

from baton.prefill.settings import PrefillSettings
from baton.rpc.process import main

if __name__ == "__main__":
    # Named, not imported: torch must come after the process has been bound to its cores.
    main(PrefillSettings, "baton.prefill.service:build")
