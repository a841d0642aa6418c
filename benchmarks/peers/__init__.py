"""stemcache beside the servers that people would use instead: same checkpoint, same requests, in turns.

make peers-install peers        or, from benchmarks/, python -m peers
"""
