"""`python -m services.gateway`: the control plane of the gateway; see GatewaySettings."""

from services.core.lifecycle import run
from services.core.settings import load
from services.gateway.app import GatewaySettings, running

cfg = load(GatewaySettings)
run("gateway", cfg.log_level, running(cfg))
