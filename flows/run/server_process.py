"""Process of a Prefect server that `flows.run.prefect_server` keeps up; it ends with the process that started it."""

from __future__ import annotations

import socket
import sys

from tasks.core.stage import die_with_owner


def main() -> None:
    """Serve at the socket of the first argument; with the UI and the services of a schedule if the second says so."""
    descriptor, kind = sys.argv[1:]
    die_with_owner()
    import uvicorn
    from prefect.server.api.server import create_app

    config = uvicorn.Config(
        create_app(ephemeral=kind != "shared", final=True), log_level="warning", timeout_graceful_shutdown=1
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(descriptor))])


if __name__ == "__main__":
    main()
