"""Endpoints: transport and waiting (a request), client (an endpoint), endpoints (which one), the route, public functions."""
