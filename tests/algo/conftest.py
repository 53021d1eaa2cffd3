"""Property tests draw the same examples in each run and have no deadline on a busy machine."""

from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, database=None, deadline=None)
settings.load_profile("reproducible")
