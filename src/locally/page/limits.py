"""How much a stranger may ask of us: so many requests in a time, so many bytes in one."""

import ipaddress
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Allowance:
    """A token bucket for each key: `burst` at once, refilled at `burst` a `period`.

    Keys that have been silent longest are forgotten first, so that strangers cannot fill the memory.

    Args:
        burst: requests that a full bucket holds.
        period: seconds in which an empty bucket fills.
        keys: buckets that are remembered.
        clock: seconds, monotonic.

    >>> seconds = 0.0
    >>> allowance = Allowance(2, 60.0, clock=lambda: seconds)
    >>> [allowance.take("me") for _ in range(3)]  # the third may come in half a minute
    [0.0, 0.0, 30.0]
    >>> allowance.take("you")
    0.0
    """

    def __init__(
        self, burst: int, period: float, *, keys: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if burst < 1 or not period > 0 or keys < 1:
            raise ValueError(f"burst, period and keys must be positive, got {burst}, {period}, {keys}")
        self.burst, self.rate, self.keys, self._clock = burst, burst / period, keys, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key: (level, when)
        self._lock = threading.Lock()

    def take(self, key: str) -> float:
        """Take one: 0 if the bucket had it, otherwise the seconds after which it will."""
        now = self._clock()
        with self._lock:
            level, when = self._buckets.pop(key, (float(self.burst), now))
            level = min(float(self.burst), level + (now - when) * self.rate)
            wait = 0.0 if level >= 1 else (1 - level) / self.rate
            self._buckets[key] = (level - 1 if not wait else level, now)
            if len(self._buckets) > self.keys:
                self._buckets.popitem(last=False)
        return wait


def sender(host: str) -> str:
    """The key for who asks: an IPv4 address, or the /64 network that an IPv6 customer is given whole.

    >>> sender("2001:db8::1:2"), sender("192.0.2.7"), sender("testclient")
    ('2001:db8::/64', '192.0.2.7', 'testclient')
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network(f"{address}/64", strict=False)) if address.version == 6 else str(address)


def retry_after(wait: float) -> dict[str, str]:
    """The header that says when to come again."""
    return {"Retry-After": str(math.ceil(wait))}


class BodyLimit:
    """Refuses a request whose body is too long, whether it says so or just goes on and on."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.limit:
            await _refuse(send)
            return
        got, over, started = 0, False, False

        async def counted() -> Message:
            nonlocal got, over
            message = await receive()
            if message["type"] == "http.request":
                got += len(message.get("body", b""))
                over = over or got > self.limit
            # to the application the sender has hung up, so it reads no further
            return {"type": "http.disconnect"} if over else message

        async def answered(message: Message) -> None:
            nonlocal started
            if started or not over:
                started = True
                await send(message)

        try:
            await self.app(scope, counted, answered)
        except Exception:
            if not over:
                raise
        if over and not started:
            await _refuse(send)


async def _refuse(send: Send) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": b"request too large"})
