"""Where points are kept: DuckDB in one file, or InfluxDB, under one contract."""
