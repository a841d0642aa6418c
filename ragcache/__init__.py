"""The RAG context cache: documents with identity on top of the prefix store. Its parts arrive with later issues."""
