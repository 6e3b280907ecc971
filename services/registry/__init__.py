"""The registry: which instances live and which model versions exist. etcd is its only state."""
