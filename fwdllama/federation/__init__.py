"""What an aggregator and its devices agree on, and the device's side of it."""
