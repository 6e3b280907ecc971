"""Global limits: exact sliding windows across any number of gateways and control planes.

Envoy asks (`service`), the limiter (`limiter`) finds the limits of a request (`rules`) and the owner of their
keys (`shards`): this process or another one (`peers`). The owner decides in memory (`shard`, `window`) and
writes ahead what its successor has to count (`reservations`, `cells`, `ledger`)."""
