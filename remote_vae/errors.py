"""The errors of the package. Each message says what failed, where, and what to do.

``reason`` is the short form that goes into the history and the log line ("503", "connection refused").
"""

from __future__ import annotations


class RemoteVaeError(RuntimeError):
    """Base of every error that this package raises on purpose."""

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


class SettingsError(RemoteVaeError, ValueError):
    """A setting has a value that cannot be used."""


class InvalidRequest(RemoteVaeError, ValueError):
    """The arguments do not make a request of the protocol; nothing was sent (client), or HTTP 400 (server)."""


class NotFinite(RemoteVaeError):
    """The VAE's result has NaN or infinite values: the server answers an error, never a picture made of them."""


class RouteFailed(RemoteVaeError):
    """One route could not answer the call; the router goes on to the next one.

    Attributes:
        was_said: whether the user has read the same before.
    """

    was_said = False


class NotOffered(RouteFailed):
    """The route does not take this call: no endpoint for the family, picture too large, endpoint in its pause."""


class VaeNotConfirmed(NotOffered):
    """It is not known yet whether the endpoint has the VAE of the call."""

    def __init__(self, message: str, *, reason: str, was_said: bool) -> None:
        super().__init__(message, reason=reason)
        self.was_said = was_said


class AnotherVae(VaeNotConfirmed):
    """The endpoint has another VAE than the call."""


class EndpointUnreachable(RouteFailed):
    """No connection, or the connection broke: refused, unknown host, reset, TLS failure."""


class DeadlineExceeded(RouteFailed):
    """A deadline ran out: connect, first byte or total."""


class CallCancelled(RouteFailed):
    """The user pressed Interrupt or Skip while the endpoint was being waited for."""


class EndpointError(RouteFailed):
    """The endpoint answered with an HTTP error.

    Attributes:
        status: the code.
        detail: what the endpoint said.
        retry_after: seconds after which it wants to be asked again; None: it did not say.
        is_of_the_server: whether it came in JSON, as a VAE server's errors do, and not from what stands before it.
    """

    def __init__(
        self, status: int, detail: str, url: str, *, retry_after: float | None = None, is_of_the_server: bool = False
    ) -> None:
        super().__init__(f"{url} answered {status}: {detail}", reason=f"{status}")
        self.status = status
        self.detail = detail
        self.retry_after = retry_after
        self.is_of_the_server = is_of_the_server


class MalformedAnswer(RouteFailed):
    """The endpoint answered 200 with something that is not the answer to this request."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=f"bad answer: {message}")

    def by(self, endpoint: str) -> MalformedAnswer:
        """The same, its message with the name of who answered so; the record goes out with pictures, and has none."""
        self.args = (f"{endpoint}: {self.reason}",)
        return self


class OneColour(MalformedAnswer):
    """A picture of one colour where none is expected. It may be right, so that it is not held against the endpoint."""


class OutOfMemory(RouteFailed):
    """The call does not fit in the memory of the device, whichever way it was tried."""


class UnsupportedLayout(RouteFailed):
    """The VAE is of a kind that this route does not know."""


class VaeCallFailed(RemoteVaeError):
    """No route could answer. For a decode, ``rescued`` is the file that holds the latents."""

    def __init__(self, message: str, *, rescued: str | None = None) -> None:
        super().__init__(message)
        self.rescued = rescued
