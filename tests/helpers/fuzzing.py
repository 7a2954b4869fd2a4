"""How long the fuzzers run, and with which settings of hypothesis."""

from hypothesis import HealthCheck

FUZZ = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
SECONDS_OF_FUZZ = 60
