"""BlockManager against a naive model: a dictionary from block to everything that precedes its end."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanovllm.blocks import BlockManager, Seal, salt_bytes, sha256_chain

SIZE = 2  # tokens per block
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12)  # few tokens, so that prefixes repeat
SALTS = st.sampled_from([b"a", b"b"])


def constant(parent: bytes, tokens: bytes) -> bytes:
    return b""


def four_values(parent: bytes, tokens: bytes) -> bytes:
    return hashlib.sha256(parent + tokens).digest()[:1].translate(bytes(i % 4 for i in range(256)))


class Owner:
    """A sequence that holds blocks and fills them in order."""

    def __init__(self, tokens: list[int], salt: bytes, blocks: list[int], seal: Seal | None, num_full: int) -> None:
        self.tokens = tokens
        self.salt = salt
        self.blocks = blocks
        self.seal = seal
        self.num_full = num_full  # blocks sealed or matched

    @property
    def can_seal(self) -> bool:
        return (self.num_full + 1) * SIZE <= len(self.tokens)


class Blocks(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 10), hash_block=st.sampled_from([sha256_chain, constant, four_values]))
    def start(self, num_blocks: int, hash_block: object) -> None:
        self.manager = BlockManager(num_blocks, SIZE, hash_block=hash_block)  # type: ignore[arg-type]
        self.is_exact = hash_block is sha256_chain
        self.owners: list[Owner] = []
        # What each block's KV is: (salt, all tokens up to its end); None = not computed, or suspect.
        self.content: dict[int, tuple[bytes, tuple[int, ...]] | None] = {}
        self.was_disturbed = False  # has anything been evicted or unsealed yet?

    @rule(tokens=TOKENS, salt=SALTS)
    def admit(self, tokens: list[int], salt: bytes) -> None:
        array = np.array(tokens, np.int32)
        limit = (len(tokens) - 1) // SIZE
        cached, seal = self.manager.match(array, salt, limit)
        # Sound: a hit is exactly this prefix, under this salt.
        for i, block in enumerate(cached):
            assert self.content[block] == (salt, tuple(tokens[: (i + 1) * SIZE]))
        # Complete, as long as nothing was lost: the longest known prefix is found.
        if self.is_exact and not self.was_disturbed:
            known = {c for c in self.content.values() if c is not None}
            longest = 0
            while longest < limit and (salt, tuple(tokens[: (longest + 1) * SIZE])) in known:
                longest += 1
            assert len(cached) == longest
        need = self.manager.blocks_for(len(tokens)) - len(cached)
        free_before = self.manager.num_free
        in_use = {b for o in self.owners for b in o.blocks}
        blocks = self.manager.take(cached, need)
        revived = sum(b not in in_use for b in cached)
        if blocks is None:
            assert need > free_before - revived, "refused although there was room"
            assert self.manager.num_free == free_before, "a refusal changed something"
            return
        assert self.manager.num_free == free_before - revived - need
        assert blocks[: len(cached)] == cached
        fresh = blocks[len(cached) :]
        assert in_use.isdisjoint(fresh), "handed out a block that somebody owns"
        for b in fresh:
            self.was_disturbed |= self.content.get(b) is not None
            self.content[b] = None
        self.owners.append(Owner(tokens, salt, blocks, seal, len(cached)))

    @precondition(lambda self: any(o.can_seal for o in self.owners))
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from([o for o in self.owners if o.can_seal]))
        block = owner.blocks[owner.num_full]
        end = (owner.num_full + 1) * SIZE
        tokens = np.array(owner.tokens[end - SIZE : end], np.int32)
        owner.seal = self.manager.seal(block, tokens, owner.seal, owner.salt)
        owner.num_full += 1
        self.content[block] = (owner.salt, tuple(owner.tokens[:end]))

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), is_suspect=st.booleans())
    def leave(self, data: st.DataObject, is_suspect: bool) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        self.owners.remove(owner)
        if is_suspect:
            self.manager.unseal(owner.blocks)
            self.was_disturbed = True
            for b in owner.blocks:
                self.content[b] = None
        self.manager.release(owner.blocks)

    @invariant()
    def accounts_balance(self) -> None:
        self.manager.check([o.blocks for o in self.owners])


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def seal_all(manager: BlockManager, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Take, fill and seal blocks for `tokens`; returns the blocks."""
    blocks = manager.take((), manager.blocks_for(len(tokens)))
    assert blocks is not None
    seal = None
    for i, block in enumerate(blocks):
        chunk = np.array(tokens[i * SIZE : (i + 1) * SIZE], np.int32)
        if len(chunk) == SIZE:
            seal = manager.seal(block, chunk, seal, salt)
    return blocks


def match(manager: BlockManager, tokens: list[int], salt: bytes = b"") -> list[int]:
    return manager.match(np.array(tokens, np.int32), salt, len(tokens) // SIZE)[0]


def test_the_least_recently_used_prefix_is_evicted_first_and_its_tail_before_its_head() -> None:
    manager = BlockManager(5, SIZE)
    old, new = seal_all(manager, [1, 2, 3, 4]), seal_all(manager, [5, 6, 7, 8])
    manager.release(old)
    manager.release(new)
    manager.take((), 1)  # the one that was never used
    manager.take((), 1)
    assert match(manager, [1, 2, 3, 4]) == old[:1]
    assert match(manager, [5, 6, 7, 8]) == new
    manager.take((), 2)
    assert match(manager, [1, 2, 3, 4]) == []
    assert match(manager, [5, 6, 7, 8]) == new[:1]


def test_what_follows_a_suspect_block_is_unreachable_even_after_it_is_computed_again() -> None:
    manager = BlockManager(8, SIZE)
    first = seal_all(manager, [1, 2, 3, 4])
    manager.unseal(first[:1])
    again = seal_all(manager, [1, 2])
    assert match(manager, [1, 2, 3, 4]) == again


def test_equal_blocks_computed_twice_are_found_once() -> None:
    manager = BlockManager(8, SIZE)
    first, second = seal_all(manager, [1, 2, 3, 4]), seal_all(manager, [1, 2, 3, 4, 5, 6])
    assert match(manager, [1, 2, 3, 4, 5, 6]) == [*first, second[2]]


@pytest.mark.parametrize("hash_block", [constant, four_values])
def test_no_hash_function_gives_a_false_hit(hash_block: object) -> None:
    manager = BlockManager(16, SIZE, hash_block=hash_block)  # type: ignore[arg-type]
    first = seal_all(manager, [1, 2, 3, 4])
    assert match(manager, [3, 4]) == []  # the same tokens in another place
    assert match(manager, [9, 9, 3, 4]) == []
    assert match(manager, [1, 2], b"other salt") == []
    assert match(manager, [1, 2])[:1] == first[:1]


def test_salts_do_not_collide_by_concatenation() -> None:
    salts = [
        ("a", None),
        (None, "a"),
        ("a", "b"),
        ("ab", None),
        ("ab",),
        ("a-b",),
        ("", "ab"),
        ("-", None),
        (None, "-"),
    ]
    assert len({salt_bytes(*s) for s in salts}) == len(salts)


def test_releasing_more_often_than_taking_is_noticed() -> None:
    manager = BlockManager(2, SIZE)
    blocks = manager.take((), 1)
    assert blocks is not None
    manager.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        manager.release(blocks)
