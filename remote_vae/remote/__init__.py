"""Endpoints: transport and waiting (one request), client (one endpoint), endpoints (which one), the route, two public functions."""
