"""Commands that look at servers from outside: check, bench, plan."""
