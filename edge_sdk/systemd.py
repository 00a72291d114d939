"""A committee member as a service of systemd: `edge-helper install TOKEN`.

The service runs as a user that exists while it runs, sees its own directory and nothing else of the disk that it could
write to, and is started again whenever it ends: what counts is on disk before anybody is told.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from edge_sdk.enrolment import Membership, join
from edge_sdk.errors import ParameterError
from edge_sdk.files import write_whole

NAME = "sordino-helper"
STATE = Path("/var/lib") / NAME
"""Where its identity, shares and prekeys are. systemd moves what is in it below /var/lib/private, and leaves a link."""

UNIT = """\
# Written by `edge-helper install`, which may be run again. To be rid of it: systemctl disable --now {name}

[Unit]
Description=Sordino committee member: holds shares, never data
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
ExecStart={python} -m edge_sdk.helper run --dir {state} --json
DynamicUser=yes
StateDirectory={name}
StateDirectoryMode=0700
UMask=0077

Restart=always
RestartSec=5

MemoryMax=256M
TasksMax=32
# numpy's OpenBLAS would start a thread for each processor.
Environment=OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1
LimitNOFILE=1024

ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""

SETTLE_S = 3.0

_PLAIN = re.compile(r"[A-Za-z0-9/._+-]+")
"""What needs no quotes in a unit."""

_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108  not used: refused
"""What the service does not see (ProtectHome, PrivateTmp)."""

Run = Callable[[Sequence[str]], None]


def install(
    token: str,
    *,
    root: Path = Path("/"),
    python: str = sys.executable,
    libraries: Iterable[str] | None = None,
    run: Run | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Membership:
    """Join the fleet that the token invites to, and be a service from now on, also after the next boot.

    Repeating it, with the same token, is harmless: the unit is written anew and the service is started again.
    root: of the file system.  python: the interpreter to run on.  libraries: where what it imports is.  run: runs a
    command.  pause: waits.
    Raises ParameterError if there is no systemd, for want of privilege, if the service could not see the interpreter
    or a library, or if it does not run in the end, and what `edge_sdk.enrolment.join` raises; OSError.
    """
    run = run or _systemctl
    if not (root / "run/systemd/system").is_dir():
        raise ParameterError(
            "systemd does not run here: use `edge-helper join`, and have `edge-helper run` kept running"
        )
    if os.geteuid() != 0:
        raise ParameterError("only root installs a service: sudo edge-helper install")
    text = unit(python, _libraries() if libraries is None else libraries)
    membership = join(root / STATE.relative_to("/"), token)
    write_whole(root / "etc/systemd/system" / f"{NAME}.service", text.encode(), mode=0o644)
    run(["systemctl", "daemon-reload"])
    run(["systemctl", "enable", f"{NAME}.service"])
    run(["systemctl", "restart", f"{NAME}.service"])
    pause(SETTLE_S)  # a process was made: whether it stays is known when it has imported everything
    try:
        run(["systemctl", "is-active", "--quiet", f"{NAME}.service"])
    except ParameterError as error:
        raise ParameterError(f"the service was started and ended again: journalctl -u {NAME}") from error
    return membership


def _libraries() -> list[str]:
    """The interpreter's own, and the places of what a helper imports."""
    names = ("edge_sdk", "numpy", "cryptography", "msgspec", "paho.mqtt.client")
    found = [importlib.util.find_spec(name) for name in names]
    return [sys.base_prefix, *(str(spec.origin) for spec in found if spec is not None)]


def unit(python: str, libraries: Iterable[str]) -> str:
    """The unit's text. Raises ParameterError if the service could not see the interpreter or a library, or name it."""
    for path in (python, *libraries):
        if any(there.is_relative_to(hidden) for hidden in _HIDDEN for there in (Path(path), Path(path).resolve())):
            raise ParameterError(
                f"{path}: a service does not see what is there: make a virtual environment in /usr/local/lib/sordino "
                "with the system's Python, pip install sordino into it, and install with its edge-helper"
            )
    if not _PLAIN.fullmatch(python):
        raise ParameterError(f"{python}: letters, digits and /._+- are what an interpreter's path may have in a unit")
    return UNIT.format(name=NAME, state=STATE, python=python)


def _systemctl(command: Sequence[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  from `install` alone
    if ended.returncode:
        raise ParameterError(f"{' '.join(command)}: {ended.stderr.strip() or f'exit status {ended.returncode}'}")
