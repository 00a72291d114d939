"""Frames on their way out: answers at once, bulk as the broker takes it.

What devices fetch waits here as a wish, (blob, chunk), and becomes bytes when the broker has room; a device that asks
twice is answered once. So a thousand devices that fetch one model cost the wishes, not a thousand models.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable

from edge_sdk.errors import ParameterError
from edge_sdk.transport import Hub
from edge_sdk.transport.chunks import Blob
from edge_sdk.transport.wire import MAX_PULL, encode_frame

log = logging.getLogger(__name__)

UNSENT_BYTES = 4 << 20
"""While the broker has so much to take, bulk waits."""

ROOM_BYTES = 3 << 20
"""When it has no more than this to take, more is sent: before it has nothing to do."""

FRAMES_AT_ONCE = 128
"""Bulk frames between two looks at what came in."""


class Mail:
    """What goes out, through one hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._answers: list[tuple[str, bytes]] = []
        self._notes: OrderedDict[str, Callable[[], bytes | None]] = OrderedDict()
        self._wishes: OrderedDict[str, OrderedDict[tuple[bytes, int], Blob]] = OrderedDict()

    def answer(self, device: str, frame: bytes) -> None:
        """Goes out with the next `send_answers`: when what it says is on disk."""
        self._answers.append((device, frame))

    def note(self, device: str, make: Callable[[], bytes | None]) -> None:
        """Goes out when there is room, made then; a later note to the same device replaces it."""
        self._notes[device] = make

    def serve(self, device: str, blob: Blob, chunks: Iterable[int]) -> None:
        """Chunks that a device asked for. More than MAX_PULL a device wait no longer: it asks again."""
        wishes = self._wishes.setdefault(device, OrderedDict())
        for index in chunks:
            if len(wishes) < 2 * MAX_PULL:
                wishes[blob.ref.id, index] = blob

    def owes(self, device: str, blobs: Container[bytes]) -> bool:
        """Whether chunks of one of these blobs wait for room: an answer given now would overtake them."""
        return any(blob in blobs for blob, _ in self._wishes.get(device, ()))

    def forget(self, device: str) -> None:
        """The device went away."""
        self._notes.pop(device, None)
        self._wishes.pop(device, None)

    def send_answers(self, sent: Callable[[], None]) -> None:
        """Everything that was said to be answered. sent: called after each."""
        answers, self._answers = self._answers, []
        for device, frame in answers:
            self._hub.send(device, frame)
            sent()

    def send_bulk(self) -> None:
        """As much as the broker has room for, device by device in turn."""
        for _ in range(FRAMES_AT_ONCE):
            if not self.has_bulk or self._hub.unsent_bytes > UNSENT_BYTES:
                return
            if self._notes:
                device, make = self._notes.popitem(last=False)
                frame = make()
                if frame is not None:
                    self._hub.send(device, frame)
                continue
            device, wishes = self._wishes.popitem(last=False)
            (_, index), blob = wishes.popitem(last=False)
            if wishes:
                self._wishes[device] = wishes  # to the end: the others come first
            try:
                chunk = blob.chunk(index)
            except ParameterError as error:  # the disk's fault: rounds go on, and the operator has to know
                log.error("not served: %s", error)
                continue
            self._hub.send(device, encode_frame(chunk))

    @property
    def room_bytes(self) -> int | None:
        """How little has to be unsent for more to be sent; None while nothing waits. For `Hub.receive`."""
        return ROOM_BYTES if self.has_bulk else None

    @property
    def has_bulk(self) -> bool:
        return bool(self._notes or self._wishes)
