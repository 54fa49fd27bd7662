"""The receiving side: accepts heartbeats over HTTP and stores each of them once."""
