import pytest
from installation import Installation


@pytest.fixture(params=["mosquitto", "amqtt"])
def broker(request):
    return request.param


@pytest.fixture
def install(tmp_path):
    """Makes installations that end with the test."""
    made = []

    def make(*init, where="fleet", **options):
        directory = tmp_path / where
        directory.mkdir(mode=0o700)
        made.append(Installation(directory, *init, **options))
        return made[-1]

    yield make
    for installation in made:
        installation.close()
