"""The store: one chunked prefix tree of attention keys and values, shared by all requests.

store      PrefixStore: what the engine talks to      lease      one sequence's hold on its chunks
ledger     who owns each slot                         claims     which chunks are being computed right now
tree       every cached chunk under its exact tokens  node       one of them
eviction   which chunk goes first                     slots      free slots, as runs
namespace  what besides the tokens decides a chunk    tokens     token ids as ordered bytes
layout     the shape and size of a chunk              pool       the tensor; the only file that knows torch
explain    why each part of a prompt is a hit or a miss
snapshot   a bounded picture of one namespace's tree
evicted    names of the chunks evicted last           accounts   what each namespace found and lost
errors     the error tree
"""
