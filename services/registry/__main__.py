"""`python -m services.registry`: the registry, configured by LINGQU_REGISTRY_LISTEN and LINGQU_ETCD."""

from services.core.lifecycle import run
from services.core.settings import load
from services.registry.app import RegistrySettings, running

cfg = load(RegistrySettings)
run("registry", cfg.log_level, running(cfg))
