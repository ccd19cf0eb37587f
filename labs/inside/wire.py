"""Messages over a pipe or a socket: 4 bytes of length, one of kind, and a body. Standard library only."""

import os
import select
import time

MOST_BYTES = 2**25  # of one message: a notebook may have 20 MB, an answer 16
TASK, VALUE, KILL, STATE = (
    b"T",
    b"V",
    b"K",
    b"S",
)  # down: a task, end the question's process; up: a value, how it stands


class Line:
    """Two file descriptors, one to read from and one to write to, in messages."""

    def __init__(self, read: int, write: int):
        self.read, self.write, self._heard = read, write, bytearray()

    def send(self, kind: bytes, body: bytes) -> None:
        """Send a message. Raises OSError where nobody listens."""
        data = memoryview(len(body).to_bytes(4, "big") + kind + body)
        while data:
            data = data[os.write(self.write, data[: 2**16]) :]

    def receive(self, seconds: float | None = None) -> tuple[bytes, bytes] | None:
        """The next (kind, body), or None where the line has ended. Raises TimeoutError, ValueError for a huge one."""
        end = None if seconds is None else time.monotonic() + seconds
        while (message := self.waiting()) is None:
            left = None if end is None else max(0, end - time.monotonic())
            if not select.select([self.read], [], [], left)[0]:
                raise TimeoutError
            if not self.fill():
                return None
        return message

    def fill(self) -> bool:
        """Read what is there; False where the line has ended."""
        try:
            piece = os.read(self.read, 2**18)
        except OSError:
            piece = b""
        self._heard += piece
        return bool(piece)

    def waiting(self) -> tuple[bytes, bytes] | None:
        """A message that has come whole, if there is one."""
        if len(self._heard) < 5:
            return None
        n = int.from_bytes(self._heard[:4], "big")
        if n > MOST_BYTES:
            raise ValueError(f"a message of {n:,} bytes")
        if len(self._heard) < 5 + n:
            return None
        kind, body = bytes(self._heard[4:5]), bytes(self._heard[5 : 5 + n])
        del self._heard[: 5 + n]
        return kind, body

    def close(self) -> None:
        """Close both ends."""
        for number in {self.read, self.write}:
            os.close(number)
