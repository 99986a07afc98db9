"""The server: requests and their limits, the version in use, counters, the page."""
