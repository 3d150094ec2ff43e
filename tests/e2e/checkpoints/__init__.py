"""Small checkpoints of random weights, made for the hosts that ``tests.e2e.hosts`` drives."""
