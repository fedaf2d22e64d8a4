"""`python -m agl_grpc_cli`: the command where no console script is installed."""

from __future__ import annotations

from agl_grpc_cli.main import main

if __name__ == "__main__":
    main()
