import time

import pytest
from parties import DEADLINE_S, Raw, World

from edge_sdk.transport import Connected


@pytest.fixture(params=["mosquitto", "amqtt"])
def world(request, tmp_path):
    tmp_path.chmod(0o700)
    world = World(tmp_path, request.param)
    yield world
    world.close()


@pytest.fixture
def hub(world):
    hub = world.hub
    deadline = time.monotonic() + DEADLINE_S
    while not any(isinstance(item, Connected) for item in hub.receive(0.2)):
        assert time.monotonic() < deadline
    return hub


@pytest.fixture
def raw(world, hub):
    raw = Raw(world, world.alice)
    yield raw
    raw.close()
