"""Who is there, as far as is known, and a Welcome for each when there is room (docs/services.md section 4).

That a device is here only saves sending to those that are not: frames may be lost, and whatever it was told it may ask
again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from coordinator.mail import Mail


@dataclass
class Present:
    """A device that said Hello and has not left, as far as is known."""

    tasks: frozenset[str] | None
    """Those that it has examples for; None if it has not said so since the server started."""
    heard: bool = True
    """Whether our link has been up since its Hello: else what was sent to it may be lost."""

    def trains(self, task: str) -> bool:
        """Whether it may have examples for this task."""
        return self.tasks is None or task in self.tasks


class Presence:
    """The devices that are there, by name."""

    def __init__(self, mail: Mail, welcome: Callable[[str], bytes | None]) -> None:
        """welcome: the frame that tells a device where things stand, made when it leaves; None: it is told nothing."""
        self._mail, self._make = mail, welcome
        self._present: dict[str, Present] = {}

    def __contains__(self, device: object) -> bool:
        return device in self._present

    def __iter__(self) -> Iterator[str]:
        return iter(self._present)

    def get(self, device: str) -> Present | None:
        """What is known of a device that is there."""
        return self._present.get(device)

    def hello(self, device: str, tasks: Iterable[str]) -> Present | None:
        """It is there, has examples for these tasks, and is welcomed. Returns what was known before, None if it was
        away."""
        before = self._present.get(device)
        self._present[device] = Present(frozenset(tasks))
        self.welcome(device)
        return before

    def presume(self, device: str) -> None:
        """It was there before the server stopped, so it may be there yet."""
        self._present[device] = Present(None, heard=False)
        self.welcome(device)

    def leave(self, device: str) -> None:
        """It went away, if it was there."""
        self._present.pop(device, None)

    def doubt(self) -> None:
        """Our own link was down: nobody is known to have heard what was sent."""
        for present in self._present.values():
            present.heard = False

    def welcome(self, device: str) -> None:
        """Tell a device where things stand, when there is room."""
        self._mail.note(device, lambda: self._make(device))

    def welcome_all(self) -> None:
        """Something changed that everybody needs to know."""
        for device in self._present:
            self.welcome(device)

    def training(self, task: str) -> list[str]:
        """Who is there and may have examples for this task."""
        return [device for device, present in self._present.items() if present.trains(task)]

    def tell(self, task: str, serving: Collection[str]) -> None:
        """Something of a task changed: say so to who trains it, and to those that serve in its rounds, if there."""
        for device, present in self._present.items():
            if present.trains(task) or device in serving:
                self.welcome(device)
