"""HTTP dialects, one module each: parse the request, make one service call, render the answer."""
