"""The suite on one machine: what is behind `lingqu up`."""
