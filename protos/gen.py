"""Generate the committed protobuf and gRPC stubs of baton.v1.

Run `make protos` after editing a .proto; `tests/meta/test_protos.py` fails when stubs are stale.
The .proto's path is its Python package, so the generated imports need no rewriting.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(out_dir: Path) -> int:
    """Write stubs for every .proto into `out_dir`; returns protoc's exit status."""
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "baton").rglob("*.proto"))
    well_known = Path(str(protoc.__file__)).parent / "_proto"
    return int(
        protoc.main([
            "protoc",
            f"--proto_path={ROOT}",
            f"--proto_path={well_known}",
            f"--python_out={out_dir}",
            f"--pyi_out={out_dir}",
            f"--grpc_python_out={out_dir}",
            *protos,
        ])
    )


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, help="folder to write to (default: here)")
    return generate(parser.parse_args().out)


if __name__ == "__main__":
    sys.exit(main())
