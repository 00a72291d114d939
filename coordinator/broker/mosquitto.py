"""mosquitto as a child process: its configuration, its supervision, and revocation while it runs."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection

from coordinator.broker import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, MAX_PACKET_BYTES, PATIENCE_S, STEADY_S, Listener
from coordinator.ca import COORDINATOR
from edge_sdk.enrolment import write_whole
from edge_sdk.errors import ParameterError

log = logging.getLogger("sordino.broker")

START_S = 10.0
END_S = 5.0

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
connection_messages false

# Nothing that a client left behind is kept: whatever matters is asked for again.
retain_available false
persistent_client_expiration 1h
queue_qos0_messages false
sys_interval 0

# The defaults drop what exceeds 1,000 messages, of any size. Here bytes are what counts, a client.
max_inflight_messages 1000
max_queued_messages 100000
max_queued_bytes 67108864
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
        self._child: subprocess.Popen[str] | None = None
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._write_acl(revoked)
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

    def revoke(self, devices: Collection[str]) -> None:
        """mosquitto 2.0.11 rereads CRL and ACL on SIGHUP. The CRL keeps new connections out; the ACL silences one that
        is there already, which mosquitto leaves open, without disturbing the others."""
        self._write_acl(devices)
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
            # Started by root, mosquitto changes to a user who cannot read the directory.
            user="user root" if os.geteuid() == 0 else "",
        )

    def _write_acl(self, revoked: Collection[str]) -> None:
        text = _ACL.format(coordinator=COORDINATOR)
        text += "".join(_DENIED.format(device=device) for device in sorted(revoked))
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
        try:
            with self._lock:
                if self._closing.is_set():
                    return "closed"
                child = self._child = subprocess.Popen(  # noqa: S603 - the program is mosquitto, found or configured
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # a Ctrl-C is for the coordinator, which ends its child last
                )
        except OSError as error:
            self._said.append(str(error))
            return "not started"
        with child:
            assert child.stderr is not None  # noqa: S101 - it is a pipe
            for line in child.stderr:
                self._said.append(line.strip())
                log.log(_level(line), "mosquitto: %s", line.strip())
        return f"exit code {child.returncode}" if child.returncode >= 0 else f"signal {-child.returncode}"


def _level(line: str) -> int:
    """Why a connection was refused is an error of OpenSSL's, and the line after it names the client."""
    return logging.WARNING if "rror" in line or "denied" in line or "not authorised" in line else logging.DEBUG
