"""BlockManager: who owns which KV block, and which full blocks can be shared.

A block is free (no owner), or owned by one or more sequences. A full block whose KV is computed may
be sealed: it is then in the prefix index and later sequences with the same beginning share it. A
sealed block stays in the index after its last owner left, until the pool needs it.

The index is keyed by a SHA-256 chain over (salt, all tokens up to the block's end). The hash only
finds candidates: a hit also needs equal tokens, equal salt and the very same parent block, so that
no hash function, not even a constant one, can give a false hit. Knows no sequences and no runner.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .batch import IntArray

HashBlock = Callable[[bytes, bytes], bytes]  # (the parent's hash or the salt, the block's tokens) -> hash


def sha256_chain(parent: bytes, tokens: bytes) -> bytes:
    return hashlib.sha256(parent + tokens).digest()


class Seal(NamedTuple):
    """The identity of one full block: what it holds and what precedes it."""

    id: int  # unique over the manager's life, so a block that was reused never passes for its old self
    parent_id: int | None  # the seal before this one; None = first block
    hash: bytes
    tokens: bytes  # (block_size,) int32, raw
    salt: bytes
    block: int


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int, *, hash_block: HashBlock = sha256_chain) -> None:
        assert num_blocks > 0, "a pool needs at least one block"
        assert block_size > 0, "a block holds at least one token"
        self.num_blocks = num_blocks
        self.block_size = block_size  # tokens
        self._hash_block = hash_block
        self._refs = [0] * num_blocks
        # Free blocks, the next to be handed out first: those nobody could share, then least recently used.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._seals: list[Seal | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}  # hash -> block
        self._num_seals = 0
        self.num_shared = 0  # blocks with more than one owner
        self.num_cached = 0  # free blocks that are still in the index

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -------------------------------------------------------------------------------- ownership

    def take(self, cached: Sequence[int], need: int) -> list[int] | None:
        """Own `cached` (from `match`) and `need` fresh blocks; None, and no change, if there are too few."""
        revived = sum(1 for b in cached if self._refs[b] == 0)
        if need > len(self._free) - revived:
            return None
        for b in cached:
            if self._refs[b] == 0:
                del self._free[b]
                self.num_cached -= 1
            self._refs[b] += 1
            self.num_shared += self._refs[b] == 2
        fresh = []
        for _ in range(need):
            b, _none = self._free.popitem(last=False)
            self._forget(b)
            self._refs[b] = 1
            fresh.append(b)
        return [*cached, *fresh]

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one ownership of each block. `blocks` is in sequence order: the tail is evicted before the head."""
        for b in reversed(blocks):
            assert self._refs[b] > 0, f"block {b} released more often than taken"
            self._refs[b] -= 1
            self.num_shared -= self._refs[b] == 1
            if self._refs[b] == 0:
                self._free[b] = None
                if self._seals[b] is None:
                    self._free.move_to_end(b, last=False)
                else:
                    self.num_cached += 1

    # ------------------------------------------------------------------------------ prefix index

    def match(self, tokens: IntArray, salt: bytes, limit: int) -> tuple[list[int], Seal | None]:
        """The longest run of at most `limit` sealed blocks that begins `tokens`, and the last one's seal."""
        blocks: list[int] = []
        last: Seal | None = None
        size = self.block_size
        for i in range(limit):
            raw = tokens[i * size : (i + 1) * size].tobytes()
            found = self._find(self._key(last, raw, salt), last, raw, salt)
            if found is None:
                break
            last = found
            blocks.append(found.block)
        return blocks, last

    def seal(self, block: int, tokens: IntArray, parent: Seal | None, salt: bytes) -> Seal:
        """Declare that `block` holds the KV of `tokens` (block_size of them) after `parent`.

        Returns the seal that later blocks chain to: an equal block's, if one is in the index already.
        """
        assert self._refs[block] > 0, f"block {block} sealed without an owner"
        assert self._seals[block] is None, f"block {block} sealed twice"
        raw = tokens.tobytes()
        key = self._key(parent, raw, salt)
        if (found := self._find(key, parent, raw, salt)) is not None:
            return found
        self._num_seals += 1
        new = Seal(self._num_seals, None if parent is None else parent.id, key, raw, salt, block)
        if key not in self._index:  # else: a colliding hash; this block just stays unshared
            self._index[key] = block
            self._seals[block] = new
        return new

    def unseal(self, blocks: Iterable[int]) -> None:
        """Nobody shall share these any more (their KV is suspect); what was chained to them is unreachable too."""
        for b in blocks:
            self._forget(b)

    def _key(self, parent: Seal | None, raw: bytes, salt: bytes) -> bytes:
        return self._hash_block(salt if parent is None else parent.hash, raw)

    def _find(self, key: bytes, parent: Seal | None, raw: bytes, salt: bytes) -> Seal | None:
        block = self._index.get(key)
        seal = None if block is None else self._seals[block]
        if seal is None or seal.tokens != raw or seal.salt != salt:
            return None
        return seal if seal.parent_id == (None if parent is None else parent.id) else None

    def _forget(self, block: int) -> None:
        seal = self._seals[block]
        if seal is not None:
            del self._index[seal.hash]
            self._seals[block] = None
            if self._refs[block] == 0:
                self.num_cached -= 1
                if block in self._free:
                    self._free.move_to_end(block, last=False)

    # ------------------------------------------------------------------------------------ checks

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless every block has exactly these owners and the index is sound."""
        counts = Counter(b for blocks in owners for b in blocks)
        for b, refs in enumerate(self._refs):
            assert refs == counts[b], f"block {b} has {refs} references and {counts[b]} owners"
            assert (refs == 0) == (b in self._free), f"block {b} with {refs} references: free list disagrees"
        assert self.num_free + self.num_used == self.num_blocks, "free + used != total"
        assert self.num_shared == sum(refs > 1 for refs in self._refs), "shared blocks are miscounted"
        assert self.num_cached == sum(self._seals[b] is not None for b in self._free), "cached blocks are miscounted"
        for key, b in self._index.items():
            seal = self._seals[b]
            assert seal is not None, f"index entry of block {b} has no seal"
            assert seal.hash == key and seal.block == b, f"index entry of block {b} names another"  # noqa: PT018
        assert len(self._index) == sum(s is not None for s in self._seals), "a seal is not in the index"


def salt_bytes(*parts: str | None) -> bytes:
    """The chain's root: SHA-256 over the parts, each with its length, so that no two lists of parts collide."""
    digest = hashlib.sha256()
    for part in parts:
        raw = b"-" if part is None else b"+" + part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()
