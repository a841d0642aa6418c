"""The store: one chunked prefix tree of attention keys and values, shared by all requests.

store      PrefixStore: what the engine talks to      lease      one sequence's hold on its chunks
ledger     who owns each slot                         claims     which chunks are being computed right now
tree       every cached chunk under its exact tokens  node       one of them
eviction   which chunk goes first: LRU, LFU           slots      free slots, as runs
pgdsf      the same, by frequency and cost            frequency  counts that fade, in bounded memory
namespace  what besides the tokens decides a chunk    tokens     token ids as ordered bytes
layout     the shape and size of a chunk              pool       the tensor in which chunks live
explain    why each part of a prompt is a hit or a miss
snapshot   a bounded picture of one namespace's tree
frame      what a cold tier stores, checked           frame_header  what a frame says of its chunks
chunk_frames  chunks to frames and back, by a codec
codecs/    a chunk's numbers as bytes: exact or lossy
evicted    names of the chunks evicted last           accounts   what each namespace found and lost
errors     the error tree
"""
