"""Requests with every setting, through the queue: `tests.contract` by id instead of row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from runtime import Runtime, StepOutput
from tests.contract import Ask, Got, collect


def by_request(out: StepOutput) -> StepOutput:
    """The output with ids in the place of rows."""
    ids = dict(zip(out.rows.tolist(), out.requests.tolist(), strict=True))
    prompt = out.prompt and replace(out.prompt, rows=out.prompt.requests)
    logits = {ids[row]: line for row, line in out.logits.items()}
    return replace(out, rows=out.requests, prompt=prompt, logits=logits)


def submit_all(runtime: Runtime, asks: Sequence[Ask], *, ahead: int = 1) -> list[Got]:
    """Submit all at once and answer them; asserts that no prompt token is scored twice."""
    answers: dict[int, Got] = {}
    results = []
    for ask in asks:
        request = runtime.submit(ask.prompt, ask.params)
        if ask.mask is not None:
            runtime.set_request_mask(request, ask.mask)
        results.append(Got(-1, runtime.seed_of_request(request)))
        answers[request] = results[-1]
    while runtime.num_running or runtime.num_in_flight:
        while runtime.num_in_flight < ahead and runtime.num_running:
            runtime.launch()
        collect(by_request(runtime.collect()), answers)
    return results
