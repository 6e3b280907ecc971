"""The suite's memory in time: collects, stores and queries what every model, client and machine did."""
