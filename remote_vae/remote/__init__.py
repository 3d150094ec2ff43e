"""Endpoints: one POST, one client, the breaker, the route, and the two public functions."""
