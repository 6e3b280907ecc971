"""The gateway: Envoy moves the requests, this control plane tells it how."""
