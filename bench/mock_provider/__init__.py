"""A stand-in for providers of LLMs, for tests and benchmarks: their three APIs, exact bills, and everything that can go wrong.

In a process: ``async with MockProvider({"small": (0.1, 0.4, 0.025)}) as provider:`` and then ``provider.url``,
``provider.requests``, ``provider.bill``, ``provider.fail("status", status=429, retry_after=2, times=1)``. On a port of its own:
``python -m bench.mock_provider --port 9000``.

- ``POST /v1/chat/completions``, ``/v1/responses``, ``/v1/messages``: as OpenAI and Anthropic answer, at once or as a stream. A
  request with tools gets a call of one, unless its last message is a tool's result. The text follows from seed and body.
- ``GET /_bill``: ``{"total": "3/2000", "entries": [...]}``. ``GET /_requests?last=100``: requests with headers and bodies.
  ``POST /_control``: ``{"rules": [{"fault": "status", "status": 429, "model": "small", "times": 2}]}`` and more, see
  ``MockProvider.control``.

Tokens are counted as ``api`` says. Leading messages that a model had in a request of the last 300 s come from its prompt
cache. A request costs what its tokens cost: all of the input once the first byte is sent, and the output tokens that were sent
before the client was seen to leave, or the fault broke off. What fails or is given up before the first byte, or has no tokens,
costs nothing.
"""

from bench.mock_provider.bill import Bill, Entry, Price
from bench.mock_provider.faults import FAULTS
from bench.mock_provider.provider import MockProvider, Received
from bench.mock_provider.rules import Rule, Rules

__all__ = ["FAULTS", "Bill", "Entry", "MockProvider", "Price", "Received", "Rule", "Rules"]
