"""Tiers below the device pool: where chunks lie that the pool has no room for, and that outlive the process.

tier      the protocol that all of them keep, what a miss can be, and what is counted
host      memory of this process            disk    an LMDB file, shared by the processes of this machine
redis     a server, shared by machines      breaker when to leave a server in peace
deadline  sockets that end in time          open    a tier by its address
address   what a Redis address says         blobs   large values with fewer copies
"""
