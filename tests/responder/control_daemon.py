"""Replaces the daemon's end of the control socket: it gives the answers that a test sets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def control_daemon(path: Path, answer: Callable[[str], bytes]) -> Iterator[list[str]]:
    """A daemon that answers each line with C{answer}, and closes the connection after half a line;
    yields the lines that it received."""
    asked: list[str] = []

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("r") as lines:
            for line in lines:
                asked.append(line.removesuffix("\n"))
                said = answer(asked[-1])
                connection.sendall(said)
                if not said.endswith(b"\n"):
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # the test has ended
                return
            try:
                serve(connection)
            except OSError:  # the client has gone
                pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            path.unlink(missing_ok=True)
