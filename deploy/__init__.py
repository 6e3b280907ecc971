"""How the suite is run: here on one machine, in containers, on Kubernetes."""
