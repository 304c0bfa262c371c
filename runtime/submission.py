"""Requests on their way in and out: `add`, `submit`, `cancel`, masks, seeds.

Invariant: what is taken can be served; whatever a request asks for that this model, this cache or
these graphs cannot do is refused here, before it has a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.prefix_cache import DigestChain
from runtime.requests import Request, check_priority
from runtime.row_params import admission, as_token_mask, check_for_model, resolve_seed
from runtime.sampling import SamplingParams, as_token_ids
from runtime.stepping import Stepping
from runtime.turns import Changing, stepping_call


class Submission(Stepping):
    """The part of `runtime.driver.Runtime` through which requests come and go."""

    @property
    def num_running(self) -> int:
        """Requests that have been taken and have not ended, those in the queue among them."""
        return len(self._scheduler.by_id)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, preempted ones among them."""
        return len(self._scheduler.queue)

    def add(
        self,
        prompt_ids: Sequence[int] | NDArray[np.integer[Any]],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
    ) -> int:
        """Take a request into a row now, past the queue; its tokens come out of later steps.

        No device work. Such a request is never preempted. It passes the queue only as one of
        priority 1 could: a row or pages that are due to a request of the queue are refused to it.

        Args:
            cache_salt: the prefix cache is shared only between requests of the same salt.
        Returns:
            The request's row, valid until it ends; `request_id` tells its id.
        Raises:
            ValueError: the request can never fit or is malformed.
            OutOfPages: it cannot fit now, or who waits in the queue is due (`OutOfRows` if it is
                a row that is missing); names whom.
        """
        with self.lock:
            request = self._request(prompt_ids, params, 0, cache_salt, preemptable=False)
            with Changing(self, "add()"):
                self._scheduler.admit_past_queue(request, self._next_step)
                self._accept(request)
                return request.row

    def submit(
        self,
        prompt_ids: Sequence[int] | NDArray[np.integer[Any]],
        params: SamplingParams | None = None,
        priority: int = 0,
        *,
        cache_salt: str = "",
    ) -> int:
        """Take a request into the queue; it gets a row as soon as rows and pages allow.

        Args:
            priority: higher first, then in order of arrival; `ageing_steps` steps of waiting are
                worth one level, so that everybody's turn comes.
            cache_salt: the prefix cache is shared only between requests of the same salt.
        Returns:
            The request's id, by which `StepOutput.requests` names it; never used again.
        Raises:
            ValueError: the request can never fit or is malformed.
        """
        check_priority(priority)
        with self.lock:
            request = self._request(prompt_ids, params, priority, cache_salt, preemptable=True)
            with Changing(self, "submit()"):
                self._scheduler.enqueue(request)
                return self._accept(request)

    def request_id(self, row: int) -> int:
        """The id of the request in `row`.

        Raises:
            ValueError: no such row, or nobody has it.
        """
        request = self._in_row(row)
        if request is None:
            raise ValueError(f"row {row} has no request; its last one has ended")
        return request.id

    def cancel(self, row: int) -> None:
        """End the request in `row` now; no further token of it is returned. Idempotent.

        A request of `submit` may lose its row: cancel it with `cancel_request`.
        """
        with self.lock, Changing(self, "cancel()"):
            self._check_open()
            request = self._in_row(row)
            if request is not None:
                self._scheduler.retire(request, "cancelled")

    def cancel_request(self, request_id: int) -> None:
        """End that request now, wherever it is; no further token of it is returned. Idempotent.

        Raises:
            ValueError: no request has had this id.
        """
        self._check_open()
        _check_id(request_id)
        if not 0 <= request_id < self._next_id:
            raise ValueError(
                f"request {request_id} has never been taken (ids so far: below {self._next_id})"
            )
        with self.lock, Changing(self, "cancel_request()"):
            request = self._scheduler.by_id.get(request_id)
            if request is not None:
                self._scheduler.retire(request, "cancelled")

    def seed_of(self, row: int) -> int:
        """Seed of the last request in `row`, also once it has ended: its own, or the operating
        system's.

        Whoever adds the same request with this seed gets the same tokens.

        Raises:
            TypeError, ValueError: no such row, or nobody has had it yet.
        """
        self._in_row(row)
        seed = int(self._scheduler.seeds[row])
        if seed < 0:
            raise ValueError(f"row {row} has had no request; add() and StepOutput.rows tell rows")
        return seed

    def seed_of_request(self, request_id: int) -> int:
        """Seed of a request that has not ended.

        Raises:
            ValueError: it has ended, or there never was one.
        """
        return self._alive(request_id).admission.seed

    def set_token_mask(self, row: int, words: NDArray[np.int32] | None) -> None:
        """Let the request in `row` sample only the tokens of a mask, from the next launch on.

        Steps in flight keep the mask that they were launched with: to choose each mask by the token
        before it, collect a step before launching the next. A mask stays until it is replaced.

        Args:
            words: int32 or uint32 [ceil(vocab / 32)], copied; token t is allowed if bit t % 32 of
                word t // 32 is set (xgrammar's layout). None allows every token again.
        Raises:
            TypeError, ValueError: not such an array, or no request in `row`.
        """
        with self.lock:
            self._check_open()
            request = self._in_row(row)
            if request is None:
                raise ValueError(f"row {row} has no request to mask; add one first")
            self._mask(request, words)

    def set_request_mask(self, request_id: int, words: NDArray[np.int32] | None) -> None:
        """`set_token_mask` by a request's id, wherever it is.

        Raises:
            TypeError, ValueError: not such an array, or the request has ended.
        """
        with self.lock:
            self._check_open()
            self._mask(self._alive(request_id), words)

    @stepping_call
    def occupy(
        self,
        num_rows: int,
        ctx_len: int,
        max_tokens: int,
        params: SamplingParams | None = None,
    ) -> list[int]:
        """Take rows as if prompts of `ctx_len` tokens had just been prefilled, computing nothing.

        For benchmarks: the rows attend over whatever the KV cache holds.

        Args:
            params: of every row; its max_tokens must be this one's.
        Raises:
            ValueError, OutOfPages, OutOfRows: as `add`.
        """
        self._check_open()
        if self._in_flight:
            raise RuntimeError("occupy() needs an idle device; call collect() first")
        _check_count("num_rows", num_rows, 0)
        _check_count("ctx_len", ctx_len, 1)
        prompt = np.zeros(ctx_len, np.int32)
        if params is None:
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        if isinstance(params, SamplingParams) and params.max_tokens != max_tokens:
            raise ValueError(
                f"max_tokens is {max_tokens} and that of params {params.max_tokens}; give the same"
            )
        with self.lock, Changing(self, "occupy()"):
            return self._occupy(num_rows, prompt, params)

    def _occupy(
        self, num_rows: int, prompt: NDArray[np.integer[Any]], params: SamplingParams
    ) -> list[int]:
        ctx_len = len(prompt)
        taken: list[Request] = []
        try:
            for _ in range(num_rows):
                request = self._request(prompt, params, 0, "", preemptable=False)
                request.cacheable = False  # its pages do not hold what its prompt says
                self._scheduler.admit(request)
                self._accept(request)
                taken.append(request)
                self.pages.grow(request.row, ctx_len)
        except BaseException:
            for request in reversed(taken):
                self._scheduler.retire(request, "cancelled")
            raise
        for request in taken:
            self._scheduler.settle_decoding(request, ctx_len, self._next_step)
        self.engine.adopt(ctx_len, {q.row: (q.admission, self.pages.held(q.row)) for q in taken})
        return [request.row for request in taken]

    def _accept(self, request: Request) -> int:
        self._next_id += 1
        self._counters.submitted += 1
        return request.id

    def _request(
        self,
        prompt_ids: Sequence[int] | NDArray[np.integer[Any]],
        params: SamplingParams | None,
        priority: int,
        cache_salt: str,
        *,
        preemptable: bool,
    ) -> Request:
        """A request that can fit some time, not taken yet."""
        self._check_open()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams or None, got {type(params).__name__}")
        if not isinstance(cache_salt, str):
            raise TypeError(f"cache_salt must be text, got {cache_salt!r}")
        prompt = as_token_ids(prompt_ids, self.model_config.vocab_size)
        limit = len(prompt) + params.max_tokens
        if limit > self.config.max_seq_len:
            raise ValueError(
                f"prompt of {len(prompt)} tokens + max_tokens {params.max_tokens} = {limit} "
                f"exceeds "
                f"max_seq_len {self.config.max_seq_len}; shorten it or raise --max-seq-len"
            )
        # The last token is returned but never fed, so it needs no page.
        whole = self.pages.pages_for(limit - 1)
        if whole > self.pages.capacity:
            raise ValueError(
                f"the request needs {whole} pages of {self.config.page_size} tokens and the cache "
                f"has "
                f"{self.pages.capacity}; shorten it or raise --num-pages"
            )
        stops = self._stops(params)
        check_for_model(params, self.model_config.vocab_size)
        ageing = self._scheduler.config.ageing_steps
        return Request(
            id=self._next_id,
            prompt=prompt,
            params=params,
            admission=admission(params, prompt, stops, resolve_seed(params)),
            order=(self._next_step - int(priority) * ageing, self._next_id),
            chain=DigestChain(cache_salt.encode(errors="surrogatepass")),
            preemptable=preemptable,
            cacheable=True,
            arrived=self._next_step,
            tokens=prompt,
        )

    def _stops(self, params: SamplingParams) -> tuple[int, ...]:
        eos = () if params.ignore_eos else tuple(self.model_config.eos_token_ids)
        stops = tuple(dict.fromkeys((*params.stop_token_ids, *eos)))
        vocab, most = self.model_config.vocab_size, self.engine.mailbox_layout.max_stops
        for token in stops:
            if not 0 <= token < vocab:
                raise ValueError(f"stop token id {token} is outside the vocabulary [0, {vocab})")
        if len(stops) > most:
            raise ValueError(
                f"{len(stops)} stop token ids (the model's own included), at most {most} are "
                f"possible"
            )
        return stops

    def _in_row(self, row: int) -> Request | None:
        if isinstance(row, bool) or not isinstance(row, int | np.integer):
            raise TypeError(
                f"a row is a whole number, got {row!r}; add() returns it, StepOutput.rows tells it"
            )
        if not 0 <= row < self.config.max_rows:
            raise ValueError(
                f"row must be in [0, {self.config.max_rows}), got {row}; requests of submit() go "
                "by their ids (cancel_request, seed_of_request, set_request_mask)"
            )
        return self._scheduler.rows[row]

    def _alive(self, request_id: int) -> Request:
        _check_id(request_id)
        request = self._scheduler.by_id.get(request_id)
        if request is None:
            raise ValueError(
                f"request {request_id} has ended, or there never was one (ids so far: below "
                f"{self._next_id}); ask while it runs"
            )
        return request

    def _mask(self, request: Request, words: NDArray[np.int32] | None) -> None:
        vocab = self.model_config.vocab_size
        request.mask = None if words is None else as_token_mask(words, vocab)
        self._new_masks.add(request)


def _check_id(request_id: object) -> None:
    """Raises TypeError: not a whole number."""
    if isinstance(request_id, bool) or not isinstance(request_id, int | np.integer):
        raise TypeError(
            f"a request's id is a whole number, got {request_id!r}; submit() returns it, and "
            "request_id(row) tells it"
        )


def _check_count(name: str, value: object, low: int) -> None:
    """Raises TypeError, ValueError: not a whole number from `low` on."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
