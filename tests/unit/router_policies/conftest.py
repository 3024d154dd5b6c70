"""Property tests say what is right, not how fast a busy machine finds it out."""

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
