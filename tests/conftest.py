"""Settings shared by all tests: hypothesis without deadlines, because test machines differ in speed."""

from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("ci")
