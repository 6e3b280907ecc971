"""`python -m services.metrics`: the collector and its queries; see MetricsSettings."""

from services.core.lifecycle import run
from services.core.settings import load
from services.metrics.app import MetricsSettings, running

cfg = load(MetricsSettings)
run("metrics", cfg.log_level, running(cfg))
