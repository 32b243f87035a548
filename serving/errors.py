"""The one exception of refused requests, in OpenAI's form."""

from typing import Any


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP, 400 or above.
        message: what is wrong, where, and what to do instead.
        param: the parameter that is wrong, if one is.
        code: a word for programs.
        headers: further headers of the response.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
