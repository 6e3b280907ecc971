"""`python -m services.inference`: one inference service beside one Triton; see InferenceSettings."""

from services.core.lifecycle import run
from services.core.settings import load
from services.inference.app import InferenceSettings, running

cfg = load(InferenceSettings)
run("inference", cfg.log_level, running(cfg))
