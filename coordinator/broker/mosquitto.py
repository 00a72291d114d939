"""mosquitto as a child process: its configuration, its supervision, its log, and revocation while it runs.

mosquitto 2.0 refuses what its ACL does not allow without a word, but for its debug log, which has a line for every
packet. So that is what we read, in blocks, through a pipe that drops lines rather than make the broker wait:
`benchmarks/coordinator.py` takes as many uploads a second with it as without.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable

from coordinator.broker import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, MAX_PACKET_BYTES, PATIENCE_S, STEADY_S, Listener
from coordinator.broker.rules import allowed
from coordinator.ca import COORDINATOR
from coordinator.refusals import Refusals
from edge_sdk.errors import ParameterError
from edge_sdk.files import write_whole
from edge_sdk.transport.mqtt import Credentials, MqttHub

log = logging.getLogger("sordino.broker")

START_S = 10.0
END_S = 5.0

LOG_BYTES = 256 << 10
"""Of the pipe that the log comes through; it holds the lines of some hundred packets."""

LISTEN_S = 0.05
"""Between two looks at the log: reading it line by line would cost more than writing it."""

LINES_AT_ONCE = 100
"""That are of no packet and are looked at; a client that has thousands written would take our time with them."""

_PACKETS = (b"Received ", b"Sending ", b"\t")
"""How the lines of packets begin; those of topics that a SUBSCRIBE names are indented."""

_DENIED_PUBLISH = re.compile(r"Denied PUBLISH from (\S+) \(d\d, q\d, r\d, m\d+, '(.*?)(?:', \.\.\. \(\d+ bytes\)\))?$")
_SUBSCRIBED = re.compile(rf"([0-9a-f]{{64}}|{COORDINATOR}) [012] (.*)$")
_ENDED = "unexpected eof"
_NOBODY_LEFT = "Client <unknown> disconnected"
"""What follows where a connection ended in its handshake: a look whether somebody listens, our own among them."""

_RESET = re.compile(r"Client (?:[0-9a-f]{64}|coordinator) disconnected: Protocol error")
"""Where a connection was reset by the network, too, as happens every day."""

_CONNECTED = re.compile(r"New client connected from \S+ as (\S+) \(")

# The child asks the kernel to be killed when the thread that started it ends, however that ends: a broker that outlived
# its coordinator would hold the port. A child that was orphaned before it could ask ends itself. Set from outside, by
# `preexec_fn`, this would run Python between fork and exec of a process with threads.
_TETHERED = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the coordinator is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

_CONFIG = """\
# Written at every start of the coordinator: changes are lost.
per_listener_settings false
persistence false
allow_anonymous false
acl_file {directory}/mosquitto.acl
{user}
log_dest stderr
log_timestamp false
log_type error
log_type warning
log_type notice
log_type subscribe
log_type debug
connection_messages true

# Nothing that a client left behind is kept: whatever matters is asked for again.
retain_available false
persistent_client_expiration 1h
queue_qos0_messages false
sys_interval 0

# The defaults drop what exceeds 1,000 messages, of any size. Here bytes are what counts, a client. There is one limit
# for all: the coordinator needs it, and a device that asks and does not read takes as much.
max_inflight_messages 1000
max_inflight_bytes 4194304
max_queued_messages 100000
max_queued_bytes {queue}
max_packet_size {packet}
set_tcp_nodelay true

listener {port} {address}
cafile {directory}/ca.pem
certfile {directory}/server.pem
keyfile {directory}/server.key
crlfile {directory}/crl.pem
require_certificate true
use_identity_as_username true
# Else a device could take another's connection away by its client id.
use_username_as_clientid true
"""

_ACL = """\
user {coordinator}
topic read fl/v1/up/+
topic write fl/v1/dn/+

pattern write fl/v1/up/%u
pattern read fl/v1/dn/%u
"""

_DENIED = """
user {device}
topic deny #
"""


def find_mosquitto() -> str | None:
    """The program's path. Debian has it where only root's PATH looks."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


class Mosquitto:
    """See `coordinator.broker.Broker`."""

    name = "mosquitto"

    def __init__(self, program: str, listener: Listener, revoked: Collection[str]) -> None:
        """Listens when this returns. Raises ParameterError with mosquitto's words if it does not start."""
        if any(c in str(listener.directory) for c in "\n\r"):
            raise ParameterError(f"{str(listener.directory)!r}: mosquitto cannot be told of a directory of this name")
        listener.check_free(PATIENCE_S)
        self.url = listener.local_url
        self._program = program
        self._listener = listener
        self._said: deque[str] = deque(maxlen=5)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._revoked, self._silenced = frozenset(revoked), frozenset[str]()
        self._refusals = Refusals(log)
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._write_acl()
        write_whole(listener.directory / "mosquitto.conf", self._config().encode())
        self._thread = threading.Thread(target=self._supervise, name="mosquitto", daemon=True)
        self._thread.start()
        try:
            self._wait_until_listening()
        except ParameterError:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Of the child, if one runs."""
        with self._lock:
            return self._child.pid if self._child is not None and self._child.poll() is None else None

    def link(self, credentials: Credentials) -> MqttHub:
        return MqttHub(self.url, credentials)

    def revoke(self, devices: Collection[str]) -> None:
        """mosquitto 2.0.11 rereads CRL and ACL on SIGHUP. The CRL keeps new connections out; the ACL silences one that
        is there already, which mosquitto leaves open, without disturbing the others."""
        self._revoked = frozenset(devices)
        self._reload()

    def silence(self, devices: Collection[str]) -> None:
        """By the ACL alone: they stay connected, and mosquitto drops what they publish as it comes."""
        self._silenced = frozenset(devices)
        self._reload()

    def _reload(self) -> None:
        self._write_acl()
        with self._lock:
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(signal.SIGHUP)

    def close(self) -> None:
        self._closing.set()
        with self._lock:
            child = self._child
            if child is not None and child.poll() is None:
                child.terminate()
        self._thread.join(END_S)
        if self._thread.is_alive() and child is not None:
            child.kill()
            self._thread.join(END_S)

    def _config(self) -> str:
        return _CONFIG.format(
            directory=self._listener.directory,
            address=self._listener.address,
            port=self._listener.port,
            packet=MAX_PACKET_BYTES,
            queue=self._listener.queue_bytes,
            # Started by root, mosquitto changes to a user who cannot read the directory.
            user="user root" if os.geteuid() == 0 else "",
        )

    def _write_acl(self) -> None:
        text = _ACL.format(coordinator=COORDINATOR)
        text += "".join(_DENIED.format(device=device) for device in sorted(self._revoked | self._silenced))
        write_whole(self._listener.directory / "mosquitto.acl", text.encode())

    def _wait_until_listening(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._ended.is_set():
                break
            try:
                socket.create_connection((self._listener.local_address, self._listener.port), timeout=1.0).close()
            except OSError:
                self._ended.wait(0.02)
                continue
            return
        raise ParameterError(f"mosquitto did not start: {'; '.join(self._said) or 'it said nothing'}")

    def _supervise(self) -> None:
        delay_s = FIRST_BACKOFF_S
        while not self._closing.is_set():
            since = time.monotonic()
            code = self._run_once()
            self._ended.set()
            if self._closing.is_set():
                return
            if time.monotonic() - since > STEADY_S:
                delay_s = FIRST_BACKOFF_S
            log.error("mosquitto ended (%s): %s. Starting it again in %.1f s", code, "; ".join(self._said), delay_s)
            if self._closing.wait(delay_s):
                return
            delay_s = min(2 * delay_s, LONGEST_BACKOFF_S)

    def _run_once(self) -> str:
        """Start the child and read what it says until it ends. Returns how it ended."""
        config = str(self._listener.directory / "mosquitto.conf")
        command = [self._program, "-c", config]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _TETHERED, str(os.getpid()), *command]
        listen, speak = _log_pipe()
        try:
            with self._lock:
                if self._closing.is_set():
                    return "closed"
                child = self._child = subprocess.Popen(  # noqa: S603 - the program is mosquitto, found or configured
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=speak,
                    env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},  # our own
                    start_new_session=True,  # a Ctrl-C is for the coordinator, which ends its child last
                )
        except OSError as error:
            os.close(listen)
            self._said.append(str(error))
            return "not started"
        finally:
            os.close(speak)
        with child:
            self._listen(listen)
        return f"exit code {child.returncode}" if child.returncode >= 0 else f"signal {-child.returncode}"

    def _listen(self, fd: int) -> None:
        """Read what the child says until it ends."""
        tail, reader = b"", _LogReader(self._refusals)
        try:
            while block := os.read(fd, LOG_BYTES):
                *lines, tail = (tail + block).split(b"\n")
                reader.revoked = self._revoked
                self._said.extend(reader.read(lines))
                self._closing.wait(LISTEN_S)
        finally:
            os.close(fd)


class _LogReader:
    """Finds in mosquitto's log what people should know."""

    def __init__(self, refusals: Refusals) -> None:
        self.revoked: frozenset[str] = frozenset()
        self._refusals = refusals
        self._connecting = ""
        """Whom the line before named."""
        self._will_of = ""
        """Whose will's topic comes next."""
        self._just_ended = False
        """Whether the line before said that a connection ended."""

    def read(self, lines: Iterable[bytes]) -> list[str]:
        """Log what they tell. Returns those that are of no packet."""
        few: list[str] = []
        for line in lines:
            if not line.startswith(_PACKETS):
                if len(few) < LINES_AT_ONCE:
                    few.append(line.decode(errors="replace"))
                    self._on_line(few[-1])
            elif self._will_of:  # nearly all lines end above or here: thousands a second, so they must cost nothing
                if line.startswith(b"\t"):
                    self._on_will(self._will_of, line[1:].decode(errors="replace"))
                self._will_of = ""
        return few

    def _on_line(self, line: str) -> None:
        connecting, self._connecting, self._will_of = self._connecting, "", ""
        just_ended, self._just_ended = self._just_ended, _ENDED in line
        if denied := _DENIED_PUBLISH.match(line):
            name, topic = denied.groups()
            if not allowed(name, topic, "publish"):
                self._refusals.topic(name, "publish", topic)
            elif name in self.revoked:  # else it floods, and the server said so
                self._refusals.topic(name, "publish", topic, why="it was revoked")
        elif subscribed := _SUBSCRIBED.match(line):
            # mosquitto grants it, and delivers nothing under it that the ACL does not let this client read.
            name, topic = subscribed.groups()
            if not allowed(name, topic, "subscribe"):
                self._refusals.topic(name, "subscribe", topic)
        elif connected := _CONNECTED.match(line):
            self._connecting = connected[1]
        elif line.startswith("Will message specified"):
            self._will_of = connecting
        elif _RESET.match(line):
            log.info("mosquitto: %s", line)
        elif _is_refusal(line) and not (just_ended and line.startswith(_NOBODY_LEFT)):
            self._refusals.say("", f"mosquitto: {line}")
        else:
            log.debug("mosquitto: %s", line)

    def _on_will(self, name: str, topic: str) -> None:
        """mosquitto takes it, and publishes it to nobody."""
        if not allowed(name, topic, "publish"):
            self._refusals.say(name, f"{name[:16]} refused: its will is for {topic[:128]!r}")


def _is_refusal(line: str) -> bool:
    """Why a connection was refused is an error of OpenSSL's. That one just ended is one, too, and no refusal."""
    if _ENDED in line:
        return False
    return "rror" in line or "denied" in line or "not authorised" in line


def _log_pipe() -> tuple[int, int]:
    """(to read, to write). Writing never waits: a line for which there is no room is lost, and the broker goes on."""
    listen, speak = os.pipe2(os.O_CLOEXEC) if hasattr(os, "pipe2") else os.pipe()
    os.set_blocking(speak, False)
    with contextlib.suppress(OSError, AttributeError):  # Linux's; elsewhere, and beyond a user's share, it is smaller
        fcntl.fcntl(speak, fcntl.F_SETPIPE_SZ, LOG_BYTES)
    return listen, speak
