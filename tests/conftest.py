"""What all tests share."""

from hypothesis import settings

pytest_plugins = ["tests.controlplane.plugin"]

# A property holds or not however long one example takes on a busy machine; hanging tests have a time-out.
settings.register_profile("modelfleet", deadline=None)
settings.load_profile("modelfleet")
