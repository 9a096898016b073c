"""Continuous batching: answers of many lengths, computed side by side, a finished one making room for the next.

Prompts wait in order of length, equal ones together. A prompt is read once for all of its answers; prompts read
together are of one padded length, so that how a prompt is read depends on the prompt alone. Rows are computed in as
few different numbers as do, since the kernels are made anew for each number of rows.

Shapes: R rows that are computed side by side, N most new tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence, Set
from itertools import islice, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain.generation.choice import Choice, row_uniforms
from llmtrain.generation.decoder import Decoder
from llmtrain.models.cache import PROMPT_MULTIPLE, KVCache, rounded_up

# New prompts are read once this share of the rows is free: a few together cost less than one by one.
FREE_SHARE = 0.125
# Prompts are read so many tokens at a time, padding included: activations stay in the processor's caches.
PROMPT_TOKENS = 4096


class Request(NamedTuple):
    """What is asked of one row."""

    prompt: tuple[int, ...]
    seed: int
    limit: int
    """Longest answer in tokens."""


class _Read(NamedTuple):
    """Prompts that have been read, and what follows from them."""

    rows: dict[tuple[int, ...], int]
    logits: Tensor  # [rows, V]
    cache: KVCache


class ContinuousBatch:
    """Answers requests with at most `rows` of them at a time.

    The attributes with a dimension R hold what is computed now: `slots[i]` is the number of the request in row i.
    """

    def __init__(
        self, decoder: Decoder, requests: Sequence[Request], choose: Choice, stop_tokens: Set[int], rows: int
    ) -> None:
        rows, device = min(rows, len(requests)), decoder.device
        limit = max(request.limit for request in requests)
        self.decoder, self.requests, self.choose = decoder, requests, choose
        self.waiting = deque(sorted(range(len(requests)), key=lambda row: _order(requests[row].prompt)))
        self.answers: list[list[int]] = [[] for _ in requests]
        self.stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=device)
        self.known: _Read | None = None  # what was read last: more of its prompts' requests may wait
        self.slots: list[int | None] = [None] * rows
        self.cache = decoder.free_rows(rows, [(len(request.prompt), request.limit) for request in requests])
        self.tokens, self.counts, self.limits = torch.zeros(3, rows, dtype=torch.long, device=device)  # [R] each
        self.produced = torch.zeros(rows, limit, dtype=torch.long, device=device)  # [R, N]
        self.uniforms = torch.zeros(rows, limit, device=device)  # [R, N]

    def run(self) -> list[list[int]]:
        """The answers to all requests, in their order."""
        while self.waiting or self._running():
            self._refill()
            if not self.waiting:
                self._shrink()
            running = self._running()
            if running:
                logits = self.decoder.read_tokens(self.tokens, self.cache)
                self._take(running, logits if len(running) == len(logits) else logits[running])
        return self.answers

    def _running(self) -> list[int]:
        return [row for row, request in enumerate(self.slots) if request is not None]

    def _refill(self) -> None:
        """Gives free rows to requests that wait, once there are enough of them."""
        while self.waiting:
            free = [row for row, request in enumerate(self.slots) if request is None]
            if not free or len(free) < FREE_SHARE * len(self.slots):
                return
            self._start(free)

    def _start(self, free: list[int]) -> None:
        """Starts as many waiting requests as there are free rows and prompts that have been read together."""
        known = self.known
        if known is None or self.requests[self.waiting[0]].prompt not in known.rows:
            known = self.known = self._read(list(islice(self.waiting, len(free))))
        taken = list(takewhile(lambda row: self.requests[row].prompt in known.rows, islice(self.waiting, len(free))))
        rows = free[: len(taken)]
        for row in rows:
            self.slots[row] = self.waiting.popleft()
        requests = [self.requests[number] for number in taken]
        device = self.tokens.device
        which = torch.tensor([known.rows[request.prompt] for request in requests], device=device)
        self.cache.adopt(torch.tensor(rows, device=device), known.cache, which)
        self.counts[rows] = 0
        self.limits[rows] = torch.tensor([request.limit for request in requests], device=device)
        uniforms = row_uniforms([request.seed for request in requests], self.uniforms.shape[1])
        self.uniforms[rows] = uniforms.to(device)
        self._take(rows, known.logits[which])

    def _read(self, waiting: list[int]) -> _Read:
        """Reads the first of these requests' prompts, and others that are padded to the same length."""
        width = rounded_up(len(self.requests[waiting[0]].prompt), PROMPT_MULTIPLE)
        prompts = dict.fromkeys(self.requests[row].prompt for row in waiting)
        together = list(takewhile(lambda prompt: rounded_up(len(prompt), PROMPT_MULTIPLE) == width, prompts))
        together = together[: max(1, PROMPT_TOKENS // width)]
        logits, cache = self.decoder.read_prompts(together)
        return _Read({prompt: row for row, prompt in enumerate(together)}, logits, cache)

    def _take(self, rows: list[int], logits: Tensor) -> None:
        """Chooses the next token of these rows from their logits, and frees the rows that have ended."""
        counts = self.counts[rows]
        tokens = self.choose(logits, self.uniforms[rows, counts])
        self.tokens[rows] = tokens
        self.produced[rows, counts] = tokens
        self.counts[rows] = counts + 1
        ended = torch.isin(tokens, self.stops) | (counts + 1 == self.limits[rows])
        freed = [rows[index] for index in ended.nonzero()[:, 0].tolist()]
        for row in freed:
            request = self.slots[row]
            assert request is not None
            self.answers[request] = self.produced[row, : int(self.counts[row])].tolist()
            self.slots[row] = None
        if freed:
            self.cache.release(torch.tensor(freed, device=self.tokens.device))

    def _shrink(self) -> None:
        """Computes fewer rows where fewer do."""
        running = self._running()
        count = enough_rows(len(running))
        if count >= len(self.slots):
            return
        kept = list(range(count))
        free = [row for row in kept if self.slots[row] is None]
        for hole, row in zip(free, (row for row in running if row >= count), strict=False):
            kept[hole] = row
        order = torch.tensor(kept, device=self.tokens.device)
        self.slots = [self.slots[row] for row in kept]
        self.cache.select(order)
        self.tokens, self.counts, self.limits = self.tokens[order], self.counts[order], self.limits[order]
        self.produced, self.uniforms = self.produced[order], self.uniforms[order]


def enough_rows(running: int) -> int:
    """The number of rows to compute where `running` are wanted: 1, 2, 4, 8 or a multiple of 8."""
    return next((count for count in (1, 2, 4) if count >= running), -(-running // 8) * 8)


def _order(prompt: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return len(prompt), prompt
