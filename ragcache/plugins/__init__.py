"""RAG frameworks' own classes over a stemcache server. Each folder needs its framework; nothing here imports another.

Invariant: documents reach the server apart, each with its title and text, never joined into one prompt. So the server
knows where each begins, which of them it has read before, and what to forget when one is deleted.
"""
