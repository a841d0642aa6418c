"""HTTP endpoint and command line: the only place where things are wired, and the only reader of the environment."""
