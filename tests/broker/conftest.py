import pytest
from parties import World


@pytest.fixture(params=["mosquitto", "amqtt"])
def world(request, tmp_path):
    tmp_path.chmod(0o700)
    world = World(tmp_path, request.param)
    yield world
    world.close()
