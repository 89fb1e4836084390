"""Threads in mid-computation: python3 threads.py RESULT. What it writes in the end follows from nothing but this program."""

import hashlib
import sys
import threading

ROUNDS, BLOCKS, BLOCK = 6, 1500, 8192
results = {}


def compute(thread):
    # Some 12 MB of objects a thread, which each round reads and replaces.
    blocks = [hashlib.sha256(f"{thread} {i}".encode()).digest() * (BLOCK // 32) for i in range(BLOCKS)]
    table = {}
    for round in range(ROUNDS):
        for i, block in enumerate(blocks):
            digest = hashlib.sha256(block + blocks[(i * 7 + round) % BLOCKS]).digest()
            blocks[i] = bytearray(digest * (BLOCK // 32))
            table.setdefault(digest[:2], []).append((round, i))
    total = hashlib.sha256()
    for block in blocks:
        total.update(block)
    for key in sorted(table):
        total.update(repr((key, table[key])).encode())
    results[thread] = total.hexdigest()


threads = [threading.Thread(target=compute, args=(thread,)) for thread in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with open(sys.argv[1] + ".new", "w") as file:
    file.write(repr(sorted(results.items())))
import os

os.rename(sys.argv[1] + ".new", sys.argv[1])
