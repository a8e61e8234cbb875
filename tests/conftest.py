"""What every test shares.

Hypothesis judges results, not speed: its time limit per example fails on a busy machine without cause.
"""

from hypothesis import settings

settings.register_profile("unhurried", settings.default, deadline=None)
settings.load_profile("unhurried")
