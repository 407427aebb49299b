"""Runs the functions of ``calls`` on request, in the environment that it is started in: a line of JSON in, one out.

All output of libraries goes to stderr. A library that looks up another host gets an error, and so does the test.
"""

import json
import os
import socket
import sys
import traceback

import calls

# LiteLLM asks the hub how long a model's texts may be, to compute their price, and continues without an answer.
LOOKED_UP_IN_VAIN = "huggingface.co"


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    others = keep_to_this_machine()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(calls, request["function"])(**request["arguments"])}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        if others:
            answer = {"error": "OtherHost", "message": f"looked up {others}", "trace": ""}
            others.clear()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def keep_to_this_machine() -> list[str]:
    """Prevent look-ups of other hosts; return the list that collects their names."""
    others: list[str] = []
    look_up = socket.getaddrinfo

    def look_up_here(host, *args, **kwargs):  # type: ignore[no-untyped-def]
        if host not in ("127.0.0.1", "localhost", None):
            if host != LOOKED_UP_IN_VAIN:
                others.append(str(host))
            raise socket.gaierror(f"a test must not look up {host!r}")
        return look_up(host, *args, **kwargs)

    socket.getaddrinfo = look_up_here
    return others


if __name__ == "__main__":
    main()
