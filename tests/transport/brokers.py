"""Real brokers as child processes that keep nothing on disk: mosquitto and amqtt, with the same two listeners.

`url` takes anybody without encryption, `tls_url` asks for a certificate of the test authority. Both are for this
machine only.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from certificates import Authority

START_S = 30.0

AMQTT = """
import asyncio, json, logging, sys
from amqtt.broker import Broker

async def main():
    logging.getLogger("amqtt").setLevel(logging.ERROR)
    broker = Broker(json.loads(sys.argv[1]))
    await broker.start()
    print("broker is running", file=sys.stderr, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def mosquitto_path() -> str:
    """Where mosquitto is. Debian puts it where a user's PATH does not look. Without it tests fail in CI, else skip."""
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        message = "mosquitto is not installed: its Debian package is called mosquitto"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class BrokerProcess:
    """A broker that can be killed and started again on the same ports."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self.directory = directory
        self.ca_path = authority.ca_path
        self.server = authority.issue("127.0.0.1", server=True)
        self.port, self.tls_port = free_ports(2)
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.tls_url = f"mqtts://127.0.0.1:{self.tls_port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._log: list[bytes] = []

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        """Returns when it listens."""
        running = threading.Event()
        process = self._process = subprocess.Popen(
            self.command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

        def read() -> None:
            for line in process.stderr:
                self._log.append(line)
                if b" running" in line:
                    running.set()
            running.set()

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        if not running.wait(START_S) or process.poll() is not None:
            self.kill()
            pytest.fail(f"the broker did not start:\n{b''.join(self._log).decode()}")

    def kill(self) -> None:
        """As a power cut: it says goodbye to nobody and keeps nothing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process.stderr.close()
            self._process = None


class Mosquitto(BrokerProcess):
    def command(self) -> list[str]:
        config = self.directory / "mosquitto.conf"
        config.write_text(f"""
per_listener_settings true
persistence false
user root
set_tcp_nodelay true
max_queued_messages 0
listener {self.port} 127.0.0.1
allow_anonymous true
listener {self.tls_port} 127.0.0.1
allow_anonymous true
require_certificate true
cafile {self.ca_path}
certfile {self.server.certificate_path}
keyfile {self.server.key_path}
""")
        return [mosquitto_path(), "-c", str(config)]


class Amqtt(BrokerProcess):
    def command(self) -> list[str]:
        config = {
            "listeners": {
                "default": {"type": "tcp", "bind": f"127.0.0.1:{self.port}"},
                "tls": {
                    "type": "tcp",
                    "bind": f"127.0.0.1:{self.tls_port}",
                    "ssl": True,
                    "cafile": str(self.ca_path),
                    "certfile": str(self.server.certificate_path),
                    "keyfile": str(self.server.key_path),
                },
            },
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
        return [sys.executable, "-c", AMQTT, json.dumps(config)]
