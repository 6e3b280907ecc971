"""What is wrong, and who is told: rules over the store, alerts, silences."""
