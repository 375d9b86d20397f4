"""Property tests draw the same examples in every run, and a busy machine does not fail them."""

from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")
