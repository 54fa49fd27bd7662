"""The receiving end: takes heartbeats over HTTP and keeps each of them once."""
