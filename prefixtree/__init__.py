"""The store: one chunked prefix tree of attention keys and values, shared by all requests."""
