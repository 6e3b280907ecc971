"""What all services share and no more: settings, lifecycle, interceptors, errors, telemetry, discovery."""
