"""Codecs: how a chunk's keys and values become bytes at rest. `codec.py` has the protocol, `registry.py` the names."""
