"""The self-hosted endpoint: app (HTTP), engine (queue), models (weights)."""
